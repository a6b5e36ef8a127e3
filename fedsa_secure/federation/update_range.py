"""How far a round can move a shared value, from public values alone. docs/protocol.md §10."""

import math

import numpy as np

from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import ConfigError
from fedsa_secure.federation.optimizers import BETA_1, BETA_2, OptimizerSettings

_ROUNDING = 2.0**-23


def update_range(
    config: TrainConfig, settings: OptimizerSettings, rates: list[float], largest: float
) -> float:
    """A bound on the magnitude of every value of every client's update.

    A step of rate η moves a value by at most η·u, where u is ``largest_step``, and weight decay by
    η·λ times the value, which itself is at most ``largest`` plus the bound. No update can lie
    beyond it, whatever the data, so nothing is clipped.

    Args:
        config: ``update_range`` there takes precedence.
        settings: the optimizer.
        rates: learning rate of the shared tensors at each local step of the round.
        largest: magnitude of the largest public shared value at the start of the round.

    Raises:
        ConfigError: if the optimizer sets no bound and none is given.
    """
    if config.update_range is not None:
        return config.update_range
    step = largest_step(settings, config.rounds * config.local_steps)
    moved, decayed = sum(rates) * step, sum(rates) * settings.weight_decay
    if decayed >= 1:
        raise ConfigError(
            "update_range",
            f"weight_decay={settings.weight_decay:g} times the learning rates of a round is "
            f"{decayed:.3g}, and the bound on an update needs it below 1",
            "take a smaller weight_decay, or give update_range, the largest change of a value in "
            "a round",
        )
    if math.isinf(step):
        raise ConfigError(
            "update_range",
            "nothing bounds the updates of this optimizer",
            "set max_grad_norm, or give update_range, the largest change of a value in a round",
        )
    bound = (moved + decayed * largest) / (1 - decayed)
    # The tensors are float32, so every step may round by half a unit in the last place.
    return 1.001 * bound + len(rates) * _ROUNDING * (largest + bound)


def largest_step(settings: OptimizerSettings, steps: int) -> float:
    """How far one step of rate 1 can move a value; infinite if nothing bounds it.

    AdamW: by the Cauchy-Schwarz inequality |m| ≤ (1 − β₁) √(Σ(β₁²/β₂)ʲ · Σβ₂ʲg²), and the last sum
    is v / (1 − β₂). With the corrections of the k-th step that gives the expression below.

    Args:
        settings: the optimizer.
        steps: most steps that a client takes in the run.
    """
    if settings.kind == "adamw":
        k = np.arange(1, steps + 1)
        ratio = BETA_1**2 / BETA_2
        spread = np.sqrt((1 - ratio**k) / (1 - ratio) * (1 - BETA_2**k) / (1 - BETA_2))
        return float(np.max((1 - BETA_1) / (1 - BETA_1**k) * spread))
    if settings.max_grad_norm is None:
        return math.inf
    return settings.max_grad_norm / (1 - settings.momentum)
