"""A whole federated run with the reference and with the kernels: the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedsa_secure
from fedsa_kernels.launch import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


def trained(folder: Path, model: Any, tokenizer: Any, data: Any, **options: Any) -> dict:
    """All adapters after two rounds of three clients, in stacks of three or one by one."""
    run = fedsa_secure.train(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        clients=3,
        rounds=2,
        local_steps=1,
        batch_size=2,
        max_length=16,
        rank=4,
        common_rows=0,
        cross_rows=0,
        secure_aggregation=False,
        output_dir=str(folder),
        **options,
    )
    files = sorted((run.path / "adapters").rglob("*.safetensors"))
    assert files
    return {
        f"{file.parent.name} {name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("backend", ["cublas", "fused"])
@pytest.mark.parametrize("adapter", ["lora", "vera"])
@pytest.mark.parametrize("per_pass", [3, 1])
def test_training_gives_the_same_adapters(
    adapter: str,
    backend: str,
    per_pass: int,
    tiny_bert: Any,
    tiny_tokenizer: Any,
    small_dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, found = small_dataset(rows=36), {}
    for name in ("reference", backend):
        monkeypatch.setenv("FEDSA_KERNELS", name)
        options = {"adapter": adapter, "clients_per_pass": per_pass}
        found[name] = trained(tmp_path / name, tiny_bert(), tiny_tokenizer, data, **options)
    assert found["reference"].keys() == found[backend].keys()
    for name, expected in found["reference"].items():
        torch.testing.assert_close(found[backend][name], expected, rtol=1e-4, atol=2e-6, msg=name)
