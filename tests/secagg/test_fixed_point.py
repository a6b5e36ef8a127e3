"""Rule 6: fixed point neither overflows nor leans to a side, and says what it clipped."""

import hmac
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsa_secure.csprng import BLOCK, Keystream
from fedsa_secure.secagg import FixedPoint, integer_cap, rounding_key
from fedsa_secure.secagg.fixed_point import bits_per_value


def encoded(grid: FixedPoint, values: np.ndarray, key: int = 0) -> tuple[np.ndarray, int]:
    out = np.empty(len(values), np.uint32)
    clipped = grid.encode(values, Keystream(key.to_bytes(32, "big")), out)
    return out, clipped


def test_no_sum_of_n_values_wraps() -> None:
    for n in range(1, 2001):
        q = bits_per_value(n)
        assert n * (2**q - 1) < 2**32
        assert q == 32 or n * (2 ** (q + 1) - 1) >= 2**32
        grid = FixedPoint(n, 1.0)
        assert 2 * grid.levels < 2**q
        assert n * 2 * grid.levels < 2**32
        assert n * integer_cap(n) < 2**32 <= n * (integer_cap(n) + 1)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 2000])
def test_sums_of_extreme_values_are_exact(n: int) -> None:
    grid = FixedPoint(n, 3.0)
    largest = grid.levels * grid.step
    for value in (largest, -largest):
        vector, _ = encoded(grid, np.array([value]))
        total = np.uint32(0)
        for _ in range(n):
            total = total + vector
        assert grid.decode(total, n).tolist() == [n * value]


@given(st.integers(1, 3000), st.floats(1e-30, 1e30))
def test_the_step_is_the_smallest_power_of_two_that_reaches_the_range(n: int, reach: float) -> None:
    grid = FixedPoint(n, reach)
    assert math.frexp(grid.step)[0] == 0.5
    assert grid.levels * grid.step / 2 < reach <= grid.levels * grid.step


@pytest.mark.parametrize("exponent", [-40, -3, 0, 5])
def test_a_range_right_at_and_right_above_a_power_of_two(exponent: int) -> None:
    levels = FixedPoint(3, 1.0).levels
    reach = levels * 2.0**exponent
    assert FixedPoint(3, reach).step == 2.0**exponent
    assert FixedPoint(3, math.nextafter(reach, math.inf)).step == 2.0 ** (exponent + 1)


@pytest.mark.parametrize("reach", [0.0, -1.0, math.inf, math.nan])
def test_a_range_that_is_none_is_refused(reach: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        FixedPoint(3, reach)


def test_so_many_clients_that_no_grid_is_left_are_refused() -> None:
    assert FixedPoint(2**30, 1.0).levels == 1
    with pytest.raises(ValueError, match="leaves no grid"):
        FixedPoint(2**31, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, BLOCK + 2])
def test_values_that_are_not_finite_are_refused(bad: float, place: int) -> None:
    values = np.zeros(BLOCK + 3)
    values[place] = bad
    with pytest.raises(ValueError, match="not finite"):
        encoded(FixedPoint(3, 1.0), values)


def test_values_beyond_the_range_are_clipped_and_counted() -> None:
    grid = FixedPoint(3, 1.0)
    largest = grid.levels * grid.step
    values = np.zeros(BLOCK + 5, np.float32)
    values[[0, 7, BLOCK, BLOCK + 1]] = (5.0, -1e30, 1e30, -5.0)
    vector, clipped = encoded(grid, values)
    assert clipped == 4
    decoded = grid.decode(vector, 1)
    assert decoded[[0, 7, BLOCK, BLOCK + 1]].tolist() == [largest, -largest, largest, -largest]
    assert np.count_nonzero(decoded) == 4
    assert encoded(grid, np.array([largest, -largest]))[1] == 0


@given(st.integers(1, 100), st.integers(0, 2**32))
def test_zero_and_every_point_of_the_grid_are_exact(n: int, key: int) -> None:
    grid = FixedPoint(n, 1.0)
    points = np.array([0, -0.0, 1, -1, grid.levels, -grid.levels]) * grid.step
    assert grid.decode(encoded(grid, points, key)[0], 1).tolist() == points.tolist()


@given(
    st.lists(
        st.lists(st.floats(-1.0, 1.0, width=32), min_size=4, max_size=4), min_size=1, max_size=6
    ),
    st.integers(0, 2**32),
)
def test_the_decoded_mean_is_within_one_step(rows: list[list[float]], key: int) -> None:
    vectors, n = np.array(rows), len(rows)
    grid, total = FixedPoint(n, 1.0), np.zeros(4, np.uint32)
    for row, values in enumerate(vectors):
        vector, clipped = encoded(grid, values, key + row)
        assert clipped == 0
        total += vector
    error = np.abs(grid.decode(total, n) / n - vectors.mean(0))
    assert np.all(error <= grid.step * (1 + 1e-9))


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.999, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_unbiased(fraction: float, sign: int) -> None:
    """The number of coins that come up is binomial: six standard deviations, one in 5·10⁸."""
    grid, draws = FixedPoint(2**20, 1.0), 200_000
    values = np.full(draws, sign * (7 + fraction) * grid.step)
    decoded = grid.decode(encoded(grid, values, key=1)[0], 1) / grid.step
    found = abs(decoded.mean())
    assert abs(found - (7 + fraction)) < 6 * math.sqrt(fraction * (1 - fraction) / draws)
    assert set(np.abs(decoded).tolist()) == {7.0, 8.0}


def test_a_value_a_hair_below_zero_is_not_pushed_down_a_step() -> None:
    grid = FixedPoint(3, 1.0)
    assert grid.decode(encoded(grid, np.full(1000, -1e-300))[0], 1).tolist() == [0.0] * 1000


def test_the_grid_ends_at_its_last_step() -> None:
    """Half a step beyond it a value is clipped already, and counted."""
    grid = FixedPoint(3, 1.0)
    beyond = (grid.levels + 0.5) * grid.step
    vector, clipped = encoded(grid, np.array([beyond, -beyond] * 50))
    assert clipped == 100
    assert vector.tolist() == [2 * grid.levels, 0] * 50


def test_rounding_is_that_of_the_protocol_page() -> None:
    """L + ⌊x/s⌋ + [coin < frac(x/s)·2³²], in Python's integers."""
    from fractions import Fraction

    from test_masks import reference_stream

    grid = FixedPoint(5, 0.3)
    values = np.random.default_rng(3).uniform(-0.3, 0.3, 500).astype(np.float32)
    coins, expected = reference_stream(bytes(32), 500).tolist(), []
    for value, coin in zip(values.tolist(), coins, strict=True):
        scaled = Fraction(value) / Fraction(grid.step)
        floor = math.floor(scaled)
        expected.append(grid.levels + floor + (coin < (scaled - floor) * 2**32))
    assert encoded(grid, values)[0].tolist() == expected


def test_every_client_and_every_round_has_coins_of_its_own() -> None:
    """Equal coins would make errors of rounding add up over clients."""
    keys = {rounding_key(*given) for given in itertools.product((0, 1), (0, 1, 2), (1, 2, 3))}
    assert len(keys) == 18
    framed = [
        b"fedsa-secagg/1 rounding coins",
        (7).to_bytes(8, "little"),
        (3).to_bytes(8, "little"),
    ]
    info = b"".join(len(part).to_bytes(8, "little") + part for part in framed)
    first = hmac.digest(bytes(32), (5).to_bytes(8, "little"), "sha256")
    assert rounding_key(5, 7, 3) == hmac.digest(first, info + b"\x01", "sha256")
