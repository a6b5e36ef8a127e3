"""Where a client stands in an attempt: one class per step, each with what later steps need.

docs/protocol.md §8. The own mask key and seed are gone once the vector is masked. Nothing here
shows a secret.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from fedsa_secure.secagg.identity import Identity
from fedsa_secure.secagg.masks import Mask
from fedsa_secure.secagg.terms import Terms


@dataclass(frozen=True)
class Party:
    """Who a client is.

    Args:
        terms: what all agreed on.
        client: its number.
        identity: its long-term key.
    """

    terms: Terms
    client: int
    identity: Identity = field(repr=False)


class _State(msgspec.Struct, frozen=True, tag=True):
    """Shows where it stands and no secret."""

    sid: bytes
    round: int
    attempt: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}(round={self.round}, attempt={self.attempt})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """For rich, which msgspec would show every field."""
        return [("round", self.round), ("attempt", self.attempt)]

    @property
    def step(self) -> tuple[bytes, int, int]:
        """Session, round and attempt."""
        return self.sid, self.round, self.attempt


class Peer(msgspec.Struct, frozen=True):
    """A neighbour: the secret that shares are sealed with, and its public mask key."""

    secret: bytes
    mask_key: bytes

    def __repr__(self) -> str:
        return "Peer(…)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """For rich, which msgspec would show every field."""
        return []


class HasKeys(_State, frozen=True, tag=True):
    """Keys are advertised. Next: ``share``."""

    cohort: tuple[int, ...]
    near: frozenset[int]
    """Neighbours, and the client itself."""
    sealing_key: bytes
    mask_key: bytes
    seed: bytes


class HasShared(_State, frozen=True, tag=True):
    """Shares are out. Next: ``deliver``."""

    cohort: tuple[int, ...]
    near: frozenset[int]
    mask_key: bytes
    seed: bytes
    peers: dict[int, Peer]
    own_share: bytes


class IsReady(_State, frozen=True, tag=True):
    """The masks are known; this state is never stored. Next: ``mask``."""

    near: frozenset[int]
    members: tuple[int, ...]
    context: bytes
    held: dict[int, bytes]
    masks: tuple[Mask, ...]


class IsMasking(_State, frozen=True, tag=True):
    """What the disk holds while a vector is masked: no secret. Next: nothing."""


class HasMasked(_State, frozen=True, tag=True):
    """The vector is out. Next: ``agree``."""

    near: frozenset[int]
    members: tuple[int, ...]
    context: bytes
    held: dict[int, bytes]
    """By owner: its share of the seed, then its share of the mask key."""


class HasAgreed(_State, frozen=True, tag=True):
    """The survivors are signed. Next: ``reveal``."""

    near: frozenset[int]
    members: tuple[int, ...]
    context: bytes
    held: dict[int, bytes]
    survivors: tuple[int, ...]


class HasRevealed(_State, frozen=True, tag=True):
    """The attempt is complete. Next: nothing."""


class Aborted(_State, frozen=True, tag=True):
    """The attempt is over. Next: nothing."""

    reason: str


AttemptState = HasKeys | HasShared | IsMasking | HasMasked | HasAgreed | HasRevealed | Aborted
