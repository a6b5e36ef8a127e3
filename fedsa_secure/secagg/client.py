"""A client's side of one attempt: pure steps (state, message) → (state, answer).

docs/protocol.md §8. Every state holds only what later steps need: the own mask key and seed are
gone once the vector is masked. Steps raise a named error and change nothing; ``ClientSession`` ends
the attempt then.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fedsa_secure.errors import (
    BadShare,
    Equivocation,
    InvalidSurvivors,
    KeySubstitution,
    MalformedMessage,
    ModelMismatch,
    ProtocolError,
    SecondUpdate,
    TooFewClients,
    TooFewSignatures,
    UnknownClient,
    WrongTerms,
)
from fedsa_secure.secagg.derivation import digest
from fedsa_secure.secagg.graph import neighbours
from fedsa_secure.secagg.identity import Identity
from fedsa_secure.secagg.keys import (
    ShareBox,
    exchange,
    pairwise_mask_key,
    private_key,
    public_key,
    self_mask_key,
)
from fedsa_secure.secagg.masks import Mask, UInt32Array, apply_masks
from fedsa_secure.secagg.shamir import SECRET_BYTES, new_secret, share_secret
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
    Survivors,
    VectorFrame,
    ascending,
    decode_client,
    sign,
)

Fill = Callable[[UInt32Array], None]
"""Writes a client's vector, in fixed point, into the place that it is given. [value]"""


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


def advertise(party: Party, message: Invite, cohort: Sequence[int]) -> tuple[HasKeys, bytes]:
    """Fresh keys (step 1)."""
    near = neighbours(party.client, cohort, party.terms.thresholds, message.sid, message.round) | {
        party.client
    }
    state = HasKeys(
        sid=message.sid,
        round=message.round,
        attempt=message.attempt,
        cohort=tuple(cohort),
        near=near,
        sealing_key=new_secret(),
        mask_key=new_secret(),
        seed=new_secret(),
    )
    return state, sign(_own_advertise(party, state), party.identity)


def share(party: Party, state: HasKeys, message: Advertised) -> tuple[HasShared, bytes]:
    """Check the neighbours' keys and share the own secrets (step 2)."""
    advertised = _checked_keys(party, state, message)
    holders = [each.client for each in advertised]
    seeds = share_secret(state.seed, party.terms.thresholds.shares, holders)
    keys = share_secret(state.mask_key, party.terms.thresholds.shares, holders)
    own, peers, sealed = private_key(state.sealing_key), {}, []
    for each in advertised:
        holder = each.client
        if holder == party.client:
            continue
        peers[holder] = Peer(exchange(own, each.sealing_key), each.mask_key)
        box = ShareBox(peers[holder].secret, state.step, party.client, holder)
        sealed.append((holder, box.seal(seeds[holder] + keys[holder])))
    after = HasShared(
        *state.step,
        cohort=state.cohort,
        near=state.near,
        mask_key=state.mask_key,
        seed=state.seed,
        peers=peers,
        own_share=seeds[party.client] + keys[party.client],
    )
    return after, sign(Shares(*state.step, party.client, sealed), party.identity)


def deliver(party: Party, state: HasShared, message: Delivery, model: bytes) -> IsReady:
    """Check the members and open the shares; afterwards the masks are known (step 3).

    Args:
        party: who masks.
        state: after sharing.
        message: members and sealed shares.
        model: hash of the public values that the vector was computed from, 32 bytes.
    """
    members = _checked_members(party, state, message)
    near = state.near.intersection(members) - {party.client}
    if [owner for owner, _ in message.sealed] != sorted(near):
        raise BadShare(
            f"shares came from {[owner for owner, _ in message.sealed]}, and {sorted(near)} are "
            "the neighbours that are members"
        )
    held = {party.client: state.own_share}
    for owner, sealed in message.sealed:
        box = ShareBox(state.peers[owner].secret, state.step, owner, party.client)
        held[owner] = box.open(sealed)
    context = attempt_context(party.terms, state.step, model, members)
    own = Mask(self_mask_key(state.seed, state.sid, context, party.client), add=True)
    masks, mask_key = [own], private_key(state.mask_key)
    for peer in sorted(near):
        pair = (min(peer, party.client), max(peer, party.client))
        key = pairwise_mask_key(mask_key, state.peers[peer].mask_key, state.sid, context, pair)
        masks.append(Mask(key, add=peer > party.client))
    return IsReady(
        *state.step,
        near=state.near,
        members=members,
        context=context,
        held=held,
        masks=tuple(masks),
    )


def mask(
    party: Party, state: IsReady, fill: Fill, expected: bytes | None = None
) -> tuple[HasMasked, memoryview, bytes]:
    """The masked vector (step 3).

    Args:
        party: who masks.
        state: with the masks.
        fill: writes the vector.
        expected: digest of the vector that was sent in an earlier attempt of the round, if one was.

    Returns:
        The state after, the message, and the digest of the vector.

    Raises:
        SecondUpdate: if the vector is another one than before.
    """
    head = MaskedInput(*state.step, party.client, state.context)
    frame = VectorFrame(head, party.terms.size)
    fill(frame.values)
    found = hashlib.sha256(frame.values.data).digest()
    if expected not in (None, found):
        frame.values[:] = 0
        raise SecondUpdate(
            f"round {state.round} is tried again with another vector than before; a client "
            "computes one update per round"
        )
    apply_masks(frame.values, state.masks)
    after = HasMasked(
        *state.step,
        near=state.near,
        members=state.members,
        context=state.context,
        held=state.held,
    )
    return after, frame.sign(party.identity), found


def agree(party: Party, state: HasMasked, message: Survivors) -> tuple[HasAgreed, bytes]:
    """Check the survivors and sign them (step 4)."""
    survivors = checked_survivors(party, state, message)
    after = HasAgreed(
        *state.step,
        near=state.near,
        members=state.members,
        context=state.context,
        held=state.held,
        survivors=survivors,
    )
    answer = Agreement(*state.step, party.client, state.context, digest("survivors", survivors))
    return after, sign(answer, party.identity)


def reveal(party: Party, state: HasAgreed, message: Agreements | None) -> tuple[HasRevealed, bytes]:
    """Shares of the survivors' seeds and of the mask keys of those who dropped out (step 5).

    Args:
        party: who reveals.
        state: with the survivors.
        message: the signatures; None only where the terms leave the consistency step out.
    """
    if message is not None:
        _check_agreements(party, state, message)
    elif party.terms.consistency:
        raise TooFewSignatures("no signatures on the survivors; nothing was revealed")
    survivors, near = set(state.survivors), sorted(state.near.intersection(state.members))
    seeds = [(peer, state.held[peer][:SECRET_BYTES]) for peer in near if peer in survivors]
    keys = [(peer, state.held[peer][SECRET_BYTES:]) for peer in near if peer not in survivors]
    answer = Reveal(*state.step, party.client, seeds, keys)
    return HasRevealed(*state.step), sign(answer, party.identity)


def attempt_context(
    terms: Terms, step: tuple[bytes, int, int], model: bytes, members: Sequence[int]
) -> bytes:
    """What every mask of an attempt is bound to (docs/protocol.md §3)."""
    return digest("context", *step, terms.hash, model, members)


def seed_commitment(step: tuple[bytes, int, int], client: int, seed: bytes) -> bytes:
    """What a client advertises of its seed, so that a rebuilt one can be checked."""
    return digest("seed", *step, client, seed)


def checked_survivors(party: Party, state: HasMasked, message: Survivors) -> tuple[int, ...]:
    """The survivors, if this client may sign them.

    Raises:
        MalformedMessage, InvalidSurvivors, TooFewClients: if not.
    """
    survivors, dropped = message.survivors, message.dropped
    if not (ascending(survivors) and ascending(dropped)):
        raise MalformedMessage("survivors or dropped are not in order of number")
    both = set(survivors).intersection(dropped)
    if both:
        raise InvalidSurvivors(f"{sorted(both)} are called survivors and dropped")
    if sorted([*survivors, *dropped]) != list(state.members):
        raise InvalidSurvivors("survivors and dropped together are not the members")
    if party.client not in survivors:
        raise InvalidSurvivors(
            f"client {party.client} is asked about itself, as one that dropped out"
        )
    _require(len(survivors), party.terms.thresholds.survivors, "survivors")
    _require(
        len(state.near.intersection(survivors)),
        party.terms.thresholds.shares,
        "survivors in the neighbourhood",
    )
    return tuple(survivors)


def _own_advertise(party: Party, state: HasKeys) -> Advertise:
    return Advertise(
        *state.step,
        party.client,
        party.terms.hash,
        public_key(state.sealing_key),
        public_key(state.mask_key),
        seed_commitment(state.step, party.client, state.seed),
    )


def _checked_keys(party: Party, state: HasKeys, message: Advertised) -> list[Advertise]:
    """The keys of the neighbours and the own ones, if all of them may be used."""
    found = [checked_advertise(raw, party.terms, state.step) for raw in message.advertises]
    clients = [each.client for each in found]
    if not ascending(clients):
        raise MalformedMessage("advertised keys are not in order of client number")
    strangers = set(clients) - state.near
    if strangers:
        raise UnknownClient(f"{sorted(strangers)} are no neighbours of client {party.client}")
    _require(len(found), party.terms.thresholds.shares, "clients advertised in the neighbourhood")
    keys = [key for each in found for key in (each.sealing_key, each.mask_key)]
    if len(set(keys)) < len(keys):
        raise KeySubstitution("an advertised key occurs twice")
    if _own_advertise(party, state) not in found:
        raise KeySubstitution(f"client {party.client} does not find its own keys as it sent them")
    return found


def checked_advertise(raw: bytes, terms: Terms, step: tuple[bytes, int, int]) -> Advertise:
    """An advertised key pair of this attempt, signed by a client on the roster.

    Raises:
        MalformedMessage, WrongTerms, UnknownClient, BadSignature: if it is not.
    """
    signed = decode_client(raw, terms)
    message = signed.message
    if not isinstance(message, Advertise):
        raise MalformedMessage(f"a {type(message).__name__} among advertised keys")
    if (message.sid, message.round, message.attempt) != step or message.terms != terms.hash:
        raise WrongTerms(f"the keys of client {message.client} belong to another attempt")
    signed.check(public_key_of(message.client, terms))
    return message


def public_key_of(client: int, terms: Terms) -> bytes:
    """The identity of a client.

    Raises:
        UnknownClient: if the roster does not have it.
    """
    if client not in terms.roster:
        raise UnknownClient(f"client {client} is not on the roster")
    return terms.roster[client]


def _checked_members(party: Party, state: HasShared, message: Delivery) -> tuple[int, ...]:
    members = message.members
    if not ascending(members):
        raise MalformedMessage("members are not in order of number")
    strangers = set(members).difference(state.cohort)
    if strangers or party.client not in members:
        raise UnknownClient(f"the members {members} are not of the cohort, or not with this client")
    _require(len(members), party.terms.thresholds.survivors, "members")
    near = state.near.intersection(members)
    _require(len(near), party.terms.thresholds.shares, "members in the neighbourhood")
    unknown = near - state.peers.keys() - {party.client}
    if unknown:
        raise KeySubstitution(f"no keys of {sorted(unknown)} were shown to client {party.client}")
    return tuple(members)


def _check_agreements(party: Party, state: HasAgreed, message: Agreements) -> None:
    """At least t members signed what this client signed, and nobody something else."""
    wanted = digest("survivors", state.survivors)
    signers = []
    for raw in message.agreements:
        agreement = _checked_agreement(party, state, raw)
        if agreement.context != state.context:
            raise ModelMismatch(
                f"client {agreement.client} has another model, other members or another "
                "configuration in this round"
            )
        if agreement.survivors != wanted:
            raise Equivocation(f"client {agreement.client} was told other survivors")
        signers.append(agreement.client)
    if not ascending(signers):
        raise MalformedMessage("signatures are not in order of client number")
    if party.client not in signers:
        raise TooFewSignatures(f"the signature of client {party.client} itself is missing")
    needed = party.terms.thresholds.signatures
    if len(signers) < needed:
        raise TooFewSignatures(
            f"{len(signers)} signatures on the survivors, and {needed} are needed; nothing was "
            "revealed"
        )


def _checked_agreement(party: Party, state: HasAgreed, raw: bytes) -> Agreement:
    signed = decode_client(raw, party.terms)
    message = signed.message
    if not isinstance(message, Agreement):
        raise MalformedMessage(f"a {type(message).__name__} among signatures on the survivors")
    if (message.sid, message.round, message.attempt) != state.step:
        raise WrongTerms(f"the signature of client {message.client} is of another attempt")
    if message.client not in state.members:
        raise UnknownClient(f"client {message.client} signed and is no member")
    signed.check(public_key_of(message.client, party.terms))
    return message


def _require(found: int, least: int, what: str) -> None:
    if found < least:
        raise TooFewClients(f"{found} {what}, and this client insists on {least}")


def name_of(error: ProtocolError) -> str:
    """The name of an error, as states and histories record it."""
    return type(error).__name__
