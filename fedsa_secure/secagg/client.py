"""A client's side of one attempt: pure steps (state, message) → (state, answer).

docs/protocol.md §8. Steps raise a named error and change nothing; ``ClientSession`` then ends the
attempt.
"""

import hashlib
from collections.abc import Callable, Sequence

from fedsa_secure.errors import BadShare, SecondUpdate, TooFewSignatures
from fedsa_secure.secagg.checks import (
    check_agreements,
    checked_keys,
    checked_members,
    checked_survivors,
    own_advertise,
)
from fedsa_secure.secagg.derivation import digest
from fedsa_secure.secagg.graph import neighbours
from fedsa_secure.secagg.keys import (
    ShareBox,
    attempt_context,
    exchange,
    pairwise_mask_key,
    private_key,
    self_mask_key,
)
from fedsa_secure.secagg.masks import Mask, UInt32Array, apply_masks
from fedsa_secure.secagg.shamir import SECRET_BYTES, new_secret, share_secret
from fedsa_secure.secagg.states import (
    HasAgreed,
    HasKeys,
    HasMasked,
    HasRevealed,
    HasShared,
    IsReady,
    Party,
    Peer,
)
from fedsa_secure.secagg.wire import (
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
    sign,
)

Fill = Callable[[UInt32Array], None]
"""Writes a client's vector, in fixed point, into the place that it is given. [value]"""


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
    return state, sign(own_advertise(party, state), party.identity)


def share(party: Party, state: HasKeys, message: Advertised) -> tuple[HasShared, bytes]:
    """Check the neighbours' keys and share the own secrets (step 2)."""
    advertised = checked_keys(party, state, message)
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
    members = checked_members(party, state, message)
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
    generator = party.terms.mask_generator
    own = self_mask_key(state.seed, state.sid, context, party.client, generator)
    masks, mask_key = [Mask(own, True, generator)], private_key(state.mask_key)
    for peer in sorted(near):
        pair = (min(peer, party.client), max(peer, party.client))
        public = state.peers[peer].mask_key
        key = pairwise_mask_key(mask_key, public, state.sid, context, pair, generator)
        masks.append(Mask(key, peer > party.client, generator))
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
        check_agreements(party, state, message)
    elif party.terms.consistency:
        raise TooFewSignatures("no signatures on the survivors; nothing was revealed")
    survivors, near = set(state.survivors), sorted(state.near.intersection(state.members))
    seeds = [(peer, state.held[peer][:SECRET_BYTES]) for peer in near if peer in survivors]
    keys = [(peer, state.held[peer][SECRET_BYTES:]) for peer in near if peer not in survivors]
    answer = Reveal(*state.step, party.client, seeds, keys)
    return HasRevealed(*state.step), sign(answer, party.identity)
