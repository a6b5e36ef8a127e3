"""The server's side of one attempt: pure steps, but for the sum, which grows in place.

docs/protocol.md §8. A phase takes in messages (``receive``) until the runtime closes it; closing
gives the next phase and what to send, or a named error that ends the attempt. A message that is
refused changes nothing: its sender counts as silent.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from fedsa_secure.errors import (
    BadShare,
    DuplicateMessage,
    InvalidSurvivors,
    MalformedMessage,
    ModelMismatch,
    TooFewSignatures,
    UnknownClient,
    WrongRebuiltKey,
    WrongTerms,
)
from fedsa_secure.secagg.checks import checked_advertise, public_key_of, require
from fedsa_secure.secagg.derivation import digest
from fedsa_secure.secagg.graph import neighbours
from fedsa_secure.secagg.keys import (
    attempt_context,
    pairwise_mask_key,
    private_key,
    seed_commitment,
    self_mask_key,
)
from fedsa_secure.secagg.masks import Mask, UInt32Array, apply_masks
from fedsa_secure.secagg.shamir import rebuild_secret
from fedsa_secure.secagg.terms import Terms
from fedsa_secure.secagg.wire import (
    Advertise,
    Advertised,
    Agreement,
    Agreements,
    Delivery,
    Invite,
    MaskedInput,
    Reveal,
    Shares,
    Signed,
    Survivors,
    encode_server,
)

Messages = dict[int, bytes]
"""What to send, by client."""
_SharesByOwner = Mapping[int, Mapping[int, bytes]]
_Message = TypeVar("_Message", Shares, MaskedInput, Agreement, Reveal)


@dataclass(frozen=True)
class Attempt:
    """What is fixed during one attempt.

    Args:
        terms: what all agreed on.
        sid: of the session.
        round: counted from 1.
        attempt: of this round.
        cohort: everybody invited, in order.
    """

    terms: Terms
    sid: bytes
    round: int
    attempt: int
    cohort: tuple[int, ...]

    @property
    def step(self) -> tuple[bytes, int, int]:
        """Session, round and attempt."""
        return self.sid, self.round, self.attempt

    def is_for(self, round_number: int, cohort: Sequence[int]) -> bool:
        """Whether this is an attempt of the round with exactly these clients."""
        return (self.round, self.cohort) == (round_number, tuple(cohort))

    def near(self, client: int) -> frozenset[int]:
        """A client's neighbours and itself."""
        around = neighbours(client, self.cohort, self.terms.thresholds, self.sid, self.round)
        return around | {client}

    def invite(self) -> Messages:
        """Step 1 for everybody."""
        message = encode_server(Invite(*self.step))
        return dict.fromkeys(self.cohort, message)


@dataclass(frozen=True)
class CollectingKeys:
    """Step 1 is going on."""

    attempt: Attempt
    advertises: Mapping[int, tuple[Advertise, bytes]] = field(default_factory=dict)

    def receive(self, signed: Signed) -> "CollectingKeys":
        """Take a client's keys."""
        raw = bytes(signed.raw)
        message = checked_advertise(raw, self.attempt.terms, self.attempt.step)
        _check_sender(message.client, self.attempt.cohort, self.advertises)
        return replace(self, advertises={**self.advertises, message.client: (message, raw)})

    def close(self) -> tuple["CollectingShares", Messages]:
        """Show everyone the keys of its neighbours (step 2)."""
        attempt, answered = self.attempt, sorted(self.advertises)
        require(len(answered), attempt.terms.thresholds.survivors, "clients sent keys")
        messages = {}
        for client in answered:
            near = sorted(attempt.near(client).intersection(answered))
            shown = [self.advertises[peer][1] for peer in near]
            messages[client] = encode_server(Advertised(*attempt.step, shown))
        keys = {client: self.advertises[client][0] for client in answered}
        return CollectingShares(attempt, keys), messages


@dataclass(frozen=True)
class CollectingShares:
    """Step 2 is going on."""

    attempt: Attempt
    keys: Mapping[int, Advertise]
    sealed: Mapping[int, Mapping[int, bytes]] = field(default_factory=dict)

    def receive(self, signed: Signed) -> "CollectingShares":
        """Take a client's sealed shares."""
        message = _expected(signed, Shares, self.attempt)
        _check_sender(message.client, self.keys, self.sealed)
        signed.check(public_key_of(message.client, self.attempt.terms))
        holders = [holder for holder, _ in message.sealed]
        near = self.attempt.near(message.client).intersection(self.keys) - {message.client}
        if holders != sorted(near):
            raise BadShare(f"client {message.client} sealed shares for others than its neighbours")
        return replace(self, sealed={**self.sealed, message.client: dict(message.sealed)})

    def close(self, model: bytes) -> tuple["CollectingVectors", Messages]:
        """Fix the members and deliver their shares (step 3).

        Args:
            model: hash of the public values of the round.
        """
        attempt, members = self.attempt, tuple(sorted(self.sealed))
        require(len(members), attempt.terms.thresholds.survivors, "clients shared their keys")
        messages = {}
        for client in members:
            near = sorted(attempt.near(client).intersection(members) - {client})
            held = [(owner, self.sealed[owner][client]) for owner in near]
            messages[client] = encode_server(Delivery(*attempt.step, list(members), held))
        context = attempt_context(attempt.terms, attempt.step, model, members)
        total = np.zeros(attempt.terms.size, dtype=np.uint32)
        return CollectingVectors(attempt, self.keys, members, context, total), messages


@dataclass(frozen=True)
class _WithMembers:
    """What is fixed from step 3 on, and the sum.

    Args:
        attempt: at work.
        keys: that were advertised, by client.
        members: who shared them, in order.
        context: what every mask is bound to.
        total: of the masked vectors so far; it grows in place. [value]
    """

    attempt: Attempt
    keys: Mapping[int, Advertise]
    members: tuple[int, ...]
    context: bytes
    total: UInt32Array = field(repr=False)

    @property
    def _fixed(
        self,
    ) -> tuple[Attempt, Mapping[int, Advertise], tuple[int, ...], bytes, UInt32Array]:
        return self.attempt, self.keys, self.members, self.context, self.total


@dataclass(frozen=True)
class CollectingVectors(_WithMembers):
    """Step 3 is going on. A phase is good for one continuation, since the sum grows in place."""

    arrived: frozenset[int] = frozenset()

    def receive(self, signed: Signed) -> "CollectingVectors":
        """Add a client's masked vector."""
        message = _expected(signed, MaskedInput, self.attempt)
        _check_sender(message.client, self.members, self.arrived)
        signed.check(public_key_of(message.client, self.attempt.terms))
        if message.context != self.context:
            raise ModelMismatch(
                f"client {message.client} masked for another model, other members or another "
                "configuration; its vector is not used"
            )
        np.add(self.total, signed.payload, out=self.total)
        return replace(self, arrived=self.arrived | {message.client})

    def close(self) -> tuple["CollectingAgreements", Messages]:
        """Fix the survivors (step 4)."""
        attempt, survivors = self.attempt, sorted(self.arrived)
        dropped = [client for client in self.members if client not in self.arrived]
        require(len(survivors), attempt.terms.thresholds.survivors, "vectors arrived")
        message = encode_server(Survivors(*attempt.step, survivors, dropped))
        after = CollectingAgreements(*self._fixed, tuple(survivors))
        return after, dict.fromkeys(survivors, message)


@dataclass(frozen=True)
class CollectingAgreements(_WithMembers):
    """Step 4 is going on."""

    survivors: tuple[int, ...]
    agreements: Mapping[int, bytes] = field(default_factory=dict)

    def receive(self, signed: Signed) -> "CollectingAgreements":
        """Take a client's signature."""
        message = _expected(signed, Agreement, self.attempt)
        _check_sender(message.client, self.survivors, self.agreements)
        signed.check(public_key_of(message.client, self.attempt.terms))
        if message.context != self.context:
            raise ModelMismatch(f"client {message.client} signed for another context")
        if message.survivors != digest("survivors", self.survivors):
            raise InvalidSurvivors(f"client {message.client} signed other survivors")
        agreements = {**self.agreements, message.client: bytes(signed.raw)}
        return replace(self, agreements=agreements)

    def close(self) -> tuple["CollectingReveals", Messages]:
        """Show the signatures (step 5)."""
        signers, needed = sorted(self.agreements), self.attempt.terms.thresholds.signatures
        if len(signers) < needed:
            raise TooFewSignatures(
                f"{len(signers)} clients signed the survivors, and {needed} are needed"
            )
        raw = [self.agreements[client] for client in signers]
        message = encode_server(Agreements(*self.attempt.step, raw))
        return self.unsigned(), dict.fromkeys(signers, message)

    def unsigned(self) -> "CollectingReveals":
        """The next phase, for terms that leave the signatures out."""
        return CollectingReveals(*self._fixed, self.survivors)


@dataclass(frozen=True)
class CollectingReveals(_WithMembers):
    """Step 5 is going on."""

    survivors: tuple[int, ...]
    reveals: Mapping[int, Reveal] = field(default_factory=dict, repr=False)

    def receive(self, signed: Signed) -> "CollectingReveals":
        """Take a client's shares."""
        message = _expected(signed, Reveal, self.attempt)
        _check_sender(message.client, self.survivors, self.reveals)
        signed.check(public_key_of(message.client, self.attempt.terms))
        near = self.attempt.near(message.client).intersection(self.members)
        alive, gone = near.intersection(self.survivors), near.difference(self.survivors)
        if [peer for peer, _ in message.seeds] != sorted(alive) or [
            peer for peer, _ in message.mask_keys
        ] != sorted(gone):
            raise BadShare(f"client {message.client} revealed other shares than it was asked for")
        return replace(self, reveals={**self.reveals, message.client: message})

    def close(self) -> UInt32Array:
        """The sum over the survivors.

        Raises:
            TooFewClients: if fewer shares came than a secret takes.
            BadShare: if one is no element of the field.
            WrongRebuiltKey: if a secret is not what its owner advertised.
        """
        seeds = _by_owner({holder: each.seeds for holder, each in self.reveals.items()})
        keys = _by_owner({holder: each.mask_keys for holder, each in self.reveals.items()})
        masks = [self._self_mask(client, seeds) for client in self.survivors]
        for client in sorted(set(self.members).difference(self.survivors)):
            masks += self._pairwise_masks(client, keys)
        apply_masks(self.total, masks)
        return self.total

    def _self_mask(self, client: int, shares: _SharesByOwner) -> Mask:
        seed = self._rebuild(client, shares)
        if seed_commitment(self.attempt.step, client, seed) != self.keys[client].seed_commitment:
            raise WrongRebuiltKey(_wrong(client, "seed"))
        generator = self.attempt.terms.mask_generator
        key = self_mask_key(seed, self.attempt.sid, self.context, client, generator)
        return Mask(key, False, generator)

    def _pairwise_masks(self, client: int, shares: _SharesByOwner) -> list[Mask]:
        """The streams that survivors share with a client that dropped out."""
        peers = sorted(self.attempt.near(client).intersection(self.survivors))
        if not peers:
            return []
        secret = private_key(self._rebuild(client, shares))
        if secret.public_key().public_bytes_raw() != self.keys[client].mask_key:
            raise WrongRebuiltKey(_wrong(client, "mask key"))
        masks, generator = [], self.attempt.terms.mask_generator
        for peer in peers:
            pair = (min(peer, client), max(peer, client))
            key = pairwise_mask_key(
                secret, self.keys[peer].mask_key, self.attempt.sid, self.context, pair, generator
            )
            # The opposite of what the survivor did.
            masks.append(Mask(key, peer > client, generator))
        return masks

    def _rebuild(self, client: int, shares: _SharesByOwner) -> bytes:
        found, needed = shares.get(client, {}), self.attempt.terms.thresholds.shares
        require(len(found), needed, f"shares of a secret of client {client} were revealed")
        return rebuild_secret(found, needed)


Phase = (
    CollectingKeys | CollectingShares | CollectingVectors | CollectingAgreements | CollectingReveals
)


def _expected(signed: Signed, kind: type[_Message], attempt: Attempt) -> _Message:
    message = signed.message
    if not isinstance(message, kind):
        raise MalformedMessage(f"a {type(message).__name__} where a {kind.__name__} belongs")
    if (message.sid, message.round, message.attempt) != attempt.step:
        raise WrongTerms(f"a message of client {message.client} belongs to another attempt")
    return message


def _by_owner(revealed: Mapping[int, Sequence[tuple[int, bytes]]]) -> _SharesByOwner:
    """Shares by owner and holder, from lists by holder."""
    shares: dict[int, dict[int, bytes]] = {}
    for holder, pairs in revealed.items():
        for owner, value in pairs:
            shares.setdefault(owner, {})[holder] = value
    return shares


def _check_sender(client: int, allowed: Container[int], seen: Container[int]) -> None:
    if client not in allowed:
        raise UnknownClient(f"client {client} has no place in this step")
    if client in seen:
        raise DuplicateMessage(f"client {client} has sent its message of this step")


def _wrong(client: int, what: str) -> str:
    return (
        f"the rebuilt {what} of client {client} is not the one it advertised: it, or a client that "
        "revealed a share of it, is faulty; the round is lost"
    )
