"""The learning rate over the whole run. It is not restarted in every round."""

import math
from typing import Literal


def rate_factor(
    schedule: Literal["constant", "linear", "cosine"], done: int, total: int, warmup: int = 0
) -> float:
    """What the peak learning rate is multiplied by.

    Args:
        schedule: how it falls; to zero at the end of the run, except for ``constant``.
        done: local steps that lie behind by the clock of the run, (round - 1) · local_steps + step:
            a client that sat out a round finds the rate where everyone else has it.
        total: local steps of the whole run.
        warmup: local steps at the beginning in which the rate rises to its peak, before it falls.
    """
    if done < warmup:
        return (done + 1) / (warmup + 1)
    done, total = done - warmup, total - warmup
    if schedule == "linear":
        return 1 - done / total
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done / total)) / 2
    return 1.0
