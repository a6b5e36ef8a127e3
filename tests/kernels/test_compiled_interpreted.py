"""Adapted models with Triton kernels: compiled, checkpointed, and in half precision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedsa_kernels import row_keys
from fedsa_kernels.launch import interpreted
from fedsa_secure.adapters import AdapterSettings, attach
from fedsa_secure.types import Role

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

SCRIPT = Path(__file__).parents[1] / "compiled_models.py"
ONE = ["bert-vera-bf16"]
ALL = [
    f"{family}-{kind}-{variant}"
    for family in ("bert", "llama")
    for kind in ("lora", "vera")
    for variant in ("fp32", "bf16", "checkpointed")
]
TRAINED = {Role.A, Role.B}


@pytest.mark.parametrize(
    ("backend", "models"),
    [
        pytest.param("fused", ONE, id="fused-one"),
        pytest.param("cublas", ALL, marks=pytest.mark.slow, id="cublas-all"),
        pytest.param("fused", ALL, marks=pytest.mark.slow, id="fused-all"),
    ],
)
def test_a_compiled_model_is_one_graph_and_the_same_model(backend: str, models: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *models],
        env={**os.environ, "FEDSA_KERNELS": backend},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{model} 1" for model in models]


@pytest.mark.parametrize("backend", ["cublas", "fused"])
@pytest.mark.parametrize("kind", ["lora", "vera"])
@pytest.mark.parametrize("by", ["ours", "transformers"])
def test_a_checkpointed_model_gives_the_same_gradients(kind, by, backend, tiny_bert, monkeypatch):
    """Bit for bit: what is computed again draws the same dropout."""
    monkeypatch.setenv("FEDSA_KERNELS", backend)
    ids = torch.randint(4, 200, (4, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for on in (False, True):
        model = attach(tiny_bert(), AdapterSettings(kind=kind, rank=3, dropout=0.3), seed=0)
        model.load([{n: s + 0.1 for n, s in model.initial.items()}] * 2, TRAINED)
        if by == "transformers":  # whose switch acts in training mode alone
            for module in model.model.train().modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        if on and by == "ours":
            model.checkpoint_gradients()
        elif on:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        logits = model(inputs, row_keys(torch.tensor([1, 2]), 2).flatten())
        parameters = list(model.parameters(TRAINED).values())
        found.append([logits, *torch.autograd.grad(logits.square().sum(), parameters)])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)
