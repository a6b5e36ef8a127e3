"""What is checked of messages before anything is done with them. docs/protocol.md §8."""

from fedsa_secure.errors import (
    Equivocation,
    InvalidSurvivors,
    KeySubstitution,
    MalformedMessage,
    ModelMismatch,
    TooFewClients,
    TooFewSignatures,
    UnknownClient,
    WrongTerms,
)
from fedsa_secure.secagg.derivation import digest
from fedsa_secure.secagg.keys import public_key, seed_commitment
from fedsa_secure.secagg.states import HasAgreed, HasKeys, HasMasked, HasShared, Party
from fedsa_secure.secagg.terms import Terms
from fedsa_secure.secagg.wire import (
    Advertise,
    Advertised,
    Agreement,
    Agreements,
    Delivery,
    Survivors,
    ascending,
    decode_client,
)


def own_advertise(party: Party, state: HasKeys) -> Advertise:
    """What a client says of its fresh keys."""
    return Advertise(
        *state.step,
        party.client,
        party.terms.hash,
        public_key(state.sealing_key),
        public_key(state.mask_key),
        seed_commitment(state.step, party.client, state.seed),
    )


def checked_keys(party: Party, state: HasKeys, message: Advertised) -> list[Advertise]:
    """The keys of the neighbours and the own ones, if all of them may be used."""
    found = [checked_advertise(raw, party.terms, state.step) for raw in message.advertises]
    clients = [each.client for each in found]
    if not ascending(clients):
        raise MalformedMessage("advertised keys are not in order of client number")
    strangers = set(clients) - state.near
    if strangers:
        raise UnknownClient(f"{sorted(strangers)} are no neighbours of client {party.client}")
    require(len(found), party.terms.thresholds.shares, "clients advertised in the neighbourhood")
    keys = [key for each in found for key in (each.sealing_key, each.mask_key)]
    if len(set(keys)) < len(keys):
        raise KeySubstitution("an advertised key occurs twice")
    if own_advertise(party, state) not in found:
        raise KeySubstitution(f"client {party.client} does not find its own keys as it sent them")
    return found


def checked_members(party: Party, state: HasShared, message: Delivery) -> tuple[int, ...]:
    """The members, if this client may mask for them."""
    members = message.members
    if not ascending(members):
        raise MalformedMessage("members are not in order of number")
    strangers = set(members).difference(state.cohort)
    if strangers or party.client not in members:
        raise UnknownClient(f"the members {members} are not of the cohort, or not with this client")
    require(len(members), party.terms.thresholds.survivors, "members")
    near = state.near.intersection(members)
    require(len(near), party.terms.thresholds.shares, "members in the neighbourhood")
    unknown = near - state.peers.keys() - {party.client}
    if unknown:
        raise KeySubstitution(f"no keys of {sorted(unknown)} were shown to client {party.client}")
    return tuple(members)


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
    require(len(survivors), party.terms.thresholds.survivors, "survivors")
    require(
        len(state.near.intersection(survivors)),
        party.terms.thresholds.shares,
        "survivors in the neighbourhood",
    )
    return tuple(survivors)


def check_agreements(party: Party, state: HasAgreed, message: Agreements) -> None:
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


def require(found: int, least: int, what: str) -> None:
    """Refuse what falls short of a floor.

    Raises:
        TooFewClients: naming both numbers.
    """
    if found < least:
        raise TooFewClients(f"{found} {what}, and {least} are needed")
