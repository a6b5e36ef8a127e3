"""Fixed point and masks in plain torch: the words of the host, and what is refused."""

import math

import numpy as np
import pytest
import torch
from fixed_point_host import COINS, STREAMS, awkward_values, host_words, words_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsa_kernels import quantize_mask
from fedsa_kernels.quantize_mask import reference
from fedsa_secure.csprng import Keystream
from fedsa_secure.secagg import FixedPoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 17 / 30])
@pytest.mark.parametrize("count", [0, 1, 33, 5000])
def test_words_are_those_of_the_host(count: int, factor: float, dtype: torch.dtype):
    grid = FixedPoint(10, 0.3)
    values = awkward_values(grid, count, dtype)
    masks = b"masks".ljust(32, b".")
    expected, clipped = host_words(grid, values, masks, STREAMS, factor)
    found, beyond = quantize_mask(
        values,
        grid.step,
        grid.levels,
        words_of(COINS, count),
        words_of(masks, count),
        streams=STREAMS,
        factor=factor,
    )
    assert torch.equal(found, expected)
    assert beyond == clipped
    assert (beyond > 0) == (count > 1)


@settings(max_examples=60)
@given(
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=12),
    clients=st.integers(2, 2**20),
    bound=st.floats(1e-30, 1e30),
    factor=st.floats(0.0, 1.0),
)
def test_any_values_are_rounded_as_by_the_host(
    numbers: list[float], clients: int, bound: float, factor: float
):
    grid = FixedPoint(clients, bound)
    values = torch.tensor(numbers, dtype=torch.float64)
    expected = host_words(grid, values, factor=factor)
    coins = words_of(COINS, len(numbers))
    found = quantize_mask(values, grid.step, grid.levels, coins, factor=factor)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


def test_a_stream_added_and_taken_away_is_no_mask():
    values = torch.linspace(-1, 1, 100)
    grid, coins = FixedPoint(3, 1.0), words_of(COINS, 100)
    plain = quantize_mask(values, grid.step, grid.levels, coins)
    key = b"k" * 32
    masked = quantize_mask(values, grid.step, grid.levels, coins, streams=[(key, True)])
    assert int((masked[0] == plain[0]).sum()) < 3
    both = quantize_mask(values, grid.step, grid.levels, coins, streams=[(key, True), (key, False)])
    assert torch.equal(both[0], plain[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_as_by_the_host(bad: float):
    values = torch.zeros(40)
    values[[3, 39]] = bad
    grid = FixedPoint(3, 1.0)
    with pytest.raises(ValueError, match="not finite"):
        grid.encode(values.numpy(), Keystream(COINS), np.zeros(40, np.uint32))
    with pytest.raises(ValueError, match="2 of the values to be encoded are not finite"):
        quantize_mask(values, grid.step, grid.levels, words_of(COINS, 40), streams=STREAMS)


def test_a_product_that_overflows_is_refused_as_by_the_host():
    values = torch.full((5,), 1e300, dtype=torch.float64)
    grid = FixedPoint(3, 1.0)
    with pytest.raises(ValueError, match="not finite"), np.errstate(over="ignore"):
        grid.encode(values.numpy(), Keystream(COINS), np.zeros(5, np.uint32), 1e10)
    with pytest.raises(ValueError, match="5 of the values"):
        quantize_mask(values, grid.step, grid.levels, words_of(COINS, 5), factor=1e10)


@pytest.mark.usefixtures("_without_type_checks")
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"step": 0.3}, "power of two"),
        ({"step": 0.0}, "power of two"),
        ({"step": -0.5}, "power of two"),
        ({"step": math.nan}, "power of two"),
        ({"step": 2.0**-1050}, "power of two"),
        ({"levels": 0}, "32 bits"),
        ({"levels": 2**31}, "32 bits"),
        ({"levels": 100.5}, "32 bits"),
        ({"coins": torch.zeros(9, dtype=torch.int32)[::2]}, "contiguous"),
        ({"coins": torch.zeros(5, dtype=torch.int64)}, "int32, not torch.int64"),
        ({"masks": torch.zeros(5, dtype=torch.int8)}, "int32, not torch.int8"),
        ({"values": torch.zeros(5, dtype=torch.float16)}, "float32 or float64"),
        ({"levels": True}, "32 bits"),
        ({"streams": [(bytes(31), True)]}, "32 bytes"),
        ({"streams": [(bytes(32), -1)]}, "True or False, not -1"),
    ],
)
def test_other_operands_are_refused(changes: dict, match: str):
    operands = {
        "values": torch.zeros(5),
        "step": 0.5,
        "levels": 3,
        "coins": torch.zeros(5, dtype=torch.int32),
        **changes,
    }
    with pytest.raises(ValueError, match=match):
        quantize_mask(**operands)


def test_keys_are_erased_even_if_a_value_is_refused(monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.Tensor] = []
    plain = reference.quantize_mask

    def kept(*operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert operands[-1][:, :8].count_nonzero() > 0
        seen.append(operands[-1])
        return plain(*operands)

    monkeypatch.setattr(reference, "quantize_mask", kept)
    for value in (0.0, math.nan):
        values = torch.full((20,), value)
        try:
            quantize_mask(values, 0.5, 3, words_of(COINS, 20), streams=STREAMS)
        except ValueError:
            assert value != 0.0
    assert [int(each.count_nonzero()) for each in seen] == [0, 0]
