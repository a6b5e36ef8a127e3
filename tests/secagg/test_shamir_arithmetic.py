"""The short cuts of secret sharing against the textbook's formulas in exact fractions."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from fedsa_secure.secagg.shamir import PRIME, _evaluate, _weights_at_zero

element = st.integers(0, PRIME - 1) | st.sampled_from([0, 1, PRIME - 1])


@given(st.lists(element, min_size=1, max_size=40), st.integers(1, 2**32))
def test_a_share_is_the_polynomials_value(coefficients: list[int], point: int) -> None:
    powers = reversed(range(len(coefficients)))
    expected = sum(c * point**power for c, power in zip(coefficients, powers, strict=True)) % PRIME
    assert int.from_bytes(_evaluate(coefficients, point), "little") == expected


@given(st.sets(st.integers(0, 2**32 - 2), min_size=1, max_size=20).map(sorted))
def test_weights_are_lagranges(holders: list[int]) -> None:
    for holder, weight in zip(holders, _weights_at_zero(tuple(holders)), strict=True):
        exact = Fraction(1)
        for other in holders:
            if other != holder:
                exact *= Fraction(other + 1, other - holder)
        assert weight == exact.numerator * pow(exact.denominator, -1, PRIME) % PRIME
