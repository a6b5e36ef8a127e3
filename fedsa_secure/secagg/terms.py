"""What all parties agree on beforehand, and the floors that follow. docs/protocol.md §2, §5."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import comb
from types import MappingProxyType
from typing import get_args

from fedsa_secure.csprng import MaskGenerator
from fedsa_secure.errors import ConfigError
from fedsa_secure.secagg.derivation import digest

COMPLETE = 100
"""Largest cohort in which everyone is everyone's neighbour."""
ROUNDS = 10_000
"""Most rounds of a run, where nobody says how many it has."""
OPENINGS = 64
"""Most sessions that a client opens in one run: each has circles of its own."""
_PRIVACY, _CORRECTNESS = 2**40, 2**20
_DROPPED = 0.1
_GENERATORS: tuple[MaskGenerator, ...] = get_args(MaskGenerator)


@dataclass(frozen=True)
class Thresholds:
    """The floors of a cohort. A client computes them itself and takes them from nobody.

    Args:
        clients: n, invited to a round.
        colluders: c.
        signatures: t, that close the survivor set.
        survivors: m, fewest clients in a sum.
        neighbours: k.
        shares: t_k, that rebuild a secret.

    Guarantee: 2t > n + c, m ≥ max(t, c + 2, 3), t ≤ n.
    """

    clients: int
    colluders: int
    signatures: int
    survivors: int
    neighbours: int
    shares: int

    @property
    def complete(self) -> bool:
        """Whether everyone is everyone's neighbour."""
        return self.neighbours == self.clients - 1

    @classmethod
    def of(
        cls,
        clients: int,
        colluders: int | None = None,
        signatures: int | None = None,
        survivors: int | None = None,
        rounds: int = ROUNDS,
    ) -> "Thresholds":
        """The floors of a cohort; what is None takes its default (docs/protocol.md §2).

        Args:
            clients: n.
            colluders: c.
            signatures: t.
            survivors: m.
            rounds: of the run; every round has a sparse graph of its own, and one may fail.

        Raises:
            ConfigError: if they would not protect anyone, or can never be reached.
        """
        if clients < 3:
            raise ConfigError(
                "secure_aggregation",
                f"it needs at least 3 clients in a round, and there are {clients}: with two, the "
                "sum minus one's own update is the other's",
                "add clients, raise participation, or give secure_aggregation=False",
            )
        c = max(1, (clients - 1) // 3) if colluders is None else colluders
        t = (clients + c) // 2 + 1 if signatures is None else signatures
        least = max(t, c + 2, 3)
        m = least if survivors is None else survivors
        if not 0 <= c <= clients - 2:
            raise ConfigError(
                "colluders", f"{c} of {clients} clients", f"give at most {clients - 2}"
            )
        if not clients + c < 2 * t <= 2 * clients:
            floor = (clients + c) // 2 + 1
            raise ConfigError(
                "threshold",
                f"{t} with {clients} clients, {c} of them colluding; 2·threshold has to be above "
                f"{clients + c}, and threshold at most {clients}",
                f"give at least {floor}" if floor <= clients else "assume fewer colluders",
            )
        if not least <= m <= clients:
            raise ConfigError(
                "min_survivors", f"{m}, but it has to lie between {least} and {clients}"
            )
        k, t_k = sparse_graph(clients, c, rounds) or (clients - 1, t)
        return cls(clients, c, t, m, k, t_k)


@functools.lru_cache(maxsize=64)
def sparse_graph(clients: int, colluders: int, rounds: int) -> tuple[int, int] | None:
    """(k, t_k) of the smallest sparse graph that is safe, or None for the complete one.

    Source: docs/protocol.md §5, where both conditions are derived.
    """
    if clients <= COMPLETE:
        return None
    dropped = int(_DROPPED * clients)
    for k in range(2, clients - 1, 2):
        t_k = _smallest_private(clients, colluders, k, rounds * OPENINGS)
        if t_k <= k + 1 and _is_correct(clients, dropped, k, t_k):
            return k, t_k
    return None


def _smallest_private(n: int, colluders: int, k: int, circles: int) -> int:
    """The smallest t_k for which a window of k/2 places rarely holds t_k − 1 − k/2 colluders."""
    half = k // 2
    ways, tail, corrupt = comb(n, half), 0, half + 1
    while tail * n * circles * _PRIVACY <= ways:  # windows of at least "corrupt" colluders
        corrupt -= 1
        tail += comb(colluders, corrupt) * comb(n - colluders, half - corrupt)
    return corrupt + 1 + 1 + half


def _is_correct(n: int, dropped: int, k: int, t_k: int) -> bool:
    """Whether of hardly any client fewer than t_k holders of its shares survive."""
    survivor = _ways_to_lose(n - 1, dropped, k, k + 2 - t_k)
    lost = _ways_to_lose(n - 1, dropped - 1, k, k + 1 - t_k)  # itself a holder, and gone
    expected = (n - dropped) * survivor + dropped * lost
    return expected * _CORRECTNESS <= comb(n - 1, k)


def _ways_to_lose(others: int, dropped: int, k: int, least: int) -> int:
    """Neighbourhoods of k of the others with at least so many of the dropped among them."""
    return sum(
        comb(dropped, gone) * comb(others - dropped, k - gone)
        for gone in range(least, min(k, dropped) + 1)
    )


@dataclass(frozen=True)
class Terms:
    """Everything public that has to be equal for all parties of a session.

    Args:
        roster: Ed25519 public key by client number.
        thresholds: the floors.
        size: values in a vector.
        rounds: of the run; a client knows no others.
        consistency: whether clients sign the survivors before they reveal (step 4).
        application: hash of whatever else has to be equal, 32 bytes.
        mask_generator: what all masks are made with.

    Raises:
        ConfigError: if there is no such generator.
    """

    roster: Mapping[int, bytes]
    thresholds: Thresholds
    size: int
    application: bytes
    consistency: bool = True
    rounds: int = ROUNDS
    mask_generator: MaskGenerator = "aes-256-ctr"
    hash: bytes = field(init=False)

    def __post_init__(self) -> None:
        if self.mask_generator not in _GENERATORS:
            known = ", ".join(map(repr, _GENERATORS))
            raise ConfigError("mask_generator", f"{self.mask_generator!r}; possible are {known}")
        object.__setattr__(self, "roster", MappingProxyType(dict(self.roster)))
        object.__setattr__(self, "hash", self._hash_with(self.mask_generator))

    def other(self, found: bytes) -> str:
        """How to call terms that have another hash: by the generator, if that is all."""
        for generator in _GENERATORS:
            if generator != self.mask_generator and found == self._hash_with(generator):
                return (
                    f"terms with mask_generator={generator!r}, and "
                    f"{self.mask_generator!r} is agreed on"
                )
        return "other terms"

    def _hash_with(self, generator: MaskGenerator) -> bytes:
        roster = [part for client in sorted(self.roster) for part in (client, self.roster[client])]
        floors = self.thresholds
        # The first generator is not named: its terms have the hash that they had before there was
        # a second one. Every part stands behind its length, so one part more is another hash.
        named = () if generator == "aes-256-ctr" else (generator.encode(),)
        return digest(
            "terms",
            digest("roster", *roster),
            floors.clients,
            floors.colluders,
            floors.signatures,
            floors.survivors,
            floors.neighbours,
            floors.shares,
            self.size,
            self.rounds,
            int(self.consistency),
            self.application,
            *named,
        )
