"""Attacks on an attempt, one per rule: each is refused by its name, and the attempt is over."""

import msgspec
import pytest
from secagg_attackers import Federation, Messages, check_refused, check_refused_and_alive, replaced

from fedsa_secure.errors import (
    BadShare,
    BadSignature,
    ConfigError,
    Equivocation,
    InvalidSurvivors,
    KeySubstitution,
    MalformedMessage,
    ModelMismatch,
    OutOfOrder,
    OversizedMessage,
    ProtocolError,
    ReplayedRound,
    TooFewClients,
    TooFewSignatures,
    UnknownClient,
    WrongOpening,
    WrongTerms,
)
from fedsa_secure.secagg import Identity, Party, ServerSession, Thresholds
from fedsa_secure.secagg import client as steps
from fedsa_secure.secagg.derivation import digest
from fedsa_secure.secagg.keys import public_key
from fedsa_secure.secagg.shamir import new_secret
from fedsa_secure.secagg.states import HasAgreed, HasKeys, HasMasked, HasRevealed, HasShared
from fedsa_secure.secagg.wire import (
    Advertised,
    Agreements,
    Commitments,
    Delivery,
    Invite,
    Opened,
    Survivors,
)

VICTIM, OTHER, COLLUDER = 0, 1, 4


@pytest.fixture
def federation() -> Federation:
    """Five clients, of whom at most one colludes; four have to sign and to survive."""
    return Federation(5).opened()


class TestIdentities:
    """Rule 1: keys are their owner's, fresh, and for this attempt."""

    @pytest.fixture
    def shown(self, federation: Federation) -> Messages:
        """What the server shows as keys."""
        return federation.until(Advertised)

    def check_attack(
        self,
        federation: Federation,
        shown: Messages,
        raw: list[bytes],
        error: type[ProtocolError],
        match: str | None = None,
    ) -> None:
        message = federation.changed(shown[VICTIM], advertises=raw)
        check_refused(federation, VICTIM, message, error, shown[VICTIM], match)

    def test_keys_that_the_server_signed_itself(
        self, federation: Federation, shown: Messages
    ) -> None:
        raw = federation.read(shown[VICTIM]).advertises
        key = public_key(new_secret())
        forged = federation.resigned(
            raw[OTHER], Identity.new(), mask_key=key, sealing_key=key[::-1]
        )
        self.check_attack(federation, shown, replaced(raw, OTHER, forged), BadSignature)

    def test_keys_that_another_client_signed(self, federation: Federation, shown: Messages) -> None:
        raw = federation.read(shown[VICTIM]).advertises
        forged = federation.resigned(
            raw[OTHER], federation.identities[COLLUDER], mask_key=public_key(new_secret())
        )
        self.check_attack(federation, shown, replaced(raw, OTHER, forged), BadSignature)

    @pytest.mark.parametrize("field", ["mask_key", "sealing_key", "seed_commitment"])
    def test_one_value_changed_under_the_owners_signature(
        self, federation: Federation, shown: Messages, field: str
    ) -> None:
        raw = federation.read(shown[VICTIM]).advertises
        changed = federation.resigned(raw[OTHER], Identity.new(), **{field: b"\x09" * 32})
        changed = changed[:-64] + raw[OTHER][-64:]
        self.check_attack(federation, shown, replaced(raw, OTHER, changed), BadSignature)

    def test_a_clients_keys_under_another_number(
        self, federation: Federation, shown: Messages
    ) -> None:
        raw = federation.read(shown[VICTIM]).advertises
        moved = federation.resigned(raw[OTHER], federation.identities[OTHER], client=2)
        self.check_attack(federation, shown, replaced(raw, 2, moved), BadSignature)

    def test_a_colluder_that_shows_the_keys_of_another(
        self, federation: Federation, shown: Messages
    ) -> None:
        raw = federation.read(shown[VICTIM]).advertises
        stolen = federation.resigned(raw[OTHER], federation.identities[COLLUDER], client=COLLUDER)
        self.check_attack(
            federation, shown, replaced(raw, COLLUDER, stolen), KeySubstitution, "twice"
        )

    def test_a_colluder_with_one_key_for_two_purposes(
        self, federation: Federation, shown: Messages
    ) -> None:
        raw, key = federation.read(shown[VICTIM]).advertises, public_key(new_secret())
        same = federation.resigned(
            raw[COLLUDER], federation.identities[COLLUDER], mask_key=key, sealing_key=key
        )
        self.check_attack(
            federation, shown, replaced(raw, COLLUDER, same), KeySubstitution, "twice"
        )

    def test_keys_of_an_earlier_attempt(self, federation: Federation, shown: Messages) -> None:
        old = federation.read(shown[VICTIM]).advertises
        shown = federation.until(Advertised)
        raw = replaced(federation.read(shown[VICTIM]).advertises, OTHER, old[OTHER])
        self.check_attack(federation, shown, raw, WrongTerms, "another attempt")

    def test_keys_of_an_earlier_round(self, federation: Federation, shown: Messages) -> None:
        old = federation.read(shown[VICTIM]).advertises
        shown = federation.until(Advertised, round_number=2)
        raw = replaced(federation.read(shown[VICTIM]).advertises, OTHER, old[OTHER])
        self.check_attack(federation, shown, raw, WrongTerms, "another attempt")

    def test_keys_of_an_earlier_session(self, federation: Federation, shown: Messages) -> None:
        old = federation.read(shown[VICTIM]).advertises
        shown = federation.opened().until(Advertised)
        raw = replaced(federation.read(shown[VICTIM]).advertises, OTHER, old[OTHER])
        self.check_attack(federation, shown, raw, WrongTerms, "another attempt")

    def test_keys_under_other_terms(self, federation: Federation, shown: Messages) -> None:
        raw = federation.read(shown[VICTIM]).advertises
        other = federation.resigned(raw[OTHER], federation.identities[OTHER], terms=bytes(32))
        self.check_attack(federation, shown, replaced(raw, OTHER, other), WrongTerms)

    def test_the_own_keys_left_out(self, federation: Federation, shown: Messages) -> None:
        raw = federation.read(shown[VICTIM]).advertises[1:]
        self.check_attack(federation, shown, raw, KeySubstitution, "its own keys")

    def test_a_client_that_is_on_no_roster(self, federation: Federation, shown: Messages) -> None:
        raw, sybil = federation.read(shown[VICTIM]).advertises, Identity.new()
        key = public_key(new_secret())
        extra = federation.resigned(raw[OTHER], sybil, client=9, mask_key=key, sealing_key=key)
        self.check_attack(federation, shown, [*raw[:4], extra], UnknownClient, "not on the roster")

    def test_a_key_shown_twice(self, federation: Federation, shown: Messages) -> None:
        raw = federation.read(shown[VICTIM]).advertises
        self.check_attack(federation, shown, [*raw[:4], raw[3]], MalformedMessage, "order")

    def test_another_message_of_the_same_client(
        self, federation: Federation, shown: Messages
    ) -> None:
        raw = federation.read(shown[VICTIM]).advertises
        shares = bytes(federation.tell(OTHER, shown[OTHER]))
        self.check_attack(
            federation, shown, replaced(raw, OTHER, shares), MalformedMessage, "Shares"
        )

    def test_a_colluders_key_of_small_order(self, federation: Federation, shown: Messages) -> None:
        """The secret that it would share with everybody is zero: RFC 7748 §6.1 and §7."""
        raw = federation.read(shown[VICTIM]).advertises
        small = federation.resigned(
            raw[COLLUDER], federation.identities[COLLUDER], sealing_key=bytes(32)
        )
        self.check_attack(
            federation, shown, replaced(raw, COLLUDER, small), KeySubstitution, "small"
        )

    def test_a_colluders_mask_key_of_small_order(self, federation: Federation) -> None:
        federation.send(invites := federation.begin())
        shown = federation.close()
        raw = federation.read(shown[VICTIM]).advertises
        weak = (1).to_bytes(32, "little")
        small = federation.resigned(raw[COLLUDER], federation.identities[COLLUDER], mask_key=weak)
        for client in federation.cohort[:COLLUDER]:
            raw = replaced(federation.read(shown[client]).advertises, COLLUDER, small)
            message = federation.changed(shown[client], advertises=raw)
            federation.server.receive(federation.tell(client, message))
        federation.server.receive(federation.tell(COLLUDER, shown[COLLUDER]))
        delivery = federation.close()
        assert invites.keys() == delivery.keys()
        check_refused(
            federation, VICTIM, delivery[VICTIM], KeySubstitution, delivery[VICTIM], "small order"
        )

    def test_a_round_without_this_client_in_it(self, federation: Federation) -> None:
        invite = federation.begin()[VICTIM]
        federation.clients[VICTIM]._cohort_of = lambda _: (1, 2, 3, 4)
        with pytest.raises(UnknownClient, match="no place"):
            federation.tell(VICTIM, invite)
        federation.clients[VICTIM]._cohort_of = lambda _: (0, 1, 2)
        with pytest.raises(UnknownClient, match="no place"):
            federation.tell(VICTIM, invite)
        assert federation.clients[VICTIM].state.attempts == {}


class TestThresholds:
    """Rule 2: a client takes its floors from nobody."""

    def test_fewer_keys_than_shares_that_rebuild(self, federation: Federation) -> None:
        shown = federation.until(Advertised)[VICTIM]
        fewer = federation.changed(shown, advertises=federation.read(shown).advertises[:3])
        check_refused(federation, VICTIM, fewer, TooFewClients, shown, "3 clients advertised")

    def test_fewer_members_than_the_floor(self, federation: Federation) -> None:
        delivery = federation.until(Delivery)[VICTIM]
        sealed = federation.read(delivery).sealed[:2]
        fewer = federation.changed(delivery, members=[0, 1, 2], sealed=sealed)
        check_refused(federation, VICTIM, fewer, TooFewClients, delivery, "3 members")

    def test_fewer_survivors_than_the_floor(self, federation: Federation) -> None:
        asked = federation.until(Survivors)[VICTIM]
        fewer = federation.changed(asked, survivors=[0, 1, 2], dropped=[3, 4])
        check_refused(federation, VICTIM, fewer, TooFewClients, asked, "3 survivors")

    def test_an_own_floor_above_the_signatures_holds(self) -> None:
        floors = Thresholds.of(5, survivors=5)
        federation = Federation(5, floors).opened()
        asked = federation.until(Survivors)[VICTIM]
        fewer = federation.changed(asked, survivors=[0, 1, 2, 3], dropped=[4])
        check_refused(federation, VICTIM, fewer, TooFewClients, asked, "and 5 are needed")

    def test_fewer_signatures_than_the_threshold(self, federation: Federation) -> None:
        shown = federation.until(Agreements)[VICTIM]
        fewer = federation.changed(shown, agreements=federation.read(shown).agreements[:3])
        check_refused(federation, VICTIM, fewer, TooFewSignatures, shown, "3 signatures")

    @pytest.mark.parametrize("changed", [{"colluders": 0}, {"colluders": 2}, {"survivors": 5}])
    def test_a_client_with_other_floors_is_in_no_session(self, changed: dict[str, int]) -> None:
        """The floors are in the hash of the terms, so nobody is talked into lower ones."""
        ours, theirs = Federation(5), None
        theirs = Federation(5, Thresholds.of(5, **changed), identities=ours.identities)
        with pytest.raises(WrongTerms, match="other terms"):
            ours.server.receive(theirs.clients[OTHER].commit())

    @pytest.mark.parametrize("clients", [0, 1, 2])
    def test_fewer_than_three_clients_are_refused(self, clients: int) -> None:
        with pytest.raises(ConfigError, match="at least 3 clients") as caught:
            Thresholds.of(clients)
        assert caught.value.option == "secure_aggregation"

    @pytest.mark.parametrize(
        ("given", "option"),
        [
            ({"colluders": -1}, "colluders"),
            ({"colluders": 9}, "colluders"),
            ({"colluders": 10}, "colluders"),
            ({"signatures": 6}, "threshold"),  # 2t > n + c fails by one
            ({"colluders": 0, "signatures": 5}, "threshold"),
            ({"signatures": 11}, "threshold"),
            ({"signatures": 0}, "threshold"),
            ({"survivors": 6}, "min_survivors"),
            ({"survivors": 11}, "min_survivors"),
            ({"colluders": 8, "signatures": 10, "survivors": 9}, "min_survivors"),
        ],
    )
    def test_floors_that_protect_nobody_are_refused_by_the_name_of_the_option(
        self, given: dict[str, int], option: str
    ) -> None:
        with pytest.raises(ConfigError, match=option) as caught:
            Thresholds.of(10, **given)
        assert caught.value.option == option

    def test_the_lowest_floors_that_protect_are_taken(self) -> None:
        assert Thresholds.of(10, colluders=3) == Thresholds(10, 3, 7, 7, 9, 7)
        assert Thresholds.of(10, colluders=0) == Thresholds(10, 0, 6, 6, 9, 6)
        assert Thresholds.of(10, colluders=8) == Thresholds(10, 8, 10, 10, 9, 10)
        assert Thresholds.of(3) == Thresholds(3, 1, 3, 3, 2, 3)
        assert Thresholds.of(3, colluders=0) == Thresholds(3, 0, 2, 3, 2, 2)

    def test_default_floors_keep_the_guarantee(self) -> None:
        for n in range(3, 130):
            floors = Thresholds.of(n)
            c, t, m = floors.colluders, floors.signatures, floors.survivors
            assert floors.clients == n
            assert c == max(1, (n - 1) // 3)
            assert n + c < 2 * t <= n + c + 2
            assert t <= m <= n
            assert m - c >= 2
            assert floors.complete == (n <= 100)

    def test_three_clients_survive_no_dropout(self) -> None:
        federation = Federation(3).opened()
        with pytest.raises(TooFewClients, match="2 vectors arrived, and 3 are needed"):
            federation.run(silent={Delivery: [2]})
        asked = federation.until(Survivors)[VICTIM]
        fewer = federation.changed(asked, survivors=[0, 1], dropped=[2])
        check_refused(federation, VICTIM, fewer, TooFewClients, asked)
        assert federation.run().tolist() == federation.sum_of(range(3)).tolist()


class TestMembers:
    """Step 3: members are of the cohort, and each sealed its shares."""

    @pytest.mark.parametrize(
        ("members", "error", "match"),
        [
            ([1, 2, 3, 4], UnknownClient, "not with this client"),
            ([0, 1, 2, 3, 7], UnknownClient, "not of the cohort"),
            ([0, 1, 3, 2, 4], MalformedMessage, "order"),
            ([0, 1, 2, 3, 3], MalformedMessage, "order"),
            ([0, 1, 2, 3], BadShare, r"\[1, 2, 3\] are the neighbours"),
        ],
    )
    def test_other_members_than_the_shares_say(
        self, federation: Federation, members: list[int], error: type[ProtocolError], match: str
    ) -> None:
        delivery = federation.until(Delivery)[VICTIM]
        message = federation.changed(delivery, members=members)
        check_refused(federation, VICTIM, message, error, delivery, match)

    def test_a_member_whose_keys_were_never_shown(self, federation: Federation) -> None:
        shown = federation.until(Advertised)
        raw = federation.read(shown[VICTIM]).advertises
        shown[VICTIM] = federation.changed(shown[VICTIM], advertises=raw[:4])
        for client, message in shown.items():
            answer = federation.tell(client, message)
            if client != VICTIM:
                federation.server.receive(answer)
        sealed = [(owner, bytes(92)) for owner in (1, 2, 3, 4)]
        step = federation.state(VICTIM).step
        delivery = msgspec.msgpack.encode(Delivery(*step, [0, 1, 2, 3, 4], sealed))
        check_refused(federation, VICTIM, delivery, KeySubstitution, delivery, "no keys of")

    @pytest.mark.parametrize("place", [0, 12, 50, 91])
    def test_a_sealed_share_that_was_changed(self, federation: Federation, place: int) -> None:
        delivery = federation.until(Delivery)[VICTIM]
        (owner, sealed), *rest = federation.read(delivery).sealed
        changed = bytearray(sealed)
        changed[place] ^= 1
        message = federation.changed(delivery, sealed=[(owner, bytes(changed)), *rest])
        check_refused(federation, VICTIM, message, BadShare, delivery, "from client 1 does not")

    def test_a_sealed_share_of_another_pair(self, federation: Federation) -> None:
        deliveries = federation.until(Delivery)
        sealed = federation.read(deliveries[VICTIM]).sealed
        for wrong in (sealed[1][1], federation.read(deliveries[2]).sealed[1][1]):
            message = federation.changed(deliveries[VICTIM], sealed=[(1, wrong), *sealed[1:]])
            state = federation.clients[VICTIM].state
            check_refused(federation, VICTIM, message, BadShare, deliveries[VICTIM])
            federation.clients[VICTIM].state = state

    def test_a_delivery_without_an_update_to_send(self, federation: Federation) -> None:
        delivery = federation.until(Delivery)[VICTIM]
        with pytest.raises(OutOfOrder, match="no update"):
            federation.clients[VICTIM].receive(delivery)
        with pytest.raises(OutOfOrder, match="Aborted"):
            federation.tell(VICTIM, delivery)


class TestOneSet:
    """Rule 3: all who reveal, reveal for one set of survivors."""

    @pytest.mark.parametrize(
        ("survivors", "dropped", "error", "match"),
        [
            ([0, 1, 2, 3, 4], [4], InvalidSurvivors, r"\[4\] are called survivors and dropped"),
            ([0, 1, 2, 3], [0, 4], InvalidSurvivors, "survivors and dropped"),
            ([1, 2, 3, 4], [0], InvalidSurvivors, "asked about itself"),
            ([0, 1, 2, 3], [], InvalidSurvivors, "not the members"),
            ([0, 1, 2, 3, 4], [5], InvalidSurvivors, "not the members"),
            ([1, 0, 2, 3, 4], [], MalformedMessage, "order"),
            ([0, 1, 2, 3, 3], [4], MalformedMessage, "order"),
            ([0, 1, 2], [4, 3], MalformedMessage, "order"),
        ],
    )
    def test_sets_that_no_client_signs(
        self,
        federation: Federation,
        survivors: list[int],
        dropped: list[int],
        error: type[ProtocolError],
        match: str,
    ) -> None:
        asked = federation.until(Survivors)[VICTIM]
        message = federation.changed(asked, survivors=survivors, dropped=dropped)
        check_refused(federation, VICTIM, message, error, asked, match)

    def test_a_second_set_after_the_first_was_signed(self, federation: Federation) -> None:
        asked = federation.until(Survivors)[VICTIM]
        federation.tell(VICTIM, asked)
        second = federation.changed(asked, survivors=[0, 1, 2, 3], dropped=[4])
        check_refused(federation, VICTIM, second, OutOfOrder, asked, "HasAgreed")

    def test_two_sets_for_two_halves_of_the_clients(self, federation: Federation) -> None:
        """Each half gets every signature there is; nobody reveals."""
        asked = federation.until(Survivors)
        fewer = federation.changed(asked[0], survivors=[0, 1, 2, 3], dropped=[4])
        told = {0: asked[0], 1: asked[1], 2: fewer, 3: fewer, 4: asked[4]}
        signed = {client: bytes(federation.tell(client, told[client])) for client in told}
        step = federation.state(VICTIM).step
        shown = msgspec.msgpack.encode(Agreements(*step, list(signed.values())))
        for client in (0, 1, 2, 3):
            check_refused(federation, client, shown, Equivocation, shown, "other survivors")

    def test_a_half_that_is_shown_its_own_signatures_only(self, federation: Federation) -> None:
        """A colluder signs both sets, and it is not enough for either."""
        asked = federation.until(Survivors)
        fewer = federation.changed(asked[0], survivors=[0, 2, 3, 4], dropped=[1])
        signed = {0: federation.tell(0, asked[0]), 1: federation.tell(1, asked[1])}
        signed |= {2: federation.tell(2, fewer), 3: federation.tell(3, fewer)}
        colluding = bytes(federation.tell(COLLUDER, asked[COLLUDER]))
        other = federation.resigned(
            colluding, federation.identities[COLLUDER], survivors=digest("survivors", (0, 2, 3, 4))
        )
        step = federation.state(VICTIM).step
        for half, from_colluder in (((0, 1), colluding), ((2, 3), other)):
            raw = [*(bytes(signed[client]) for client in half), from_colluder]
            shown = msgspec.msgpack.encode(Agreements(*step, raw))
            for client in half:
                check_refused(federation, client, shown, TooFewSignatures, shown)

    def check_attack(
        self,
        federation: Federation,
        shown: Messages,
        raw: list[bytes],
        error: type[ProtocolError],
        match: str | None = None,
    ) -> None:
        message = federation.changed(shown[VICTIM], agreements=raw)
        check_refused(federation, VICTIM, message, error, shown[VICTIM], match)

    def test_a_signature_of_another_attempt(self, federation: Federation) -> None:
        old = federation.read(federation.until(Agreements)[VICTIM]).agreements
        shown = federation.until(Agreements)
        raw = federation.read(shown[VICTIM]).agreements
        self.check_attack(federation, shown, replaced(raw, OTHER, old[OTHER]), WrongTerms)

    def test_a_signature_by_someone_else(self, federation: Federation) -> None:
        shown = federation.until(Agreements)
        raw = federation.read(shown[VICTIM]).agreements
        forged = federation.resigned(raw[OTHER], Identity.new())
        self.check_attack(federation, shown, replaced(raw, OTHER, forged), BadSignature)

    def test_a_signature_of_no_member(self, federation: Federation) -> None:
        """Client 4 sent no shares, so it is no member, and signs all the same."""
        shown = federation.until(Agreements, silent={Advertised: [COLLUDER]})
        raw = federation.read(shown[VICTIM]).agreements
        extra = federation.resigned(raw[3], federation.identities[COLLUDER], client=COLLUDER)
        self.check_attack(federation, shown, [*raw, extra], UnknownClient, "no member")

    def test_one_signature_counted_twice(self, federation: Federation) -> None:
        shown = federation.until(Agreements)
        raw = federation.read(shown[VICTIM]).agreements
        self.check_attack(federation, shown, [*raw[:3], raw[2]], MalformedMessage, "order")

    def test_the_own_signature_left_out(self, federation: Federation) -> None:
        shown = federation.until(Agreements)
        raw = federation.read(shown[VICTIM]).agreements
        self.check_attack(federation, shown, raw[1:], TooFewSignatures, "itself is missing")

    def test_another_message_among_the_signatures(self, federation: Federation) -> None:
        shares = bytes(federation.tell(OTHER, federation.until(Advertised)[OTHER]))
        shown = federation.until(Agreements)
        raw = federation.read(shown[VICTIM]).agreements
        self.check_attack(
            federation, shown, replaced(raw, OTHER, shares), MalformedMessage, "Shares"
        )

    def test_a_colluder_with_another_context(self, federation: Federation) -> None:
        shown = federation.until(Agreements)
        raw = federation.read(shown[VICTIM]).agreements
        other = federation.resigned(raw[4], federation.identities[COLLUDER], context=bytes(32))
        self.check_attack(
            federation, shown, replaced(raw, COLLUDER, other), ModelMismatch, "client 4"
        )


class TestOpening:
    """docs/protocol.md §7: nobody chooses the id of a session."""

    @pytest.fixture
    def commitments(self) -> tuple[Federation, bytes]:
        federation = Federation(5)
        for client in federation.clients.values():
            federation.server.receive(client.commit())
        return federation, federation.server.close()[VICTIM][0]

    @pytest.fixture
    def opened(self, commitments: tuple[Federation, bytes]) -> tuple[Federation, bytes]:
        federation, message = commitments
        for client in federation.clients.values():
            federation.server.receive(client.receive(message))
        return federation, federation.server.close()[VICTIM][0]

    def check_no_session(
        self,
        federation: Federation,
        message: bytes,
        error: type[ProtocolError],
        match: str | None = None,
    ) -> None:
        with pytest.raises(error, match=match):
            federation.tell(VICTIM, message)
        assert federation.clients[VICTIM].state.sid == b""

    def test_the_own_commitment_left_out(self, commitments: tuple[Federation, bytes]) -> None:
        federation, message = commitments
        fewer = federation.changed(message, commits=federation.read(message).commits[1:])
        self.check_no_session(federation, fewer, WrongOpening, "own commitment")

    def test_an_earlier_commitment_of_ones_own(self) -> None:
        federation = Federation(3)
        old = federation.clients[VICTIM].commit()
        raw = [old, *(federation.clients[k].commit() for k in (1, 2))]
        federation.clients[VICTIM].commit()
        message = msgspec.msgpack.encode(Commitments(federation.terms.hash, raw))
        self.check_no_session(federation, message, WrongOpening, "own commitment")

    def test_commitments_twice_or_out_of_order(self, commitments: tuple[Federation, bytes]) -> None:
        federation, message = commitments
        raw = federation.read(message).commits
        for wrong in ([raw[0], *raw], raw[::-1]):
            changed = federation.changed(message, commits=wrong)
            self.check_no_session(federation, changed, MalformedMessage, "order")

    def test_a_forged_commitment(self, commitments: tuple[Federation, bytes]) -> None:
        federation, message = commitments
        raw = federation.read(message).commits
        forged = federation.resigned(raw[OTHER], Identity.new(), commitment=bytes(32))
        changed = federation.changed(message, commits=replaced(raw, OTHER, forged))
        self.check_no_session(federation, changed, BadSignature)

    def test_commitments_and_nonces_under_other_terms(
        self, opened: tuple[Federation, bytes]
    ) -> None:
        federation, message = opened
        self.check_no_session(
            federation, federation.changed(message, terms=bytes(32)), WrongTerms, "nonces under"
        )
        federation.clients[VICTIM].commit()
        other = msgspec.msgpack.encode(Commitments(bytes(32), []))
        self.check_no_session(federation, other, WrongTerms, "commitments under")

    def test_another_commitment_list_after_the_nonce_is_out(
        self, commitments: tuple[Federation, bytes]
    ) -> None:
        federation, message = commitments
        nonce = federation.tell(VICTIM, message)
        fewer = federation.changed(message, commits=federation.read(message).commits[:4])
        self.check_no_session(federation, fewer, OutOfOrder, "shown before")
        assert federation.tell(VICTIM, message) == nonce  # the same ones again do no harm

    def test_a_nonce_that_stays_away(self, opened: tuple[Federation, bytes]) -> None:
        federation, message = opened
        fewer = federation.changed(message, opens=federation.read(message).opens[:4])
        self.check_no_session(federation, fewer, WrongOpening, "that committed")

    def test_a_colluder_that_thinks_better_of_its_nonce(
        self, opened: tuple[Federation, bytes]
    ) -> None:
        federation, message = opened
        raw = federation.read(message).opens
        other = federation.resigned(raw[COLLUDER], federation.identities[COLLUDER], nonce=bytes(32))
        changed = federation.changed(message, opens=replaced(raw, COLLUDER, other))
        self.check_no_session(federation, changed, WrongOpening, "nonce of client 4")

    def test_messages_of_the_wrong_kind(self, opened: tuple[Federation, bytes]) -> None:
        federation, message = opened
        commit = federation.clients[OTHER].commit()
        raw = federation.read(message).opens
        changed = federation.changed(message, opens=[commit, *raw[1:]])
        self.check_no_session(federation, changed, MalformedMessage, "where a nonce belongs")
        federation.clients[VICTIM].commit()
        changed = msgspec.msgpack.encode(Commitments(federation.terms.hash, [raw[0]]))
        self.check_no_session(federation, changed, MalformedMessage, "an? Open where a commitment")
        party = Party(federation.terms, OTHER, federation.identities[OTHER])
        _, keys = steps.advertise(party, Invite(bytes(32), 1, 1), federation.cohort)
        changed = msgspec.msgpack.encode(Commitments(federation.terms.hash, [keys]))
        self.check_no_session(federation, changed, MalformedMessage, "Advertise where a commitment")

    def test_nonces_before_commitments_and_an_opening_without_a_commitment(
        self, opened: tuple[Federation, bytes]
    ) -> None:
        federation, message = opened
        federation.clients[VICTIM].commit()
        self.check_no_session(federation, message, OutOfOrder, "before commitments")
        federation.clients[VICTIM] = federation.client(VICTIM)
        self.check_no_session(federation, message, OutOfOrder, "no session is being opened")

    def test_a_session_is_opened_once(self, opened: tuple[Federation, bytes]) -> None:
        federation, message = opened
        assert federation.tell(VICTIM, message) is None
        sid = federation.clients[VICTIM].state.sid
        with pytest.raises(OutOfOrder, match="no session is being opened"):
            federation.tell(VICTIM, message)
        assert federation.clients[VICTIM].state.sid == sid

    def test_the_server_repeats_an_opening_that_failed(self) -> None:
        federation = Federation(5)
        for client in federation.clients.values():
            federation.server.receive(client.commit())
        for client, (message,) in federation.server.close().items():
            if client != COLLUDER:
                federation.server.receive(federation.tell(client, message))
        with pytest.raises(WrongOpening):
            federation.server.close()
        server = federation.server
        assert federation.opened().run().tolist() == federation.sum_of(range(5)).tolist()
        server.receive(federation.clients[0].commit())  # the one that failed collects again
        with pytest.raises(TooFewClients, match="1 clients open a session that needs 4"):
            server.close()

    def test_what_the_server_refuses_in_an_opening(self) -> None:
        federation = Federation(5)
        server: ServerSession = federation.server
        commits = {k: client.commit() for k, client in federation.clients.items()}
        stranger = federation.resigned(commits[0], Identity.new(), client=9)
        nonce = federation.resigned(commits[0], federation.identities[0])
        server.receive(nonce)
        for raw, name in ((commits[0], "DuplicateMessage"), (stranger, "UnknownClient")):
            with pytest.raises(ProtocolError) as caught:
                server.receive(raw)
            assert type(caught.value).__name__ == name
        for client in (1, 2, 3, 4):
            server.receive(commits[client])
        exchange = server.close()
        with pytest.raises(OutOfOrder, match="Commit at another step"):
            server.receive(commits[1])
        first = federation.tell(0, exchange[0][0])
        server.receive(first)
        with pytest.raises(ProtocolError, match="opened its nonce"):
            server.receive(first)
        wrong = federation.resigned(bytes(first), federation.identities[1], client=1)
        with pytest.raises(WrongOpening, match="client 1"):
            server.receive(wrong)


class TestForm:
    """Rule 8: encodings and the order of steps."""

    def test_bytes_that_are_no_message(self, federation: Federation) -> None:
        """What belongs to no attempt ends all of them."""
        shown = federation.until(Advertised)[VICTIM]
        longest = 512 + 512 * 5
        for wrong, error in (
            (b"", MalformedMessage),
            (shown[:-1], MalformedMessage),
            (shown + b"\x00", MalformedMessage),
            (bytes(longest + 1), OversizedMessage),
            (b"\x91" * longest, MalformedMessage),  # nested as deeply as it is long
        ):
            before = federation.clients[VICTIM].state
            check_refused(federation, VICTIM, wrong, error, shown)
            federation.clients[VICTIM].state = before

    def test_a_second_encoding_of_a_message(self, federation: Federation) -> None:
        """MessagePack has several forms of a number; one of them counts."""
        invite = federation.begin()[VICTIM]
        assert invite[-2:] == b"\x01\x01"  # round and attempt in their shortest form
        longer = invite[:-1] + b"\xcc\x01"
        assert msgspec.msgpack.decode(longer) == msgspec.msgpack.decode(invite)
        with pytest.raises(MalformedMessage, match="not the one encoding"):
            federation.tell(VICTIM, longer)

    def test_a_message_of_another_session(self, federation: Federation) -> None:
        shown = federation.until(Advertised)[VICTIM]
        other = federation.changed(shown, sid=bytes(32))
        check_refused_and_alive(federation, VICTIM, other, WrongTerms, shown, "another session")

    def test_a_message_of_a_round_that_was_not_begun(self, federation: Federation) -> None:
        shown = federation.until(Advertised)[VICTIM]
        with pytest.raises(OutOfOrder, match="round 2 was not begun"):
            federation.tell(VICTIM, federation.changed(shown, round=2))
        assert isinstance(federation.state(VICTIM), HasKeys)  # another round's attempt lives on

    @pytest.mark.parametrize("kind", [Advertised, Delivery, Survivors, Agreements])
    def test_a_message_of_an_earlier_attempt(self, federation: Federation, kind: type) -> None:
        old = federation.until(kind)[VICTIM]
        new = federation.until(kind)[VICTIM]
        check_refused_and_alive(federation, VICTIM, old, ReplayedRound, new, "2 is going on")

    @pytest.mark.parametrize("first", [Advertised, Delivery, Survivors, Agreements])
    @pytest.mark.parametrize("then", [Advertised, Delivery, Survivors, Agreements])
    def test_steps_out_of_their_order(
        self, federation: Federation, first: type, then: type
    ) -> None:
        """Where ``first`` is due, ``then`` of the same attempt is refused."""
        messages: dict[type, bytes] = {}
        sent = federation.begin()
        while sent:
            messages[type(federation.read(sent[VICTIM]))] = sent[VICTIM]
            if type(federation.read(sent[VICTIM])) is first:
                before = federation.clients[VICTIM].state
            federation.send(sent)
            sent = federation.close()
        federation.clients[VICTIM].state = before
        federation.clients[VICTIM]._answers = {}
        if first is then:
            assert federation.tell(VICTIM, messages[then])
        else:
            check_refused(federation, VICTIM, messages[then], OutOfOrder, messages[first])

    def test_states_follow_the_protocol(self, federation: Federation) -> None:
        seen, messages = [], federation.begin()
        while messages:
            federation.send(messages)
            seen.append(type(federation.state(VICTIM)))
            messages = federation.close()
        assert seen == [HasKeys, HasShared, HasMasked, HasAgreed, HasRevealed]

    def test_an_opening_in_the_middle_of_a_session(self, federation: Federation) -> None:
        shown = federation.until(Advertised)[VICTIM]
        stray = msgspec.msgpack.encode(Opened(federation.terms.hash, []))
        check_refused_and_alive(federation, VICTIM, stray, OutOfOrder, shown, "no session")
