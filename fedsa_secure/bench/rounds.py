"""The protocol's own steps, set up so that each can be timed: one client, and a whole round.

The opening of the session is left out: it happens once per session and moves no vector.
"""

import functools
import os
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedsa_secure.csprng import Keystream
from fedsa_secure.secagg import client as steps
from fedsa_secure.secagg import graph, identity, shamir
from fedsa_secure.secagg.client import Fill
from fedsa_secure.secagg.fixed_point import FixedPoint
from fedsa_secure.secagg.identity import Identity
from fedsa_secure.secagg.keys import ShareBox, exchange, private_key
from fedsa_secure.secagg.masks import Mask, UInt32Array
from fedsa_secure.secagg.server import (
    Attempt,
    CollectingKeys,
    CollectingReveals,
    CollectingVectors,
)
from fedsa_secure.secagg.shamir import new_secret
from fedsa_secure.secagg.states import HasAgreed, HasKeys, HasMasked, HasShared, IsReady, Party
from fedsa_secure.secagg.terms import Terms, Thresholds
from fedsa_secure.secagg.wire import (
    Advertise,
    Advertised,
    Agreement,
    Agreements,
    Delivery,
    Invite,
    Reveal,
    Survivors,
    decode_client,
    decode_server,
    encode_server,
    sign,
)

RANGE = 8.0
MODEL = bytes(32)
_Kind = TypeVar("_Kind")


class Cohort:
    """Clients with identities, invited to one attempt.

    Args:
        clients: n.
        values: in a vector.
    """

    def __init__(self, clients: int, values: int) -> None:
        self._identities = [Identity.new() for _ in range(clients)]
        roster = {client: each.public_key for client, each in enumerate(self._identities)}
        self.terms = Terms(roster, Thresholds.of(clients), values, application=bytes(32))
        self.attempt = Attempt(self.terms, os.urandom(32), 1, 1, tuple(range(clients)))
        self.grid = FixedPoint(clients, RANGE)

    def party(self, client: int) -> Party:
        """A client, as the steps want it."""
        return Party(self.terms, client, self._identities[client])

    def advertise(self, client: int) -> tuple[HasKeys, bytes]:
        """Step 1 of a client."""
        return steps.advertise(self.party(client), Invite(*self.attempt.step), self.attempt.cohort)

    def decoded(self, raw: bytes, kind: type[_Kind]) -> _Kind:
        """A client's message."""
        message = decode_client(raw, self.terms).message
        if not isinstance(message, kind):
            raise TypeError(f"a {type(message).__name__} where a {kind.__name__} belongs")
        return message

    def fill(self, vector: NDArray[np.float32]) -> Fill:
        """Writes a vector in fixed point, as a client does."""
        return functools.partial(_encode, self.grid, vector)


def _encode(grid: FixedPoint, vector: NDArray[np.float32], out: UInt32Array) -> None:
    grid.encode(vector, Keystream(os.urandom(32)), out)


def sample_vector(values: int) -> NDArray[np.float32]:
    """Ordinary numbers to send."""
    return np.random.default_rng(0).standard_normal(values, dtype=np.float32)


def forget_what_is_remembered() -> None:
    """Empty the caches of checks and weights: a client on its own machine meets each once."""
    identity.verify.cache_clear()
    graph._circle.cache_clear()
    shamir._weights_at_zero.cache_clear()


class OneClient:
    """One client of a cohort, with messages to it that its neighbours and the server really sign.

    Only the contents of the shares that it holds are made up; it never looks into them.

    Args:
        cohort: whose first client it is.
        vector: what it sends. [value]
    """

    def __init__(self, cohort: Cohort, vector: NDArray[np.float32]) -> None:
        self._cohort, self._fill, self._party = cohort, cohort.fill(vector), cohort.party(0)
        attempt, step = cohort.attempt, cohort.attempt.step
        everyone, near = list(attempt.cohort), sorted(attempt.near(0) - {0})
        self.neighbours = len(near)
        self._invite = attempt.invite()[0]
        self._has_keys, advertise = self.advertise()
        peers = {peer: cohort.advertise(peer) for peer in near}
        shown = [advertise, *(raw for _, raw in peers.values())]
        self._advertised = encode_server(Advertised(*step, shown))
        self._has_shared, shares = self.share()
        own = cohort.decoded(advertise, Advertise).sealing_key
        sealed = []
        for peer, (keys, _) in peers.items():
            box = ShareBox(exchange(private_key(keys.sealing_key), own), step, peer, 0)
            sealed.append((peer, box.seal(new_secret() + new_secret())))
        self._delivery = encode_server(Delivery(*step, everyone, sealed))
        self._has_masked, masked = self.mask()
        self._survivors = encode_server(Survivors(*step, everyone, []))
        self._has_agreed, agreement = self.agree()
        signed = cohort.decoded(agreement, Agreement)
        agreements = [
            sign(msgspec.structs.replace(signed, client=peer), cohort.party(peer).identity)
            for peer in everyone
        ]
        self._agreements = encode_server(Agreements(*step, agreements))
        answers = (advertise, shares, masked, agreement, self.reveal())
        self.upload = sum(len(answer) for answer in answers)
        """Bytes that it sends in a round."""

    def advertise(self) -> tuple[HasKeys, bytes]:
        """Step 1."""
        invite = _read(self._invite, self._party, Invite)
        return steps.advertise(self._party, invite, self._cohort.attempt.cohort)

    def share(self) -> tuple[HasShared, bytes]:
        """Step 2."""
        message = _read(self._advertised, self._party, Advertised)
        return steps.share(self._party, self._has_keys, message)

    def mask(self) -> tuple[HasMasked, memoryview]:
        """Step 3: exchanges, shares opened, numbers encoded, masks, signature."""
        ready = self._deliver()
        after, frame, _ = steps.mask(self._party, ready, self._fill)
        return after, frame

    def masks(self) -> tuple[Mask, ...]:
        """The masks of step 3."""
        return self._deliver().masks

    def _deliver(self) -> IsReady:
        message = _read(self._delivery, self._party, Delivery)
        return steps.deliver(self._party, self._has_shared, message, MODEL)

    def agree(self) -> tuple[HasAgreed, bytes]:
        """Step 4."""
        message = _read(self._survivors, self._party, Survivors)
        return steps.agree(self._party, self._has_masked, message)

    def reveal(self) -> bytes:
        """Step 5."""
        message = _read(self._agreements, self._party, Agreements)
        return steps.reveal(self._party, self._has_agreed, message)[1]


@dataclass(frozen=True)
class WholeRound:
    """What a round of one process leaves behind.

    Args:
        total: the sum. [value]
        cohort: who took part.
        collecting: the server's state before the last client's vector came.
        last: the last client's masked vector, as it sent it.
        masked: the clients' states after masking.
    """

    total: UInt32Array = field(repr=False)
    cohort: Cohort
    collecting: CollectingVectors = field(repr=False)
    last: bytes = field(repr=False)
    masked: dict[int, HasMasked] = field(repr=False)

    def add(self) -> CollectingVectors:
        """The server checks a masked vector and adds it; the sum is meaningless afterwards."""
        return self.collecting.receive(decode_client(self.last, self.cohort.terms))

    def unmasking(self, dropped: int, values: int) -> CollectingReveals:
        """The server's last state, with the last clients' vectors missing and a sum of any size.

        Args:
            dropped: how many are missing.
            values: in the sum. The streams are taken away from zeros.
        """
        collecting, terms = self.collecting, self.cohort.terms
        survivors = collecting.members[: len(collecting.members) - dropped]
        quiet = replace(terms, consistency=False)  # the signatures are not measured here
        reveals = {}
        for client in survivors:
            state, party = self.masked[client], self.cohort.party(client)
            agreed = HasAgreed(
                *state.step,
                near=state.near,
                members=state.members,
                context=state.context,
                held=state.held,
                survivors=survivors,
            )
            _, raw = steps.reveal(replace(party, terms=quiet), agreed, None)
            reveals[client] = self.cohort.decoded(raw, Reveal)
        return CollectingReveals(
            collecting.attempt,
            collecting.keys,
            collecting.members,
            collecting.context,
            np.zeros(values, dtype=np.uint32),
            survivors,
            reveals,
        )


def whole_round(cohort: Cohort, vector: NDArray[np.float32]) -> WholeRound:
    """All clients and the server through all five steps, in this process.

    Args:
        cohort: who takes part; nobody drops out.
        vector: what every client sends. [value]

    Returns:
        The sum, and what is needed to repeat steps of the server.
    """
    attempt, terms, fill = cohort.attempt, cohort.terms, cohort.fill(vector)
    everyone = {client: cohort.party(client) for client in attempt.cohort}
    keys, has_keys = CollectingKeys(attempt), {}
    for client in everyone:
        has_keys[client], answer = cohort.advertise(client)
        keys = keys.receive(decode_client(answer, terms))
    shares, messages = keys.close()
    has_shared = {}
    for client, data in messages.items():
        party = everyone[client]
        shown = _read(data, party, Advertised)
        has_shared[client], answer = steps.share(party, has_keys.pop(client), shown)
        shares = shares.receive(decode_client(answer, terms))
    vectors, messages = shares.close(MODEL)
    has_masked = {}
    for client, data in messages.items():
        party = everyone[client]
        delivery = _read(data, party, Delivery)
        ready = steps.deliver(party, has_shared.pop(client), delivery, MODEL)
        has_masked[client], frame, _ = steps.mask(party, ready, fill)
        if client == attempt.cohort[-1]:
            before = replace(vectors, total=vectors.total.copy())
        vectors = vectors.receive(decode_client(frame, terms))
    agreements, messages = vectors.close()
    has_agreed = {}
    for client, data in messages.items():
        party = everyone[client]
        survivors = _read(data, party, Survivors)
        has_agreed[client], answer = steps.agree(party, has_masked[client], survivors)
        agreements = agreements.receive(decode_client(answer, terms))
    reveals, messages = agreements.close()
    for client, data in messages.items():
        party = everyone[client]
        signed = _read(data, party, Agreements)
        _, answer = steps.reveal(party, has_agreed.pop(client), signed)
        reveals = reveals.receive(decode_client(answer, terms))
    total = reveals.close().copy()
    return WholeRound(total, cohort, before, bytes(frame), has_masked)


def _read(data: bytes, party: Party, kind: type[_Kind]) -> _Kind:
    message = decode_server(data, party.terms)
    if not isinstance(message, kind):
        raise TypeError(f"a {type(message).__name__} where a {kind.__name__} belongs")
    return message
