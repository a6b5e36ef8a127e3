"""A step that is worked off in parts is the same step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

MakeFederation = Callable[..., Any]


@pytest.mark.parametrize("parts", [2, 5, 50])
def test_a_step_in_parts_is_the_same_step(federation: MakeFederation, parts: int) -> None:
    """Rows, dropout and weights of the rows stay; clients with few rows have filling ones."""
    made = federation(dtype=torch.float64, local_steps=2)
    passes: list[int] = []
    made.model.model.register_forward_hook(
        lambda _model, _inputs, out: passes.append(len(out.logits))
    )
    runs, counts = [], []
    for k in (1, parts):
        passes.clear()
        runs.append(made.simulate(f"parts-{k}", gradient_accumulation=k, rounds=2))
        counts.append(len(passes))
    whole, divided = runs
    steps = 2 * made.config.local_steps
    parts_of_a_step = len(torch.arange(made.config.batch_size).chunk(parts))
    assert counts[1] - counts[0] == steps * (parts_of_a_step - 1)
    for client in range(4):
        ours, theirs = divided.client_tensors(client), whole.client_tensors(client)
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, atol=1e-11, rtol=1e-11)
    assert [r.loss for r in divided.records] == pytest.approx([r.loss for r in whole.records])
