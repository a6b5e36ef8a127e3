"""No optimizer can leave the range that is derived for it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsa_secure import ConfigError, TrainConfig
from fedsa_secure.federation.optimizers import (
    OptimizerSettings,
    OptimizerState,
    optimizer_step,
)
from fedsa_secure.federation.update_range import largest_step, update_range

SETTINGS = [
    OptimizerSettings(kind="adamw"),
    OptimizerSettings(kind="adamw", weight_decay=0.1, max_grad_norm=1.0),
    OptimizerSettings(kind="sgd", max_grad_norm=0.7),
    OptimizerSettings(kind="sgd", max_grad_norm=0.7, momentum=0.9, weight_decay=0.05),
]
STEPS = 30


def moved(settings: OptimizerSettings, gradients: np.ndarray, start: float, rate: float) -> float:
    """How far some steps move one value. gradients: [step]"""
    parameter = nn.Parameter(torch.full((1, 1), start))
    state = OptimizerState(
        {f"x#{moment}": torch.zeros(1, 1) for moment in settings.moments},
        torch.zeros(1, dtype=torch.float64),
    )
    for gradient in gradients:
        parameter.grad = torch.tensor([[gradient]], dtype=torch.float32)
        optimizer_step({"x": parameter}, {"x": rate}, state, settings)
    return abs(float(parameter.detach()[0, 0]) - start)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.momentum}")
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=STEPS, max_size=STEPS),
    st.floats(1e-6, 0.1),
    st.floats(-3, 3, width=32),
)
def test_no_gradients_move_a_value_beyond_the_range(
    settings: OptimizerSettings, gradients: list[float], rate: float, start: float
) -> None:
    config = TrainConfig.build(rounds=1, local_steps=STEPS)
    bound = update_range(config, settings, [rate] * STEPS, abs(start))
    assert moved(settings, np.array(gradients), start, rate) <= bound


def test_the_range_has_room_for_the_rounding_of_every_step() -> None:
    """Each step here is 2.9 units of float32 and becomes 3."""
    settings, rate = OptimizerSettings(kind="sgd", max_grad_norm=0.7), 1e-6
    config = TrainConfig.build(rounds=1, local_steps=STEPS)
    found = moved(settings, np.ones(STEPS), 3.0, rate)
    assert found > 1.01 * STEPS * 0.7 * rate
    assert found <= update_range(config, settings, [rate] * STEPS, 3.0)


def test_the_bound_of_adam_is_the_best_possible_for_one_step() -> None:
    """Gradients that grow as the proof asks for come close to it."""
    settings = OptimizerSettings(kind="adamw")
    assert largest_step(settings, 1) == pytest.approx(1.0)
    steps = 4000
    ratio = 0.9 / 0.999  # equality in the Cauchy-Schwarz inequality
    gradients = ratio ** np.arange(steps, 0, -1.0)[-400:] * 1e3
    gradients = np.concatenate([np.zeros(steps - 400), gradients])
    last = moved(settings, gradients, 0.0, 1.0) - moved(settings, gradients[:-1], 0.0, 1.0)
    assert last == pytest.approx(largest_step(settings, steps), rel=0.02)
    assert last > 7


def test_without_clipping_sgd_has_no_bound() -> None:
    settings = OptimizerSettings(kind="sgd")
    assert math.isinf(largest_step(settings, 10))
    with pytest.raises(ConfigError, match="update_range: nothing bounds"):
        update_range(TrainConfig.build(), settings, [0.1], 1.0)
    given = TrainConfig.build(update_range=0.5)
    assert update_range(given, settings, [0.1], 1.0) == 0.5
