"""What a coalition of the server and c clients can compute, found by linear algebra.

The real client steps are driven through every schedule of equivocation: in two attempts of a round
each honest client is told any set of survivors, or none, and is shown every signature there is on
it. What the coalition has then is a set of linear equations in the honest clients' vectors and in
streams. A stream is known if the shares of its secret are. Elimination of the unknown streams
leaves the sums of honest vectors that can be computed; each has to contain at least m − c of them.

The members of an attempt are all who still answer, and the streams are independent unknowns: that
they look so to who lacks the key is the assumption on AES. Coefficients are taken modulo a prime.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from secagg_attackers import MODEL, Federation

from fedsa_secure.errors import ProtocolError
from fedsa_secure.secagg import Mask, Thresholds
from fedsa_secure.secagg import client as steps
from fedsa_secure.secagg.states import HasAgreed, HasMasked, HasShared, IsReady, Party
from fedsa_secure.secagg.wire import (
    Advertised,
    Agreement,
    Agreements,
    Delivery,
    Invite,
    Reveal,
    Shares,
    Survivors,
    decode_client,
)

PRIME = 2**31 - 1
Set = frozenset[int]
Equation = dict[object, int]
"""Coefficients by unknown: an honest client's number, or the key of a stream."""


def computable(equations: Sequence[Equation], honest: Sequence[int]) -> list[list[int]]:
    """A basis of the sums of honest vectors that follow from the equations, in echelon form."""
    streams = sorted({key for each in equations for key in each if isinstance(key, bytes)})
    columns = [*streams, *honest]
    rows = [[each.get(column, 0) % PRIME for column in columns] for each in equations]
    rank = 0
    for column in range(len(columns)):
        pivot = next((k for k in range(rank, len(rows)) if rows[k][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        inverse = pow(rows[rank][column], -1, PRIME)
        rows[rank] = [value * inverse % PRIME for value in rows[rank]]
        for k in range(len(rows)):
            if k != rank and (factor := rows[k][column]):
                rows[k] = [
                    (a - factor * b) % PRIME for a, b in zip(rows[k], rows[rank], strict=True)
                ]
        rank += 1
    return [row[len(streams) :] for row in rows[:rank] if not any(row[: len(streams)])]


def smallest_support(basis: Sequence[Sequence[int]], size: int) -> int:
    """Fewest vectors in a sum that is not empty; ``size`` + 1 if there is none."""
    for support in range(1, size + 1):
        for inside in itertools.combinations(range(size), support):
            outside = [{k: row[k] for k in range(size) if k not in inside} for row in basis]
            # A combination that vanishes outside exists if the rows are dependent there.
            dependent = computable(
                [{b"%d" % k: v for k, v in row.items()} | {n: 1} for n, row in enumerate(outside)],
                range(len(outside)),
            )
            if dependent:
                return support
    return size + 1


@dataclass
class View:
    """What the coalition has of one attempt, whoever reveals what.

    Args:
        honest: clients outside of the coalition that take part.
        coalition: clients in it.
        shares: that rebuild a secret.
        masks: by honest client, as the client derived them.
    """

    honest: tuple[int, ...]
    coalition: Set
    shares: int
    masks: dict[int, tuple[Mask, ...]]

    def equations(self, seeds: Set, mask_keys: Set) -> list[Equation]:
        """The masked vectors, without the streams that are known.

        Args:
            seeds: honest clients whose seeds can be rebuilt.
            mask_keys: honest clients whose mask keys can be rebuilt.
        """
        shared: dict[bytes, set[int]] = {}
        for client, masks in self.masks.items():
            for mask in masks:
                shared.setdefault(mask.key, set()).add(client)
        found = []
        for client, masks in self.masks.items():
            equation: Equation = {client: 1}
            for mask in masks:
                own = mask.key == self.own[client]
                # A stream that one honest client alone derives is shared with the coalition.
                known = client in seeds if own else len(shared[mask.key]) < 2
                if not (known or (not own and shared[mask.key] & mask_keys)):
                    equation[mask.key] = 1 if mask.add else -1
            found.append(equation)
        return found

    own: dict[int, bytes]
    """Keys of the self masks."""


Outcome = tuple[Set, Set, Set]
"""Who revealed, whose seeds can be rebuilt, and whose mask keys can."""


def largest(known: set[tuple[Set, Set]]) -> list[tuple[Set, Set]]:
    """Without what another one contains: who knows more streams computes all that, too."""
    return [
        each
        for each in known
        if not any(each != more and each[0] <= more[0] and each[1] <= more[1] for more in known)
    ]


class Attack:
    """One coalition against one cohort.

    Args:
        clients: n.
        colluders: c.
        coalition: the clients in it, at most c.
        floors: thresholds in place of those that follow from n and c.
    """

    def __init__(
        self,
        clients: int,
        colluders: int,
        coalition: Iterable[int],
        floors: Thresholds | None = None,
    ) -> None:
        self.floors = floors or Thresholds.of(clients, colluders)
        self.federation = Federation(clients, self.floors, size=1).opened()
        self.coalition = frozenset(coalition)
        self.honest = tuple(k for k in range(clients) if k not in self.coalition)
        self.sid = self.federation.server.sid
        self.parties = {
            k: Party(self.federation.terms, k, self.federation.identities[k])
            for k in range(clients)
        }

    def smallest_sum(self, sample: random.Random | None = None, forget: bool = False) -> int:
        """Fewest honest vectors in anything the coalition computes, over all schedules.

        Args:
            sample: draw schedules where there are too many to take all.
            forget: clients forget which rounds they closed.
        """
        before = {k: client.state for k, client in self.federation.clients.items()}
        states, view = self.masked(attempt=1)
        after = {k: client.state for k, client in self.federation.clients.items()}
        smallest = len(self.honest) + 1
        first = set(self.outcomes(states, view, sample))
        for revealed in sorted({each[0] for each in first}, key=sorted):
            known = largest({each[1:] for each in first if each[0] == revealed})
            for client, state in after.items():
                closed = 1 if client in revealed and not forget else 0
                self.federation.clients[client].state = msgspec.structs.replace(
                    state, closed=closed
                )
            second = self.second(sample)
            for seeds, mask_keys in known:
                equations = view.equations(seeds, mask_keys)
                for added in second:
                    basis = computable([*equations, *added], self.honest)
                    smallest = min(smallest, smallest_support(basis, len(self.honest)))
        for client, state in before.items():
            self.federation.clients[client].state = state
        return smallest

    def second(self, sample: random.Random | None) -> list[list[Equation]]:
        """What another attempt of the round can add."""
        try:
            states, view = self.masked(attempt=2)
        except ProtocolError:
            return [[]]
        outcomes = {each[1:] for each in self.outcomes(states, view, sample)}
        return [view.equations(*known) for known in largest(outcomes)]

    def masked(self, attempt: int) -> tuple[dict[int, HasMasked], View]:
        """Bring everybody who still answers to where its vector is out.

        Raises:
            ProtocolError: if a client refuses after the keys are out.
        """
        clients, step = self.federation.clients, (self.sid, 1, attempt)
        keys, invite = {}, msgspec.msgpack.encode(Invite(*step))
        for client in clients:
            try:
                keys[client] = bytes(clients[client].receive(invite))
            except ProtocolError:
                assert clients[client].state.closed == 1  # it has revealed
        advertised = msgspec.msgpack.encode(Advertised(*step, list(keys.values())))
        sealed = {}
        for client in keys:
            shares = decode_client(clients[client].receive(advertised), self.federation.terms)
            assert isinstance(shares.message, Shares)
            sealed[client] = dict(shares.message.sealed)
        masks, own = {}, {}
        for client in keys:
            held = [(owner, sealed[owner][client]) for owner in keys if owner != client]
            message = Delivery(*step, list(keys), held)
            state = clients[client].state.attempts[1]
            assert isinstance(state, HasShared)
            ready = steps.deliver(self.parties[client], state, message, MODEL)
            clients[client].receive(msgspec.msgpack.encode(message), self.federation.update(client))
            if client not in self.coalition:
                masks[client] = ready.masks
                own[client] = steps.self_mask_key(state.seed, self.sid, ready.context, client)
        states = {client: clients[client].state.attempts[1] for client in keys}
        honest = tuple(client for client in keys if client not in self.coalition)
        coalition = self.coalition.intersection(keys)
        return states, View(honest, coalition, self.floors.shares, masks, own)

    def outcomes(
        self,
        states: dict[int, HasMasked],
        view: View,
        sample: random.Random | None,
    ) -> Iterator[Outcome]:
        """What every schedule of equivocation makes the honest clients reveal."""
        members, steps_taken = tuple(states), Answers(self, states)
        choices = [[None, *steps_taken.signable(client, members)] for client in view.honest]
        told = itertools.product(*choices)
        if sample:
            told = iter([tuple(sample.choice(each) for each in choices) for _ in range(150)])
        for sets in told:
            schedule = dict(zip(view.honest, sets, strict=True))
            revealed = {}
            for client, survivors in schedule.items():
                if survivors is not None:
                    same = frozenset(k for k in schedule if schedule[k] == survivors)
                    reveal = steps_taken.reveal(client, survivors, same)
                    if reveal is not None:
                        revealed[client] = reveal
            for count in range(len(revealed) + 1):  # and who has revealed is in no other attempt
                for chosen in itertools.combinations(revealed, count):
                    yield self.rebuilt(view, {client: revealed[client] for client in chosen})

    def rebuilt(self, view: View, reveals: dict[int, Reveal]) -> Outcome:
        """Whose secrets have enough shares among those revealed and those of the coalition."""
        seeds = [owner for each in reveals.values() for owner, _ in each.seeds]
        keys = [owner for each in reveals.values() for owner, _ in each.mask_keys]
        needed = view.shares - len(view.coalition)
        return (
            frozenset(reveals),
            frozenset(k for k in view.honest if seeds.count(k) >= needed),
            frozenset(k for k in view.honest if keys.count(k) >= needed),
        )


class Answers:
    """The real steps of honest clients from one state each, remembered."""

    def __init__(self, attack: Attack, states: dict[int, HasMasked]) -> None:
        self.attack, self.states = attack, states
        self.agreed: dict[tuple[int, Set], tuple[HasAgreed, bytes]] = {}
        self.revealed: dict[tuple[int, Set, Set], Reveal | None] = {}

    def signable(self, client: int, members: Sequence[int]) -> list[Set]:
        """The sets of survivors that a client signs, of all there are."""
        party, state, found = self.attack.parties[client], self.states[client], []
        for size in range(len(members) + 1):
            for chosen in itertools.combinations(members, size):
                dropped = [k for k in members if k not in chosen]
                message = Survivors(*state.step, list(chosen), dropped)
                try:
                    answer = steps.agree(party, state, message)
                except ProtocolError:
                    continue
                found.append(frozenset(chosen))
                self.agreed[client, frozenset(chosen)] = answer
        return found

    def reveal(self, client: int, survivors: Set, same: Set) -> Reveal | None:
        """What a client reveals on the signatures of ``same`` and of the coalition, if it does."""
        key = client, survivors, same
        if key not in self.revealed:
            self.revealed[key] = self._reveal(client, survivors, same)
        return self.revealed[key]

    def _reveal(self, client: int, survivors: Set, same: Set) -> Reveal | None:
        attack = self.attack
        state, own = self.agreed[client, survivors]
        agreement = decode_client(own, attack.federation.terms).message
        assert isinstance(agreement, Agreement)
        raw = {k: self.agreed[k, survivors][1] for k in same}
        for colluder in attack.coalition.intersection(self.states):
            identity = attack.federation.identities[colluder]
            raw[colluder] = attack.federation.resigned(own, identity, client=colluder)
        shown = Agreements(*state.step, [raw[k] for k in sorted(raw)])
        try:
            _, answer = steps.reveal(attack.parties[client], state, shown)
        except ProtocolError:
            return None
        message = decode_client(answer, attack.federation.terms).message
        assert isinstance(message, Reveal)
        return message


def coalitions(clients: int, colluders: int) -> Iterator[tuple[int, ...]]:
    """Every set of at most c clients."""
    for size in range(colluders + 1):
        yield from itertools.combinations(range(clients), size)


def check_no_leak(
    clients: int, colluders: int, coalition: tuple[int, ...], sample: random.Random | None = None
) -> None:
    """Nothing can be computed of fewer than m − c honest clients, and that much can."""
    attack = Attack(clients, colluders, coalition)
    floor = attack.floors.survivors - len(coalition)
    found = attack.smallest_sum(sample)
    if sample is None:
        assert found == floor  # the sum itself is among what was found
    else:
        assert found >= floor


SMALL = [(n, c, each) for n in (3, 4) for c in range(n - 1) for each in coalitions(n, c)]
FIVE = [(5, c, each) for c in range(4) for each in coalitions(5, c)]


@pytest.mark.parametrize(("clients", "colluders", "coalition"), SMALL)
def test_no_schedule_shows_fewer_than_m_minus_c_honest_clients(
    clients: int, colluders: int, coalition: tuple[int, ...]
) -> None:
    check_no_leak(clients, colluders, coalition)


@pytest.mark.parametrize(("colluders", "coalition"), [(0, ()), (1, (4,)), (2, (0, 3))])
def test_no_sampled_schedule_of_five_clients_does(
    colluders: int, coalition: tuple[int, ...]
) -> None:
    check_no_leak(5, colluders, coalition, random.Random(7))


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "colluders", "coalition"), FIVE)
def test_no_schedule_of_five_clients_does(
    clients: int, colluders: int, coalition: tuple[int, ...]
) -> None:
    check_no_leak(clients, colluders, coalition)


def check_violation(attack: Attack, dropped: dict[int, set[int]]) -> None:
    """One attempt, in which clients are told of others that dropped out, shows too small a sum."""
    states, view = attack.masked(attempt=1)
    answers, members = Answers(attack, states), frozenset(states)
    sets = {client: members - gone for client, gone in dropped.items()}
    for client, survivors in sets.items():
        assert survivors in answers.signable(client, sorted(members))
    reveals = {}
    for client, survivors in sets.items():
        same = frozenset(k for k in sets if sets[k] == survivors)
        reveals[client] = answers.reveal(client, survivors, same)
        assert reveals[client] is not None
    _, seeds, mask_keys = attack.rebuilt(view, reveals)
    basis = computable(view.equations(seeds, mask_keys), attack.honest)
    found = smallest_support(basis, len(attack.honest))
    assert found < attack.floors.survivors - len(attack.coalition)


def test_without_signatures_a_sum_of_two_of_five_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told of two that dropped out; of three clients enough others believe it."""
    monkeypatch.setattr(steps, "check_agreements", lambda *_: None)
    check_violation(Attack(5, 0, ()), {0: {2, 3}, 1: {2, 4}, 2: {3, 4}, 3: {2, 4}, 4: {2, 3}})


def test_with_a_threshold_that_is_too_low_a_single_vector_is_found() -> None:
    """2t = n + c: two halves of the clients each sign a set of their own."""
    low = Thresholds(clients=4, colluders=0, signatures=2, survivors=2, neighbours=3, shares=2)
    check_violation(Attack(4, 0, (), low), {0: {3}, 1: {3}, 2: {0}, 3: {0}})


def test_without_self_masks_a_vector_that_came_late_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deliver = steps.deliver

    def bare(*arguments: object) -> IsReady:
        ready = deliver(*arguments)
        return msgspec.structs.replace(ready, masks=ready.masks[1:])

    monkeypatch.setattr(steps, "deliver", bare)
    assert Attack(4, 1, (3,)).smallest_sum() == 1


def test_with_closed_rounds_forgotten_a_single_vector_is_found() -> None:
    assert Attack(4, 1, (3,)).smallest_sum(forget=True) == 1


def test_the_solver_finds_what_is_there_and_no_more() -> None:
    """Three vectors, streams a and b: x₀ + a, x₁ − a, x₂ + b."""
    equations: list[Equation] = [{0: 1, b"a": 1}, {1: 1, b"a": -1}, {2: 1, b"b": 1}]
    assert computable(equations, (0, 1, 2)) == [[1, 1, 0]]
    assert smallest_support([[1, 1, 0]], 3) == 2
    assert computable(equations[::2], (0, 1, 2)) == []
    assert smallest_support([], 3) == 4
    assert smallest_support([[1, 1, 1], [0, 1, 1]], 3) == 1  # their difference
    assert smallest_support([[1, 0, 1, 1], [0, 1, 1, 1]], 4) == 2
    streams = [{k: 1, b"own": 1} for k in range(3)]
    assert np.array(computable(streams, (0, 1, 2))).shape == (2, 3)  # one pad used three times
