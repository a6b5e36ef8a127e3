"""The check of sensitivity that needs no statistics.

DP-SGD composes over what is noised: given all that was noised so far, one record may move the next
clipped sum by at most C. So train in world D; train in the neighbouring world D′ beside it, and
before every step put exactly the noised values of D in the place of those of D′. Everything else in
D′ stays as D′ made it. If training keeps any state that depends on records around the noise, such
as a B trained freely, the next sums differ by more than C sooner or later. Adaptive composition:
Dwork, Roth, "The Algorithmic Foundations of Differential Privacy", 2014, §3.5.
"""

import torch

from fedsa_secure.audit.tiny_training import Training


def largest_difference(first: Training, second: Training, steps: int) -> float:
    """How far two neighbouring worlds' clipped sums come apart, given the same noised values.

    Args:
        first: training in world D.
        second: training in world D′, from the same public start.
        steps: how many to compare.

    Returns:
        The largest Euclidean distance over all steps and clients. A sound training stays within C,
        or 2C where whole clients are protected, up to rounding. NaN if a sum is NaN.

    Raises:
        ValueError: if the two trainings do not noise the same things.
    """
    differences = []
    for _ in range(steps):
        forced, kept = second.noised, first.noised
        if forced.keys() != kept.keys():
            raise ValueError("the two worlds noise different parameters")
        for name, values in kept.items():
            forced[name].copy_(values)
        first.step()
        second.step()
        differences.append((first.clipped - second.clipped).norm(dim=1).max())
    return float(torch.stack(differences).max())
