"""Secret sharing: any t shares give the secret, and t − 1 fit every secret."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsa_secure.errors import BadShare
from fedsa_secure.secagg.shamir import PRIME, new_secret, rebuild_secret, share_secret

HOLDERS = (0, 3, 4, 8, 200)
secrets_below_prime = st.integers(0, PRIME - 1).map(lambda value: value.to_bytes(32, "little"))


def polynomial_through(points: dict[int, int]) -> list[int]:
    """Coefficients, lowest first: Gauss's elimination on Vandermonde's matrix."""
    rows = [[pow(x, k, PRIME) for k in range(len(points))] + [y] for x, y in points.items()]
    for column in range(len(rows)):
        pivot = next(row for row in rows[column:] if row[column])
        rows[rows.index(pivot)], rows[column] = rows[column], pivot
        inverse = pow(pivot[column], -1, PRIME)
        rows[column] = [value * inverse % PRIME for value in pivot]
        for k, row in enumerate(rows):
            if k != column:
                rows[k] = [
                    (a - row[column] * b) % PRIME for a, b in zip(row, rows[column], strict=True)
                ]
    return [row[-1] for row in rows]


def values(shares: dict[int, bytes]) -> dict[int, int]:
    return {holder + 1: int.from_bytes(share, "little") for holder, share in shares.items()}


@given(secrets_below_prime, st.integers(1, len(HOLDERS)))
def test_any_t_shares_rebuild_the_secret(secret: bytes, threshold: int) -> None:
    shares = share_secret(secret, threshold, HOLDERS)
    for size in range(threshold, len(HOLDERS) + 1):
        for chosen in itertools.combinations(HOLDERS, size):
            assert rebuild_secret({h: shares[h] for h in chosen}, threshold) == secret


@given(secrets_below_prime, secrets_below_prime, st.integers(2, len(HOLDERS)))
def test_fewer_shares_fit_every_secret(secret: bytes, other: bytes, threshold: int) -> None:
    """One polynomial of the right degree leads from any secret through t − 1 shares."""
    shares = share_secret(secret, threshold, HOLDERS)
    few = dict(itertools.islice(shares.items(), threshold - 1))
    wanted = int.from_bytes(other, "little")
    coefficients = polynomial_through({0: wanted, **values(few)})
    assert coefficients[0] == wanted
    invented = {
        h: (sum(c * (h + 1) ** k for k, c in enumerate(coefficients)) % PRIME).to_bytes(
            32, "little"
        )
        for h in HOLDERS
    }
    assert few.items() <= invented.items()
    assert rebuild_secret(invented, threshold) == other


def test_shares_lie_on_a_polynomial_of_degree_t_minus_1_and_no_lower_one() -> None:
    secret = new_secret()
    shares = share_secret(secret, 3, HOLDERS)
    low, *higher = polynomial_through(values(shares))
    assert low == int.from_bytes(secret, "little")
    assert higher[0] > 0  # false alarm: 2⁻²⁵⁵
    assert higher[1] > 0
    assert higher[2:] == [0, 0]


def test_sharing_twice_gives_other_shares() -> None:
    secret = new_secret()
    one, other = (share_secret(secret, 2, HOLDERS) for _ in range(2))
    assert not one.items() & other.items()


def test_only_the_smallest_holders_shares_are_used() -> None:
    secret = new_secret()
    shares = share_secret(secret, 3, HOLDERS)
    assert rebuild_secret({**shares, 8: bytes(32), 200: bytes(32)}, 3) == secret
    assert rebuild_secret({**shares, 0: bytes(32)}, 3) != secret


@pytest.mark.parametrize(
    "share", [PRIME.to_bytes(32, "little"), b"\xff" * 32, bytes(31), bytes(33), b""]
)
def test_what_is_no_element_of_the_field_is_refused(share: bytes) -> None:
    shares = share_secret(new_secret(), 2, HOLDERS)
    with pytest.raises(BadShare, match="no element"):
        rebuild_secret({**shares, 0: share}, 2)
    with pytest.raises(BadShare, match="no element"):
        share_secret(share, 2, HOLDERS)


def test_new_secrets_are_elements_of_the_field() -> None:
    found = {new_secret() for _ in range(1000)}
    assert len(found) == 1000
    assert all(len(each) == 32 and int.from_bytes(each, "little") < PRIME for each in found)
