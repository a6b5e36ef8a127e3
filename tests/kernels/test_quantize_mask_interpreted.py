"""Fixed point and masks as a kernel, run by Triton's interpreter: the words of the host."""

import math

import pytest
import torch
from fixed_point_host import COINS, STREAMS, awkward_values, host_words, words_of
from torch import Tensor

from fedsa_kernels.launch import interpreted
from fedsa_kernels.quantize_mask import _pack, reference, triton
from fedsa_secure.secagg import FixedPoint

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

MASKS = b"masks".ljust(32, b".")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel leaves out does not look like a word by accident."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def empty(*sizes, plain=plain, **options):
            return plain(*sizes, **options).fill_(0x5EED)

        monkeypatch.setattr(torch, name, empty)


def operands(
    grid: FixedPoint, values: Tensor, factor: float, masked: bool, keys: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    count = len(values)
    numbers = torch.tensor([factor, 1.0 / grid.step, grid.levels], dtype=torch.float64)
    masks = words_of(MASKS, count) if masked else None
    return values, numbers, words_of(COINS, count), masks, _pack(STREAMS[:keys], count)


@pytest.mark.parametrize(
    ("count", "dtype", "clients", "factor", "masked", "keys"),
    [
        (0, torch.float32, 3, 1.0, True, 1),
        (1, torch.float32, 3, 1.0, False, 1),
        (33, torch.float64, 10, 1 / 3, True, 0),
        (100, torch.float32, 1, 1.0, False, 0),
        (127, torch.float32, 1000, 17 / 30, True, 3),
        (2049, torch.float32, 10, 1 / 3, False, 2),
        (4099, torch.float64, 10, 0.7, True, 3),
    ],
)
def test_words_are_those_of_the_host(
    count: int, dtype: torch.dtype, clients: int, factor: float, masked: bool, keys: int
):
    grid = FixedPoint(clients, 0.3)
    values = awkward_values(grid, count, dtype)
    masks = MASKS if masked else None
    expected, clipped = host_words(grid, values, masks, STREAMS[:keys], factor)
    words, counts = triton.quantize_mask(*operands(grid, values, factor, masked, keys))
    assert torch.equal(words, expected)
    assert counts.tolist() == [clipped, 0]


@pytest.mark.parametrize("bound", [1e-30, 1e30])
def test_words_are_those_of_the_host_on_the_smallest_and_the_largest_grid(bound: float):
    grid = FixedPoint(5, bound)
    values = awkward_values(grid, 100, torch.float64)
    expected, clipped = host_words(grid, values)
    words, counts = triton.quantize_mask(*operands(grid, values, 1.0, False, 0))
    assert torch.equal(words, expected)
    assert counts.tolist() == [clipped, 0]


def test_what_is_not_finite_is_counted():
    grid = FixedPoint(3, 1.0)
    values = torch.zeros(2100)
    values[[0, 70, 2049, 2099]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    values[1] = 9.0
    given = operands(grid, values, 1.0, False, 1)
    words, counts = triton.quantize_mask(*given)
    expected = reference.quantize_mask(*given)
    assert counts.tolist() == expected[1].tolist() == [1, 4]
    assert torch.equal(words, expected[0])


def test_two_runs_agree():
    grid = FixedPoint(10, 0.3)
    given = operands(grid, awkward_values(grid, 2500, torch.float32), 0.7, True, 2)
    first, second = (triton.quantize_mask(*given) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
