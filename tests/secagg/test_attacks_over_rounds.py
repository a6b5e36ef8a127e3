"""Attacks that need two rounds, attempts or sessions, and those by a client on the server."""

import itertools

import numpy as np
import pytest
from secagg_attackers import MODEL, Federation, Messages, check_refused

from fedsa_secure.csprng import Keystream
from fedsa_secure.errors import (
    BadShare,
    BadSignature,
    DuplicateMessage,
    InvalidSurvivors,
    LateMessage,
    MalformedMessage,
    ModelMismatch,
    OutOfOrder,
    OversizedMessage,
    ProtocolError,
    ReplayedRound,
    RetryForbidden,
    SecondUpdate,
    SecretsLost,
    TooFewClients,
    TooFewSignatures,
    UnknownClient,
    WrongRebuiltKey,
    WrongTerms,
)
from fedsa_secure.secagg import FixedPoint, Identity, Thresholds, apply_masks
from fedsa_secure.secagg import client as steps
from fedsa_secure.secagg import server as server_steps
from fedsa_secure.secagg import terms as terms_module
from fedsa_secure.secagg.keys import (
    ShareBox,
    attempt_context,
    exchange,
    private_key,
    public_key,
    self_mask_key,
)
from fedsa_secure.secagg.masks import Mask
from fedsa_secure.secagg.shamir import PRIME, new_secret, share_secret
from fedsa_secure.secagg.states import Aborted, HasAgreed, HasRevealed, Party
from fedsa_secure.secagg.wire import (
    Advertise,
    Advertised,
    Agreements,
    Delivery,
    Invite,
    Reveal,
    Survivors,
    decode_client,
    encode_server,
    sign,
)

VICTIM, OTHER, COLLUDER = 0, 1, 4


@pytest.fixture
def federation() -> Federation:
    return Federation(5).opened()


def advertised_of(federation: Federation, raw: object) -> Advertise:
    message = decode_client(raw, federation.terms).message
    assert isinstance(message, Advertise)
    return message


class TestOneUnmasking:
    """Rule 4: one unmasking per round, and masks for one model and one set of members."""

    def test_a_round_that_was_unmasked_is_not_begun_again(self, federation: Federation) -> None:
        federation.run()
        invite = federation.begin()[VICTIM]
        assert federation.read(invite).attempt == 2
        with pytest.raises(ReplayedRound, match="round 1 is closed"):
            federation.tell(VICTIM, invite)
        assert isinstance(federation.state(VICTIM), HasRevealed)

    def test_nor_in_another_session(self, federation: Federation) -> None:
        federation.run()
        federation.opened()
        with pytest.raises(ReplayedRound, match="round 1 is closed"):
            federation.tell(VICTIM, federation.begin()[VICTIM])

    def test_an_attempt_that_is_under_way_ends_with_a_new_session(
        self, federation: Federation
    ) -> None:
        shown = federation.until(Agreements)[VICTIM]
        federation.opened()
        with pytest.raises(WrongTerms, match="another session"):
            federation.tell(VICTIM, shown)

    def test_an_attempt_is_begun_once(self, federation: Federation) -> None:
        invite = federation.begin()[VICTIM]
        federation.until(Advertised)
        with pytest.raises(ReplayedRound, match="attempt 1 of round 1 cannot be begun"):
            federation.tell(VICTIM, invite)

    def test_a_client_with_another_model_is_left_out_by_an_honest_server(
        self, federation: Federation
    ) -> None:
        federation.models[VICTIM] = b"other".ljust(32)
        deliveries = federation.until(Delivery)
        answer = federation.tell(VICTIM, deliveries.pop(VICTIM))
        with pytest.raises(ModelMismatch, match="client 0 masked for another model"):
            federation.server.receive(answer)
        federation.send(deliveries)
        assert federation.server.survivors == ()
        messages = federation.close()
        while messages:
            federation.send(messages)
            messages = federation.close()
        assert federation.server.total.tolist() == federation.sum_of((1, 2, 3, 4)).tolist()

    def test_two_models_that_a_server_hides_are_found_before_anything_is_revealed(
        self, federation: Federation
    ) -> None:
        federation.models |= {0: b"a" * 32, 1: b"a" * 32}
        shown = self.agreements_of(federation)
        for client in federation.cohort:
            check_refused(federation, client, shown, ModelMismatch, shown, "another model")

    def test_two_sets_of_members_are_found_before_anything_is_revealed(
        self, federation: Federation
    ) -> None:
        """Clients 0 and 1 are told that client 4 is no member. Its name is on their set, too."""
        deliveries = federation.until(Delivery)
        for client in (0, 1):
            sealed = [each for each in federation.read(deliveries[client]).sealed if each[0] != 4]
            deliveries[client] = federation.changed(
                deliveries[client], members=[0, 1, 2, 3], sealed=sealed
            )
        for client, message in deliveries.items():
            federation.tell(client, message)
        step, raw = federation.state(VICTIM).step, []
        for client in (0, 1, 2, 3):
            dropped = [] if client < 2 else [4]
            told = Survivors(*step, [0, 1, 2, 3], dropped)
            raw.append(bytes(federation.tell(client, encode_server(told))))
        shown = encode_server(Agreements(*step, raw))
        for client in (0, 1, 2, 3):
            check_refused(federation, client, shown, ModelMismatch, shown, "other members")

    def agreements_of(self, federation: Federation) -> bytes:
        """Every signature there is, shown by a server that takes any vector."""
        for client, message in federation.until(Delivery).items():
            federation.tell(client, message)
        step = federation.state(VICTIM).step
        told = encode_server(Survivors(*step, list(federation.cohort), []))
        raw = [bytes(federation.tell(client, told)) for client in federation.cohort]
        return encode_server(Agreements(*step, raw))

    def test_vectors_for_two_models_add_up_to_noise(self) -> None:
        """Even with every self mask taken away the sum is no small combination of the vectors.

        False alarm: one of 5⁴ · 64 words is hit by chance with probability below 10⁻⁵.
        """
        federation = Federation(4, size=64).opened()
        federation.models |= {0: b"a" * 32, 1: b"a" * 32}
        deliveries = federation.until(Delivery)
        seeds = {k: federation.state(k).seed for k in federation.cohort}
        step, total = federation.state(VICTIM).step, np.zeros(64, np.uint32)
        for client, message in deliveries.items():
            total += decode_client(federation.tell(client, message), federation.terms).payload
        for client, seed in seeds.items():
            model = federation.models[client]
            context = attempt_context(federation.terms, step, model, federation.cohort)
            key = self_mask_key(seed, step[0], context, client)
            apply_masks(total, [Mask(key, add=False)])
        vectors = np.stack([federation.vectors[k] for k in federation.cohort])
        for weights in itertools.product(range(-2, 3), repeat=4):
            combination = (np.array(weights)[:, None] * vectors.astype(np.int64)).sum(0)
            assert not np.any(total == (combination % 2**32).astype(np.uint32))

    def test_with_one_model_the_same_arithmetic_gives_the_sum(self) -> None:
        """The test above would see a sum if there were one."""
        federation = Federation(4, size=64).opened()
        deliveries = federation.until(Delivery)
        seeds = {k: federation.state(k).seed for k in federation.cohort}
        step, total = federation.state(VICTIM).step, np.zeros(64, np.uint32)
        for client, message in deliveries.items():
            total += decode_client(federation.tell(client, message), federation.terms).payload
        context = attempt_context(federation.terms, step, MODEL, federation.cohort)
        for client, seed in seeds.items():
            key = self_mask_key(seed, step[0], context, client)
            apply_masks(total, [Mask(key, add=False)])
        assert total.tolist() == federation.sum_of(federation.cohort).tolist()

    def test_another_update_in_a_retry(self, federation: Federation) -> None:
        federation.send(federation.until(Delivery))
        delivery = federation.until(Delivery)[VICTIM]
        federation.vectors[VICTIM] = federation.vectors[VICTIM] + np.uint32(1)
        check_refused(federation, VICTIM, delivery, SecondUpdate, delivery, "another vector")

    def test_another_update_in_a_later_session(self, federation: Federation) -> None:
        federation.send(federation.until(Delivery))
        delivery = federation.opened().until(Delivery)[VICTIM]
        federation.vectors[VICTIM] = federation.vectors[VICTIM] + np.uint32(1)
        check_refused(federation, VICTIM, delivery, SecondUpdate, delivery, "another vector")

    def test_a_retry_on_a_sparse_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(terms_module, "COMPLETE", 6)
        sparse = Thresholds(7, colluders=1, signatures=5, survivors=5, neighbours=4, shares=4)
        federation = Federation(7, sparse).opened()
        federation.until(Delivery)  # no vector is out: another attempt may follow
        federation.send(federation.until(Delivery))
        for _ in range(2):  # in this session and in the next
            with pytest.raises(RetryForbidden, match="sparse graph"):
                federation.tell(VICTIM, federation.begin()[VICTIM])
            federation.opened()
        assert federation.run(2).tolist() == federation.sum_of(range(7)).tolist()

    def test_keys_of_a_client_that_is_no_neighbour(self) -> None:
        sparse = Thresholds(7, colluders=1, signatures=5, survivors=5, neighbours=4, shares=4)
        federation = Federation(7, sparse).opened()
        shown = federation.until(Advertised)
        near = federation.state(VICTIM).near
        raw = {
            advertised_of(federation, each).client: each
            for message in shown.values()
            for each in federation.read(message).advertises
        }
        assert raw.keys() > near
        stranger = min(raw.keys() - near)
        listed = [raw[client] for client in sorted(near | {stranger})]
        message = federation.changed(shown[VICTIM], advertises=listed)
        check_refused(
            federation, VICTIM, message, UnknownClient, shown[VICTIM], "no neighbours of client 0"
        )

    def test_too_few_survivors_in_a_sparse_neighbourhood(self) -> None:
        """Enough clients survive, and too few of those near to the victim."""
        sparse = Thresholds(9, colluders=1, signatures=6, survivors=6, neighbours=4, shares=4)
        federation = Federation(9, sparse).opened()
        asked = federation.until(Survivors)[VICTIM]
        gone = sorted(federation.state(VICTIM).near - {VICTIM})[:2]
        left = [client for client in range(9) if client not in gone]
        message = federation.changed(asked, survivors=left, dropped=gone)
        check_refused(federation, VICTIM, message, TooFewClients, asked, "in the neighbourhood")

    def test_too_few_members_in_a_sparse_neighbourhood(self) -> None:
        """Enough clients are members, and too few of those near to the victim."""
        sparse = Thresholds(9, colluders=1, signatures=6, survivors=6, neighbours=4, shares=4)
        federation = Federation(9, sparse).opened()
        asked = federation.until(Delivery)[VICTIM]
        gone = sorted(federation.state(VICTIM).near - {VICTIM})[:2]
        message = federation.changed(
            asked,
            members=[client for client in range(9) if client not in gone],
            sealed=[pair for pair in federation.read(asked).sealed if pair[0] not in gone],
        )
        check_refused(federation, VICTIM, message, TooFewClients, asked, "in the neighbourhood")

    def test_a_client_that_crashed_while_it_masked_has_nothing_to_say(
        self, federation: Federation
    ) -> None:
        """The state on disk is then a mark without secrets: docs/protocol.md §11."""
        delivery = federation.until(Delivery)[VICTIM]

        class PowerCutError(Exception):
            pass

        def fail(*_: object) -> None:
            raise PowerCutError

        update = federation.update(VICTIM)
        update.fill = fail
        with pytest.raises(PowerCutError):
            federation.clients[VICTIM].receive(delivery, update)
        check_refused(federation, VICTIM, delivery, SecretsLost, delivery, "with a crash")


class TestFreshness:
    """Rule 5: nothing secret is used twice, and a repeated question gets the repeated answer."""

    def test_every_attempt_has_fresh_keys(self, federation: Federation) -> None:
        seen: set[bytes] = set()
        for number in (1, 1, 2):
            for client, message in federation.begin(number).items():
                keys = advertised_of(federation, federation.tell(client, message))
                seen |= {keys.sealing_key, keys.mask_key, keys.seed_commitment}
        assert len(seen) == 3 * 5 * 3

    def test_the_same_vector_looks_new_in_every_attempt(self, federation: Federation) -> None:
        payloads = []
        for _ in range(2):
            answer = federation.tell(VICTIM, federation.until(Delivery)[VICTIM])
            payloads.append(decode_client(answer, federation.terms).payload)
        assert not np.any(payloads[0] == payloads[1])  # false alarm: 6 · 2⁻³²

    @pytest.mark.parametrize("kind", [Invite, Advertised, Delivery, Survivors, Agreements])
    def test_the_message_answered_last_gets_the_same_bytes(
        self, federation: Federation, kind: type
    ) -> None:
        messages = federation.until(kind)
        first = bytes(federation.tell(VICTIM, messages[VICTIM]))
        state = federation.clients[VICTIM].state
        assert bytes(federation.tell(VICTIM, messages[VICTIM])) == first
        assert federation.clients[VICTIM].state is state


class TestFaultyClients:
    """Rule 8: what a client can do to the server. Nothing changes, or the round ends by name."""

    def check_server_refuses(
        self,
        federation: Federation,
        raw: object,
        error: type[ProtocolError],
        match: str | None = None,
    ) -> None:
        phase = federation.server._phase
        total = getattr(phase, "total", np.zeros(0)).tolist()
        with pytest.raises(error, match=match) as caught:
            federation.server.receive(raw)
        assert type(caught.value) is error
        assert federation.server._phase is phase
        assert getattr(phase, "total", np.zeros(0)).tolist() == total

    def test_a_vector_that_comes_late_is_not_looked_at(self, federation: Federation) -> None:
        deliveries = federation.until(Delivery)
        late = bytearray(federation.tell(COLLUDER, deliveries.pop(COLLUDER)))
        federation.send(deliveries)
        asked = federation.close()
        late[8:16] = bytes(8)  # not even its signature is
        self.check_server_refuses(
            federation, bytes(late), LateMessage, "client 4 came after its step"
        )
        assert asked.keys() == {0, 1, 2, 3}
        while asked:
            federation.send(asked)
            asked = federation.close()
        assert federation.server.total.tolist() == federation.sum_of((0, 1, 2, 3)).tolist()

    def test_every_step_has_its_kind_of_message(self, federation: Federation) -> None:
        answers, messages = [], federation.begin()
        while messages:
            answers.append(bytes(federation.tell(VICTIM, messages[VICTIM])))
            for late in answers[:-1]:
                self.check_server_refuses(federation, late, LateMessage)
            federation.send(messages)
            self.check_server_refuses(federation, answers[-1], DuplicateMessage, "client 0")
            messages = federation.close()
        with pytest.raises(WrongTerms, match="no attempt at work"):
            federation.server.receive(answers[-1])

    @pytest.mark.parametrize("kind", [Invite, Advertised, Delivery, Survivors, Agreements])
    def test_a_message_by_someone_else_or_too_early(
        self, federation: Federation, kind: type
    ) -> None:
        messages = federation.until(kind)
        answer = bytes(federation.tell(VICTIM, messages[VICTIM]))
        forged = answer[:-64] + Identity.new().sign(b"")
        self.check_server_refuses(federation, forged, BadSignature)
        if kind is not Agreements:
            step = federation.state(VICTIM).step
            early = sign(Reveal(*step, VICTIM, [], []), federation.identities[VICTIM])
            self.check_server_refuses(federation, early, OutOfOrder, "Reveal")
        federation.server.receive(answer)
        other = bytearray(answer)
        other[-70] ^= 1  # of a second message of the step not even the signature is checked
        with pytest.raises(ProtocolError):
            federation.server.receive(bytes(other))

    def test_a_phase_takes_messages_of_its_own_attempt_only(self, federation: Federation) -> None:
        """The session finds the phase by the attempt; the phase checks it all the same."""
        old = bytes(federation.tell(VICTIM, federation.until(Advertised)[VICTIM]))
        federation.until(Advertised)
        with pytest.raises(WrongTerms, match="another attempt"):
            federation.server._phase.receive(decode_client(old, federation.terms))

    def test_a_client_that_is_not_invited(self, federation: Federation) -> None:
        messages = _single(federation.server.begin(1, (0, 1, 2, 3), MODEL))
        keys = federation.tell(OTHER, messages[OTHER])
        stranger = federation.resigned(
            bytes(keys), federation.identities[COLLUDER], client=COLLUDER
        )
        self.check_server_refuses(federation, stranger, UnknownClient, "no place")

    @pytest.mark.parametrize("size", [0, 71])
    def test_truncated_messages(self, federation: Federation, size: int) -> None:
        answer = bytes(federation.tell(VICTIM, federation.until(Delivery)[VICTIM]))
        self.check_server_refuses(federation, answer[:size], MalformedMessage, "no message")
        self.check_server_refuses(federation, answer[:-1], MalformedMessage, "add up")

    def test_oversized_messages(self, federation: Federation) -> None:
        answer = bytes(federation.tell(VICTIM, federation.until(Delivery)[VICTIM]))
        self.check_server_refuses(federation, answer + bytes(5000), OversizedMessage, "more than")
        long = (2000).to_bytes(4, "little") + answer[4:]
        self.check_server_refuses(federation, long, OversizedMessage, "header of 2000")

    def test_a_payload_where_none_belongs(self, federation: Federation) -> None:
        answer = bytes(federation.tell(VICTIM, federation.begin()[VICTIM]))
        header = int.from_bytes(answer[:4], "little")
        padded = answer[:4] + (4).to_bytes(4, "little") + bytes(4) + answer[8:]
        assert len(padded) == 8 + 4 + header + 64
        self.check_server_refuses(federation, padded, MalformedMessage, "4 bytes of payload")

    def test_a_vector_of_another_length(self, federation: Federation) -> None:
        answer = bytes(federation.tell(VICTIM, federation.until(Delivery)[VICTIM]))
        length = int.from_bytes(answer[4:8], "little")
        shorter = answer[:4] + (length - 4).to_bytes(4, "little") + answer[12:]
        self.check_server_refuses(federation, shorter, MalformedMessage, "20 bytes of payload")

    def test_a_vector_that_was_changed_on_its_way(self, federation: Federation) -> None:
        answer = bytearray(federation.tell(VICTIM, federation.until(Delivery)[VICTIM]))
        answer[8] ^= 1
        self.check_server_refuses(federation, bytes(answer), BadSignature)

    def test_shares_for_others_than_the_neighbours(self, federation: Federation) -> None:
        shown = federation.until(Advertised)
        answer = bytes(federation.tell(COLLUDER, shown[COLLUDER]))
        sealed = decode_client(answer, federation.terms).message.sealed
        for wrong in (sealed[1:], [*sealed, (COLLUDER, bytes(92))], sealed[::-1]):
            raw = federation.resigned(answer, federation.identities[COLLUDER], sealed=wrong)
            self.check_server_refuses(federation, raw, BadShare, "than its neighbours")

    def test_a_signature_on_other_survivors(self, federation: Federation) -> None:
        answer = bytes(federation.tell(COLLUDER, federation.until(Survivors)[COLLUDER]))
        for field, error in (("survivors", InvalidSurvivors), ("context", ModelMismatch)):
            raw = federation.resigned(answer, federation.identities[COLLUDER], **{field: bytes(32)})
            self.check_server_refuses(federation, raw, error, "client 4 signed")

    def test_shares_of_secrets_nobody_asked_for(self, federation: Federation) -> None:
        answer = bytes(federation.tell(COLLUDER, federation.until(Agreements)[COLLUDER]))
        message = decode_client(answer, federation.terms).message
        for fields in (
            {"seeds": message.seeds[1:]},
            {"mask_keys": message.seeds[:1]},
            {"seeds": message.seeds[1:], "mask_keys": message.seeds[:1]},
        ):
            raw = federation.resigned(answer, federation.identities[COLLUDER], **fields)
            self.check_server_refuses(federation, raw, BadShare, "other shares")

    @pytest.mark.parametrize("kind", [Invite, Advertised, Delivery])
    def test_too_few_answers_end_an_attempt(self, federation: Federation, kind: type) -> None:
        with pytest.raises(TooFewClients, match="3 .*, and 4 are needed"):
            federation.run(silent={kind: [3, 4]})
        assert federation.run().tolist() == federation.sum_of(range(5)).tolist()

    def test_too_few_signatures_end_an_attempt(self, federation: Federation) -> None:
        with pytest.raises(TooFewSignatures, match="3 clients signed"):
            federation.run(silent={Survivors: [3, 4]})
        assert federation.run().tolist() == federation.sum_of(range(5)).tolist()

    def test_too_few_reveals_end_a_round_for_good(self, federation: Federation) -> None:
        with pytest.raises(TooFewClients, match="3 shares of a secret of client 0"):
            federation.run(silent={Agreements: [3, 4]})
        with pytest.raises(ReplayedRound):
            federation.run()

    @pytest.mark.parametrize("wrong", ["seed", "mask key"])
    def test_a_client_that_shares_another_secret_than_its_own(
        self, federation: Federation, monkeypatch: pytest.MonkeyPatch, wrong: str
    ) -> None:
        """The mask key is wanted only if the client drops out."""
        messages = federation.until(Advertised)
        state = federation.state(COLLUDER)
        secret = state.seed if wrong == "seed" else state.mask_key

        def lie(shared: bytes, threshold: int, holders: list[int]) -> dict[int, bytes]:
            return share_secret(new_secret() if shared == secret else shared, threshold, holders)

        monkeypatch.setattr(steps, "share_secret", lie)
        silent = [COLLUDER] if wrong == "mask key" else []
        with pytest.raises(WrongRebuiltKey, match=f"{wrong} of client 4"):
            federation.finish(messages, {Delivery: silent})
        assert federation.server.total is None

    def test_a_holder_that_reveals_a_wrong_share(self, federation: Federation) -> None:
        """The wrong secret is named; whose fault it is cannot be told."""
        messages = federation.until(Agreements)
        for client, message in messages.items():
            answer = bytes(federation.tell(client, message))
            if client == OTHER:
                seeds = decode_client(answer, federation.terms).message.seeds
                seeds[2] = (2, new_secret())
                answer = federation.resigned(answer, federation.identities[OTHER], seeds=seeds)
            federation.server.receive(answer)
        with pytest.raises(WrongRebuiltKey, match="seed of client 2"):
            federation.server.close()

    def test_a_share_that_is_no_element_of_the_field(self, federation: Federation) -> None:
        messages = federation.until(Agreements)
        for client, message in messages.items():
            answer = bytes(federation.tell(client, message))
            if client == OTHER:
                seeds = decode_client(answer, federation.terms).message.seeds
                seeds[2] = (2, PRIME.to_bytes(32, "little"))
                answer = federation.resigned(answer, federation.identities[OTHER], seeds=seeds)
            federation.server.receive(answer)
        with pytest.raises(BadShare, match="no element of the field"):
            federation.server.close()

    def test_a_sealed_share_opens_for_its_holder_and_attempt_only(self) -> None:
        secrets = {k: new_secret() for k in "uv"}
        public = {k: public_key(secret) for k, secret in secrets.items()}
        step = (bytes(32), 1, 1)
        shared = exchange(private_key(secrets["u"]), public["v"])
        sealed = ShareBox(shared, step, 0, 1).seal(b"s" * 64)
        key = exchange(private_key(secrets["v"]), public["u"])
        assert ShareBox(key, step, 0, 1).open(sealed) == b"s" * 64
        for other in (
            (step, 1, 0),
            (step, 0, 2),
            ((bytes(32), 1, 2), 0, 1),
            ((bytes(32), 2, 1), 0, 1),
            ((b"x" * 32, 1, 1), 0, 1),
        ):
            with pytest.raises(BadShare, match="does not open"):
                ShareBox(key, *other).open(sealed)


class TestWhatHasToWork:
    """A protocol that refuses everything would pass the tests above."""

    def test_a_retry_after_an_abort_has_fresh_keys_and_the_same_vectors(
        self, federation: Federation
    ) -> None:
        shown = federation.until(Agreements)
        wrong = federation.changed(shown[VICTIM], agreements=[])
        with pytest.raises(TooFewSignatures):
            federation.tell(VICTIM, wrong)
        assert isinstance(federation.state(VICTIM), Aborted)
        assert isinstance(federation.state(OTHER), HasAgreed)
        found = federation.run(silent={Delivery: [OTHER]})
        assert found.tolist() == federation.sum_of((0, 2, 3, 4)).tolist()
        assert federation.state(VICTIM).attempt == 2

    def test_many_rounds_on_one_model(self, federation: Federation) -> None:
        for number in range(1, 8):
            for client in federation.cohort:
                federation.vectors[client] = federation.vectors[client] * np.uint32(3)
            dropped = number % 5
            found = federation.run(number, {Delivery: [dropped]})
            survivors = set(federation.cohort) - {dropped}
            assert found.tolist() == federation.sum_of(survivors).tolist()

    def test_a_client_whose_whole_neighbourhood_dropped_out_leaves_no_mask(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Groups of three: one of them drops out, and nothing of it has to be rebuilt."""
        groups = {k: frozenset(range(k - k % 3, k - k % 3 + 3)) - {k} for k in range(9)}
        for module in (steps, server_steps):
            monkeypatch.setattr(module, "neighbours", lambda client, *_: groups[client])
        floors = Thresholds(9, colluders=1, signatures=6, survivors=6, neighbours=2, shares=2)
        federation = Federation(9, floors).opened()
        found = federation.run(silent={Delivery: [3, 4, 5]})
        assert found.tolist() == federation.sum_of((0, 1, 2, 6, 7, 8)).tolist()

    def test_a_first_update_of_exactly_zero(self) -> None:
        federation, grid = Federation(5).opened(), FixedPoint(5, 1.0)
        for client in federation.cohort:
            coins = Keystream(bytes([client]) * 32)
            grid.encode(np.zeros(6), coins, federation.vectors[client])
        mean = grid.decode(federation.run(silent={Delivery: [2]}), 4) / 4
        assert mean.tolist() == [0.0] * 6


class TestHonestButCurious:
    """Terms that leave the signatures out, by name."""

    def test_one_exchange_less_remains_and_the_sum_is_the_same(self) -> None:
        federation = Federation(5, consistency=False).opened()
        kinds, messages = [], federation.begin()
        while messages:
            kind = type(federation.read(messages[VICTIM]))
            kinds.append(kind)
            federation.send(messages, [3] if kind is Delivery else [])
            messages = federation.close()
        assert kinds == [Invite, Advertised, Delivery, Survivors]
        assert federation.server.total.tolist() == federation.sum_of((0, 1, 2, 4)).tolist()
        assert isinstance(federation.state(VICTIM), HasRevealed)

    def test_terms_with_signatures_reveal_nothing_without_them(
        self, federation: Federation
    ) -> None:
        federation.send(federation.until(Survivors))
        state = federation.state(VICTIM)
        party = Party(federation.terms, VICTIM, federation.identities[VICTIM])
        with pytest.raises(TooFewSignatures, match="no signatures"):
            steps.reveal(party, state, None)

    def test_both_kinds_of_terms_meet_in_no_session(self) -> None:
        strict = Federation(5)
        loose = Federation(5, consistency=False, identities=strict.identities)
        with pytest.raises(WrongTerms):
            strict.server.receive(loose.clients[0].commit())


def _single(exchange: dict[int, list[bytes]]) -> Messages:
    return {client: message for client, (message,) in exchange.items()}
