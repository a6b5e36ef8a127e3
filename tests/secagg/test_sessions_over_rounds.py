"""Rounds after one another: what closes, what may be tried again, and what travels ahead."""

import pytest
from secagg_attackers import MODEL, Federation

from fedsa_secure.errors import (
    OutOfOrder,
    ProtocolError,
    ReplayedRound,
    TooFewClients,
    WrongTerms,
)
from fedsa_secure.secagg import ClientSession, Party, SessionState
from fedsa_secure.secagg.client_session import MAX_ATTEMPTS
from fedsa_secure.secagg.server_session import Exchange
from fedsa_secure.secagg.terms import OPENINGS
from fedsa_secure.secagg.wire import (
    Advertised,
    Agreements,
    Delivery,
    Invite,
    Survivors,
    encode_server,
)


class Pipeline:
    """Rounds whose keys travel with the round before. Counts exchanges and what was refused."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.refused: list[str] = []

    def send(self, exchange: Exchange, silent: tuple[int, ...] = ()) -> None:
        for client, messages in exchange.items():
            for message in messages:
                if client in silent:
                    continue
                try:
                    answer = self.federation.tell(client, message)
                except ProtocolError as error:
                    self.refused.append(type(error).__name__)
                else:
                    self.federation.server.receive(answer)

    def run(
        self, number: int, silent: dict[int, tuple[int, ...]] | None = None, ahead: bool = True
    ) -> int:
        """A round; ``silent`` clients by exchange. Returns the number of exchanges."""
        server, cohort = self.federation.server, self.federation.cohort
        exchange = server.begin(number, cohort, MODEL, cohort if ahead else None)
        count = 0
        while exchange:
            count += 1
            self.send(exchange, (silent or {}).get(count, ()))
            exchange = server.close()
        return count

    def check_sum(self, clients: tuple[int, ...]) -> None:
        expected = self.federation.sum_of(clients)
        assert self.federation.server.total.tolist() == expected.tolist()


def test_keys_that_travel_ahead_save_two_exchanges_of_five() -> None:
    pipeline = Pipeline(Federation().opened())
    assert [pipeline.run(number) for number in (1, 2, 3)] == [5, 3, 3]
    pipeline.check_sum((0, 1, 2, 3, 4))
    assert pipeline.refused == []


def test_a_client_that_loses_a_vector_is_back_in_the_round_after_the_next() -> None:
    """It answers nothing in round 2, exchange 1, so it has no keys in round 3."""
    pipeline = Pipeline(Federation().opened())
    pipeline.run(1)
    pipeline.run(2, silent={1: (3,)})
    pipeline.check_sum((0, 1, 2, 4))
    assert pipeline.run(3) == 3
    pipeline.check_sum((0, 1, 2, 4))
    assert pipeline.run(4) == 3
    pipeline.check_sum((0, 1, 2, 3, 4))
    assert pipeline.refused == []


@pytest.mark.parametrize("failures", [1, 3])
def test_a_round_that_fails_after_the_next_was_invited_can_be_tried_again(failures: int) -> None:
    pipeline = Pipeline(Federation().opened())
    for _ in range(failures):
        with pytest.raises(TooFewClients, match="vectors arrived"):
            pipeline.run(1, silent={3: (3, 4)})
    assert pipeline.run(1) == 5
    pipeline.check_sum((0, 1, 2, 3, 4))
    assert pipeline.run(2) == 5  # its keys went out with an attempt that failed: set up by itself
    assert pipeline.run(3) == 3
    assert pipeline.refused == []


def test_a_pipelined_round_that_fails_can_be_tried_again() -> None:
    pipeline = Pipeline(Federation().opened())
    pipeline.run(1)
    for exchange in (1, 3):  # where vectors are due with keys ahead, and without
        with pytest.raises(TooFewClients, match="vectors arrived"):
            pipeline.run(2, silent={exchange: (3, 4)})
    assert pipeline.run(2) == 5
    pipeline.check_sum((0, 1, 2, 3, 4))
    assert pipeline.refused == []


def test_too_few_keys_for_the_next_round_leave_this_one_alone() -> None:
    federation = Federation().opened()
    pipeline, server = Pipeline(federation), federation.server
    pipeline.send(server.begin(1, federation.cohort, MODEL, federation.cohort))
    pipeline.send(server.close())
    exchange = server.close()
    for client, (delivery, invite) in exchange.items():
        server.receive(federation.tell(client, delivery))
        if client < 3:
            server.receive(federation.tell(client, invite))
    exchange = server.close()
    assert {len(messages) for messages in exchange.values()} == {1}  # no keys are shown
    while exchange:
        pipeline.send(exchange)
        exchange = server.close()
    pipeline.check_sum(federation.cohort)
    assert pipeline.run(2) == 5


@pytest.mark.parametrize("reached", [Delivery, Survivors, Agreements])
def test_a_vector_for_a_round_closes_every_round_before_it(reached: type) -> None:
    """docs/protocol.md §9: nothing of round 1 is answered once a vector of round 2 is out."""
    federation = Federation().opened()
    first = federation.until(reached, round_number=1)
    federation.send(federation.until(Delivery, round_number=2))
    client = federation.clients[0]
    assert client.state.closed == 1
    assert 1 not in client.state.attempts  # what it knew of the round is gone
    with pytest.raises(ReplayedRound, match="round 1 is closed"):
        client.receive(first[0])


def test_a_closed_round_is_closed_in_every_later_session() -> None:
    federation = Federation().opened()
    federation.run(3)
    federation.opened()
    for number in (1, 2, 3):
        message = federation.begin(number)[0]
        with pytest.raises(ReplayedRound, match=f"round {number} is closed"):
            federation.tell(0, message)
    assert federation.run(4).tolist() == federation.sum_of(federation.cohort).tolist()


def test_the_attempts_of_a_round_are_bounded() -> None:
    federation = Federation().opened()
    invite = federation.begin()[0]
    last = federation.changed(invite, attempt=MAX_ATTEMPTS - 1)
    assert federation.tell(0, last)
    for number in (0, MAX_ATTEMPTS - 1, MAX_ATTEMPTS):
        refused = federation.changed(invite, attempt=number, round=1)
        if refused != last:
            with pytest.raises(ReplayedRound, match="cannot be begun"):
                federation.tell(0, refused)


def test_a_server_cannot_make_a_client_collect_secrets_of_many_rounds() -> None:
    """Invites for round after round: the secrets of one and of its neighbours are kept."""
    federation = Federation(5).opened()
    session = federation.clients[0]

    def invite(number: int) -> bytes:
        return encode_server(Invite(session.state.sid, number, 1))

    for number in range(1, 8):
        session.receive(invite(number))
        assert set(session.state.attempts) == {max(number - 1, 1), number}
    with pytest.raises(ReplayedRound, match="round 5 came after 7 was begun"):
        session.receive(encode_server(Invite(session.state.sid, 5, 2)))
    assert set(session.state.attempts) == {6, 7}


def test_a_client_opens_so_many_sessions_and_no_more() -> None:
    """Each would show the server another set of circles: docs/protocol.md §5."""
    session = Federation(5).clients[0]
    for _ in range(OPENINGS):
        session.commit()
    again = ClientSession(session._party, session._cohort_of, state=session.state)  # restarted
    for each in (session, again):
        with pytest.raises(ReplayedRound, match="64 sessions were opened"):
            each.commit()


def test_a_stored_state_of_other_terms_is_refused() -> None:
    federation = Federation().opened()
    party = Party(federation.terms, 0, federation.identities[0])
    with pytest.raises(WrongTerms, match="left as it is"):
        ClientSession(party, lambda _: federation.cohort, state=SessionState(b"x" * 32))


def test_a_round_before_the_session_is_open_or_an_exchange_without_one_is_out_of_order() -> None:
    federation = Federation()
    with pytest.raises(OutOfOrder, match="not open"):
        federation.begin()
    federation.opened()
    with pytest.raises(OutOfOrder, match="no round"):
        federation.server.close()


def test_the_server_says_who_is_a_member_and_who_survives_only_while_that_is_so() -> None:
    federation = Federation().opened()
    server = federation.server
    assert (server.members, server.survivors) == ((), ())
    federation.until(Delivery)
    assert (server.members, server.survivors) == ((0, 1, 2, 3, 4), ())
    federation.until(Survivors, silent={Delivery: [1]})
    assert (server.members, server.survivors) == ((), (0, 2, 3, 4))
    federation.until(Agreements)
    assert server.survivors == (0, 1, 2, 3, 4)


def test_an_invite_is_answered_with_one_set_of_keys_however_often_it_comes() -> None:
    federation = Federation().opened()
    invite = federation.begin()[0]
    assert isinstance(federation.read(invite), Invite)
    assert federation.tell(0, invite) == federation.tell(0, invite)
    messages = federation.until(Advertised)
    assert federation.tell(0, messages[0]) == federation.tell(0, messages[0])
