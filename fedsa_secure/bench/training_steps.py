"""Tokens per second and memory of whole training steps: our adapters beside PEFT's.

The base models have random weights of real sizes in bfloat16; the adapters are in float32 and
products are made under autocast, as both libraries are used. With several clients ours go through
the base together and PEFT's one after the other, each with its own rows.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedsa_kernels.bench.timing import Step, Times, event, take_turns
from fedsa_kernels.dispatch import VARIABLE
from fedsa_kernels.launch import interpreted
from fedsa_kernels.tables import BACKENDS
from fedsa_secure.adapters import AdapterSettings, attach
from fedsa_secure.reporting.rows import Row
from fedsa_secure.types import Role

_RANK, _RATE = 16, 1e-4
_ROBERTA = {"max_position_embeddings": 514, "vocab_size": 50_265}
_LLAMA = {"num_hidden_layers": 1, "vocab_size": 1024, "max_position_embeddings": 4096}


@dataclass(frozen=True)
class Workload:
    """A model and its batch.

    Args:
        name: of the model.
        make: builds it, with random weights.
        targets: linear layers that are adapted.
        rows: of each client.
        tokens: of each row.
        clients: how many.
    """

    name: str
    make: Callable[[], PreTrainedModel]
    targets: tuple[str, ...]
    rows: int
    tokens: int
    clients: int = 1

    @property
    def size(self) -> int:
        """Tokens of a step."""
        return self.clients * self.rows * self.tokens

    def __str__(self) -> str:
        clients = "" if self.clients == 1 else f", {self.clients} clients"
        return f"{self.name}, B={self.rows}, T={self.tokens}{clients}"


def _roberta(**sizes: int) -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**{**_ROBERTA, **sizes}))


def _llama(**sizes: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_LLAMA, **sizes}))


_ATTENTION = ("query", "value")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LARGE = partial(
    _roberta,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
)
_BLOCK = partial(
    _llama,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
)
_TINY = partial(
    _roberta, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)

GPU = (
    Workload("RoBERTa large", _LARGE, _ATTENTION, rows=32, tokens=128),
    Workload("RoBERTa large", _LARGE, _ATTENTION, rows=4, tokens=128, clients=8),
    Workload("Llama 8B's block", _BLOCK, _PROJECTIONS, rows=4, tokens=2048),
    Workload("Llama 8B's block", _BLOCK, _PROJECTIONS, rows=1, tokens=1024, clients=8),
)
"""Random weights of real sizes."""

DRY = (
    Workload("a tiny RoBERTa", _TINY, _ATTENTION, rows=2, tokens=5),
    Workload("a tiny RoBERTa", _TINY, _ATTENTION, rows=2, tokens=5, clients=2),
)
"""For Triton's interpreter and for CPUs."""


def bench_training_steps(
    workloads: tuple[Workload, ...],
    device: torch.device,
    turns: int,
    report: Callable[[str], None],
) -> Iterator[list[Row]]:
    """Measure each workload by PEFT and by every backend of ours that runs here.

    Args:
        workloads: what is trained.
        device: where.
        turns: steps that are timed.
        report: told what comes next.

    Yields:
        Of one workload after the other: tokens per second, and on a GPU the most memory that was
        held, each beside PEFT's.
    """
    for workload in workloads:
        base, rows = None, []
        for name, make in _orders(device).items():
            report(f"{workload}: {name}")
            found = _measure(partial(make, workload, device), device, turns)
            base = base or found
            rows += _rows(workload, name, found, base)
        yield rows


@dataclass(frozen=True)
class _Found:
    """Times of a step, and bytes of a GPU's memory."""

    times: Times
    memory: int | None


def _measure(make: Callable[[], Step], device: torch.device, turns: int) -> _Found:
    """One order alone, so that the memory is its own."""
    gpu = device.type == "cuda"
    gc.collect()  # the model before may be part of a cycle
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about a model without a name
        step = make()
    for _ in range(3 if gpu else 1):
        step()
    if not gpu:
        return _Found(take_turns({"": [step]}, device, turns)[""], None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = Times.of([_seconds(step) for _ in range(turns)])
    memory = torch.cuda.max_memory_allocated()
    del step
    gc.collect()
    torch.cuda.empty_cache()
    return _Found(times, memory)


def _seconds(step: Step) -> float:
    begin, end = event(), event()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _rows(workload: Workload, name: str, found: _Found, base: _Found) -> list[Row]:
    def row(what: str, unit: str, value: float, other: float) -> Row:
        itself = found is base
        return Row(
            name=f"{workload}: {name}{what}",
            n=workload.clients,
            value=value,
            unit=unit,
            baseline=None if itself else f"{workload}: PEFT{what}",
            ratio_to_baseline=None if itself else value / other,
        )

    size = workload.size
    rows = [row("", "tokens/s", size / found.times.p50, size / base.times.p50)]
    if found.memory is not None and base.memory is not None:
        rows.append(row(", memory", "MiB", found.memory / 2**20, base.memory / 2**20))
    return rows


def _orders(device: torch.device) -> dict[str, Callable[[Workload, torch.device], Step]]:
    kernels = device.type == "cuda" or interpreted()
    names = ("auto", *BACKENDS) if kernels else ("reference",)
    return {"PEFT": _peft, **{name: partial(_ours, name) for name in names}}


class _Batch:
    """Random tokens of all clients, client-major."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        stream = torch.Generator().manual_seed(0)
        shape = (workload.clients * workload.rows, workload.tokens)
        self.ids = torch.randint(4, 1000, shape, generator=stream).to(device)
        self.mask = torch.ones_like(self.ids)
        starts = range(0, len(self.ids), workload.rows)
        self.segments = [slice(start, start + workload.rows) for start in starts]


def _loss(logits: Tensor) -> Tensor:
    """The mean over all predictions of a made-up target."""
    flat = logits.float().flatten(0, -2)
    return functional.cross_entropy(flat, torch.zeros_like(flat[:, 0], dtype=torch.int64))


def _base(workload: Workload, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return workload.make().to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def _ours(backend: str, workload: Workload, device: torch.device) -> Step:
    settings = AdapterSettings(rank=_RANK, alpha=2.0 * _RANK, target_modules=workload.targets)
    model = attach(_base(workload, device), settings, 0)
    model.half_precision = device.type == "cuda"
    model.load([{}] * workload.clients, (Role.A, Role.B))
    trained = model.parameters((Role.A, Role.B)).values()
    optimizer = torch.optim.AdamW(trained, lr=_RATE)
    batch = _Batch(workload, device)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}

    def step() -> None:
        with _backend(backend):
            (_loss(model(inputs)) * workload.clients).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peft(workload: Workload, device: torch.device) -> Step:
    config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=list(workload.targets))
    model = get_peft_model(_base(workload, device).eval(), config)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE)
    batch = _Batch(workload, device)

    def step() -> None:
        for rows in batch.segments:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=batch.ids[rows], attention_mask=batch.mask[rows]).logits
            _loss(logits).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    return step


@contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
