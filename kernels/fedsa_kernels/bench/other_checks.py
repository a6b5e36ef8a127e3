"""Whether what is not timed is right on this device: dropout, clipped gradients, masked words."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsa_kernels.bench.checks import Check, compared, with_tf32
from fedsa_kernels.bench.inputs import SCALING, Inputs, draw
from fedsa_kernels.bench.shapes import Shape
from fedsa_kernels.chacha20 import chacha20_words
from fedsa_kernels.clipped_grad import clipped_sum, sample_grad_with_norms
from fedsa_kernels.launch import Launch, interpreted
from fedsa_kernels.lora_linear import lora_linear
from fedsa_kernels.quantize_mask import quantize_mask
from fedsa_kernels.vera_linear import vera_linear

DROP = 0.1
DROPPING = (
    Shape(192, 320, 130, 8, dtype="float32"),
    Shape(768, 776, 1032, 16, clients=8),
    Shape(264, 136, 390, 33, clients=3, op="vera_linear", dtype="float16"),
)
RECORDS = (
    Shape(768, 768, 24 * 4, 16, clients=4, op="clipped_grad", dtype="float32"),
    Shape(200, 130, 6 * 40, 8, clients=2, op="clipped_grad", dtype="float32"),
    Shape(768, 768, 6 * 128, 16, op="clipped_grad"),
)
"""Six records of each client, of few tokens and of many."""
DRY = (
    Shape(48, 32, 36, 4, clients=3, dtype="float32"),
    Shape(48, 32, 40, 20, op="vera_linear", dtype="float32"),
    Shape(40, 40, 6 * 2, 4, op="clipped_grad", dtype="float32"),
    Shape(40, 40, 12 * 9, 4, clients=2, op="clipped_grad", dtype="float32"),
)
"""For Triton's interpreter."""
_OWN = 6
WORDS = Shape(1, 1, 5000, 1, op="quantize_mask", dtype="float32")


@dataclass(frozen=True)
class _Task:
    """A step of a kernel, and what it should make."""

    shape: Shape
    order: str
    run: Callable[[], list[Tensor]]
    expected: Callable[[], list[Tensor]]


def check_others(device: torch.device, seed: int) -> Iterator[Check]:
    """Kernels beside the ops that are timed, against float64 or the same words.

    Args:
        device: what is checked; in the interpreter words are left out, whose kernels run where
            their operands are.
        seed: of the numbers.
    """
    with with_tf32(False):
        for task in _tasks(device, seed):
            yield compared(task.shape, task.order, task.shape.dtype, task.run, task.expected())
    if device.type == "cuda":
        masked, expected = _masked(device, seed), _masked(torch.device("cpu"), seed)
        yield compared(WORDS, "kernel", "words", masked, [each.double() for each in expected()])


def launches_for_others(device: torch.device, seed: int) -> Iterator[Launch]:
    """All that ``check_others`` launches, but for words."""
    from fedsa_kernels.bench.compiling import launches_of  # not every machine has Triton

    with with_tf32(False):
        for task in _tasks(device, seed):
            yield from launches_of(task.run)


def _tasks(device: torch.device, seed: int) -> Iterator[_Task]:
    for shape in DRY if interpreted() else (*DROPPING, *RECORDS):
        if shape.op == "clipped_grad":
            run, right = (_clipped(shape, device, seed, name) for name in ("triton", "reference"))
            yield _Task(shape, "kernel", run, right)
            continue
        inputs = draw(shape, device, seed)
        stream = torch.Generator(device).manual_seed(seed)
        words = (-(2**31), 2**31, (shape.rows,))
        keys = torch.randint(*words, generator=stream, dtype=torch.int32, device=device)
        right = _dropping(inputs.double(), keys, "reference")
        for backend in ("cublas", "fused"):
            run = _dropping(inputs, keys, backend)
            yield _Task(shape, f"{backend} with dropout", run, right)


def _dropping(inputs: Inputs, keys: Tensor, backend: str) -> Callable[[], list[Tensor]]:
    x, weight, bias, A, B = inputs.x, inputs.weight, inputs.bias, inputs.A, inputs.B
    options: dict[str, Any] = {"dropout": DROP, "keys": keys, "backend": backend}

    def run() -> list[Tensor]:
        if inputs.d is None or inputs.b is None:
            y = lora_linear(x, weight, bias, A, B, SCALING, **options)
        else:
            y = vera_linear(x, weight, bias, A, B, inputs.d, inputs.b, **options)
        return [y.detach(), *torch.autograd.grad(y, inputs.trained, inputs.dy)]

    return run


def _clipped(
    shape: Shape, device: torch.device, seed: int, backend: str
) -> Callable[[], list[Tensor]]:
    """Norms and the clipped sum of gradients [rank, d_in]; the reference's in float64."""
    stream = torch.Generator(device).manual_seed(seed)
    records = _OWN * shape.clients
    tokens = shape.rows // records
    sizes = (records, tokens, shape.rank), (records, tokens, shape.d_in)
    left, right = (
        torch.randn(each, generator=stream, device=device).to(shape.torch_dtype) for each in sizes
    )
    factors = torch.rand(shape.clients, _OWN, generator=stream, device=device)
    if backend == "reference":
        left, right, factors = left.double(), right.double(), factors.double()

    def run() -> list[Tensor]:
        found, squares = sample_grad_with_norms(left, right, backend=backend)
        parameter = (shape.rank, shape.d_in)
        return [squares, clipped_sum(found, factors, parameter, backend=backend)]

    return run


def _masked(device: torch.device, seed: int) -> Callable[[], list[Tensor]]:
    """Masked words, how many values were cut off, and words of a stream: the same everywhere."""
    stream = torch.Generator().manual_seed(seed)
    values = torch.randn(WORDS.rows, generator=stream).to(device)
    coins = torch.randint(-(2**31), 2**31, (WORDS.rows,), generator=stream, dtype=torch.int32)
    key, keys = bytes(range(32)), [(bytes(range(32)), True), (bytes(range(1, 33)), False)]
    there = coins.to(device)

    def run() -> list[Tensor]:
        words, beyond = quantize_mask(
            values, 2.0**-10, 2**11, there, there.flip(0), streams=keys, factor=1.5
        )
        stream_words = chacha20_words(key, bytes(12), 7, WORDS.rows, device)
        return [words.cpu(), torch.tensor([beyond]), stream_words.cpu()]

    return run
