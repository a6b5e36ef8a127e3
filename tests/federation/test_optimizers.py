"""Stacked optimizers against torch's own, client by client."""

import itertools

import pytest
import torch
from torch import nn

from fedsa_secure.federation.optimizers import (
    OptimizerSettings,
    OptimizerState,
    clip_factors,
    optimizer_step,
)
from fedsa_secure.federation.schedule import rate_factor

SHAPES = {"a": (3, 5), "b": (4,)}
RATES = {"a": 0.1, "b": 0.03}


def torch_optimizer(
    settings: OptimizerSettings, parameters: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    groups = [{"params": [p], "lr": RATES[name]} for name, p in parameters.items()]
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    return torch.optim.SGD(groups, lr=0.1, momentum=settings.momentum)


@pytest.mark.parametrize(
    "settings",
    [
        OptimizerSettings(kind="adamw", weight_decay=0.1, max_grad_norm=0.5),
        OptimizerSettings(kind="adamw"),
        OptimizerSettings(kind="sgd", momentum=0.9, max_grad_norm=0.5),
        OptimizerSettings(kind="sgd"),
    ],
    ids=lambda s: f"{s.kind}-momentum{s.momentum}-decay{s.weight_decay}-clip{s.max_grad_norm}",
)
def test_each_client_steps_as_with_torch(settings: OptimizerSettings) -> None:
    """Three clients, of which the second already has seven steps behind it."""
    stream = torch.Generator().manual_seed(0)
    before = (0, 7, 0)
    ends, moments, starts = [], [], []
    gradients = [
        {n: torch.randn(3, *s, generator=stream, dtype=torch.float64) for n, s in SHAPES.items()}
        for _ in range(max(before) + 5)
    ]
    for client, extra in enumerate(before):
        own = {n: nn.Parameter(torch.ones(s, dtype=torch.float64)) for n, s in SHAPES.items()}
        optimizer = torch_optimizer(settings, own)
        for step in [*range(5, 5 + extra), *range(5)]:
            if step == 0:  # here the stack takes over
                starts.append({n: p.detach().clone() for n, p in own.items()})
                moments.append({n: dict(optimizer.state[p]) for n, p in own.items()})
                moments[-1] = {
                    n: {k: v.clone() for k, v in kept.items() if torch.is_tensor(v)}
                    for n, kept in moments[-1].items()
                }
            for n, p in own.items():
                p.grad = gradients[step][n][client].clone()
            if settings.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(list(own.values()), settings.max_grad_norm)
            optimizer.step()
        ends.append(own)

    stacked = {n: nn.Parameter(torch.stack([s[n] for s in starts])) for n in SHAPES}
    names = {"adamw": {"m": "exp_avg", "v": "exp_avg_sq"}, "sgd": {"m": "momentum_buffer"}}
    state = OptimizerState(
        {
            f"{n}#{moment}": torch.stack(
                [
                    kept[n].get(names[settings.kind][moment], torch.zeros_like(starts[0][n]))
                    for kept in moments
                ]
            )
            for n in SHAPES
            for moment in settings.moments
        },
        torch.tensor(before, dtype=torch.float64),
    )
    for step in range(5):
        for n, p in stacked.items():
            p.grad = gradients[step][n].clone()
        optimizer_step(stacked, RATES, state, settings)
    for client in range(3):
        for n in SHAPES:
            torch.testing.assert_close(stacked[n][client], ends[client][n], rtol=1e-12, atol=1e-12)
    assert state.steps.tolist() == [5, 12, 5]


def test_clipping_bounds_each_client_by_itself() -> None:
    gradients = [torch.tensor([[3.0], [0.3]]), torch.tensor([[4.0], [0.4]])]
    factors = clip_factors(gradients, max_norm=1.0)
    torch.testing.assert_close(factors, torch.tensor([1 / 5.0, 1.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_starts_at_one_and_never_rises(schedule: str) -> None:
    factors = [rate_factor(schedule, done, 40) for done in range(41)]
    assert factors[0] == 1
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors))
    assert factors[-1] == pytest.approx(1 if schedule == "constant" else 0)
    assert factors[20] == pytest.approx(1 if schedule == "constant" else 0.5)
