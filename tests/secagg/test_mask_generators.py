"""Two generators of masks: exact sums with both, one of them per session, and unrelated streams."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from secagg_attackers import Federation

from fedsa_secure.csprng import Block, ChaCha20Keystream, Keystream
from fedsa_secure.errors import ConfigError, ProtocolError, WrongOpening, WrongTerms
from fedsa_secure.secagg import ClientSession, Party, Terms
from fedsa_secure.secagg import client as steps
from fedsa_secure.secagg import server as server_steps
from fedsa_secure.secagg.keys import pairwise_mask_key, private_key, public_key, self_mask_key
from fedsa_secure.secagg.masks import Mask, apply_masks
from fedsa_secure.secagg.opening import nonce_commitment
from fedsa_secure.secagg.wire import (
    Advertised,
    Agreements,
    Commit,
    Commitments,
    Delivery,
    Invite,
    Survivors,
    encode_server,
    sign,
)

GENERATORS = ("aes-256-ctr", "chacha20")
OTHER = {"aes-256-ctr": "chacha20", "chacha20": "aes-256-ctr"}
generators = pytest.mark.parametrize("name", GENERATORS)


class Streams:
    """What masks were made with."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.used: list[Mask] = []

        def noted(vector: np.ndarray, masks: list[Mask]) -> None:
            self.used += masks
            apply_masks(vector, masks)

        patch.setattr(steps, "apply_masks", noted)
        patch.setattr(server_steps, "apply_masks", noted)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


# --- Sums -----------------------------------------------------------------------------------------


@generators
@pytest.mark.parametrize("step", [Invite, Advertised, Delivery, Survivors, Agreements, None])
def test_the_sum_is_exact_whoever_drops_out(name: str, step: type | None, streams: Streams) -> None:
    """One of five clients, at every step; a vector that is no multiple of a block."""
    federation = Federation(5, size=37, mask_generator=name).opened()
    total = federation.run(silent={step: [2]} if step else None)
    gone = step in (Invite, Advertised, Delivery)
    survivors = [0, 1, 3, 4] if gone else range(5)
    np.testing.assert_array_equal(total, federation.sum_of(survivors))
    assert {mask.generator for mask in streams.used} == {name}
    rebuilt = 4 if step is Delivery else 0  # streams of who shared keys and sent no vector
    clients, near = len(survivors), (3 if gone and not rebuilt else 4)
    assert len(streams.used) == clients * (1 + near) + clients + rebuilt


@generators
def test_a_masked_vector_is_the_plain_one_under_all_its_streams(name: str) -> None:
    """Masks cover what is sent: without any one of them it is another vector."""
    federation = Federation(3, size=40, mask_generator=name).opened()
    delivery = federation.until(Delivery)
    state = federation.state(0)
    ready = steps.deliver(
        Party(federation.terms, 0, federation.identities[0]),
        state,
        federation.read(delivery[0]),
        federation.models[0],
    )
    sent = np.frombuffer(federation.tell(0, delivery[0]), "<u4", 40, 8)
    for left_out in (None, *ready.masks):
        vector = sent.copy()
        masks = [m._replace(add=not m.add) for m in ready.masks if m != left_out]
        apply_masks(vector, masks)
        same = np.count_nonzero(vector == federation.vectors[0])
        assert same == 40 if left_out is None else same < 3


# --- A mix ----------------------------------------------------------------------------------------


def terms_with(federation: Federation, name: str) -> Terms:
    return replace(federation.terms, mask_generator=name)


@generators
def test_the_server_refuses_a_client_with_another_generator(name: str, streams: Streams) -> None:
    federation = Federation(4, mask_generator=name)
    stranger = Party(terms_with(federation, OTHER[name]), 1, federation.identities[1])
    session = ClientSession(stranger, lambda _: federation.cohort)
    with pytest.raises(WrongTerms, match=f"client 1 has .*={OTHER[name]!r}, and {name!r} is"):
        federation.server.receive(session.commit())
    assert streams.used == []


@generators
def test_a_client_refuses_another_one_with_another_generator(name: str, streams: Streams) -> None:
    """A server that passes it on does not help: no session is opened, and nobody masks."""
    federation = Federation(4, mask_generator=name)
    others = terms_with(federation, OTHER[name])
    commits = [federation.clients[0].commit()]
    for k in (1, 2, 3):
        terms = others if k == 1 else federation.terms
        commitment = nonce_commitment(terms, k, bytes(32))
        commits.append(sign(Commit(terms.hash, k, commitment), federation.identities[k]))
    shown = encode_server(Commitments(federation.terms.hash, commits))
    with pytest.raises(WrongTerms, match=f"client 1 has .*={OTHER[name]!r}"):
        federation.clients[0].receive(shown)
    with pytest.raises(WrongTerms, match=f"commitments under .*={OTHER[name]!r}"):
        federation.clients[0].receive(encode_server(Commitments(others.hash, commits)))
    with pytest.raises(ProtocolError):
        federation.clients[0].receive(encode_server(Invite(bytes(32), 1, 1)))
    assert streams.used == []


def test_terms_that_differ_in_more_are_other_terms() -> None:
    federation = Federation(4)
    others = replace(federation.terms, mask_generator="chacha20", size=7)
    assert federation.terms.other(others.hash) == "other terms"


def test_a_stored_state_is_good_for_its_generator_only() -> None:
    federation = Federation(4).opened()
    party = Party(terms_with(federation, "chacha20"), 0, federation.identities[0])
    with pytest.raises(WrongTerms):
        ClientSession(party, lambda _: federation.cohort, state=federation.clients[0].state)


@pytest.mark.parametrize("name", ["", "AES-256-CTR", "chacha", "philox"])
def test_a_generator_that_nobody_knows_makes_no_terms(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside these tests no types are checked, so the terms themselves have to refuse it."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match="'aes-256-ctr', 'chacha20'"):
        replace(Federation(3).terms, mask_generator=name)


def test_the_nonces_of_two_sessions_do_not_mix() -> None:
    """A nonce is committed to under its terms."""
    federation = Federation(3)
    federation.clients[0].commit()
    shown = [
        sign(
            Commit(
                federation.terms.hash,
                k,
                nonce_commitment(terms_with(federation, "chacha20"), k, bytes(32)),
            ),
            federation.identities[k],
        )
        for k in range(3)
    ]
    with pytest.raises(WrongOpening):
        federation.clients[0].receive(encode_server(Commitments(federation.terms.hash, shown)))


# --- Streams --------------------------------------------------------------------------------------


def test_each_generator_has_keys_of_its_own() -> None:
    """From the same secrets, session and context."""
    secret, peer = private_key(b"s" * 32), public_key(b"p" * 32)
    sid, context = b"i" * 32, b"c" * 32
    keys = [pairwise_mask_key(secret, peer, sid, context, (0, 1), name) for name in GENERATORS]
    keys += [self_mask_key(b"b" * 32, sid, context, 0, name) for name in GENERATORS]
    assert len(set(keys)) == 4
    assert keys[0] == pairwise_mask_key(secret, peer, sid, context, (0, 1))
    assert keys[2] == self_mask_key(b"b" * 32, sid, context, 0)


@given(st.binary(min_size=32, max_size=32))
def test_streams_of_one_key_are_unrelated(key: bytes) -> None:
    """Even if derivation were to give both the same key: no word where it stands, nor elsewhere."""
    both = [make(key).words(4096, Block()) for make in (Keystream, ChaCha20Keystream)]
    assert np.count_nonzero(both[0] == both[1]) < 2  # expected: 4096 · 2⁻³²
    assert len(np.intersect1d(*both)) < 4  # expected: 4096² · 2⁻³²
    bits = np.unpackbits((both[0] ^ both[1]).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 6 * 0.5 / len(bits) ** 0.5
