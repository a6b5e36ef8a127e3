"""No secret is used twice, whatever dies when, and a masked vector tells nothing of its content.

Randomness is tested by chi-square, byte by byte, with a threshold for which all such tests of this
file together raise a false alarm with a probability of ``FALSE_ALARM``.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from faulty_network import QUIET, WRITE_POINTS, Fault, Listed, Network, Place
from scipy.stats import chi2

from fedsa_secure.csprng import Keystream
from fedsa_secure.secagg import ClientSession, keys, masks
from fedsa_secure.secagg import client as steps
from fedsa_secure.secagg.keys import ShareBox
from fedsa_secure.secagg.states import AttemptState, HasShared, IsMasking, IsReady, Party
from fedsa_secure.secagg.wire import Delivery, decode_client


@dataclass
class Used:
    """Every secret that was drawn or derived, and by whom."""

    who: int | str = "nobody"
    drawn: Counter[bytes] = field(default_factory=Counter)
    """Private keys and seeds."""
    nonces: Counter[bytes] = field(default_factory=Counter)
    """Of sealed shares."""
    sealed: Counter[tuple[bytes, bytes]] = field(default_factory=Counter)
    """Key and nonce of sealed shares."""
    streams: dict[int | str, Counter[bytes]] = field(default_factory=lambda: defaultdict(Counter))
    """Mask keys, by who made a stream of them."""

    def act(self, who: int | str) -> None:
        self.who = who


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Used:
    """What the parties use up from here on."""
    used, share_keys = Used(), {}
    draw, seal = steps.new_secret, ShareBox.seal

    def new_secret() -> bytes:
        secret = draw()
        used.drawn[secret] += 1
        return secret

    class RecordedStream(Keystream):
        def __init__(self, key: bytes, offset: int = 0) -> None:
            used.streams[used.who][key] += 1
            super().__init__(key, offset)

    def recorded_cipher(key: bytes) -> ChaCha20Poly1305:
        cipher = ChaCha20Poly1305(key)
        share_keys[id(cipher)] = key
        return cipher

    def recorded_seal(box: ShareBox, content: bytes) -> bytes:
        sealed = seal(box, content)
        used.nonces[sealed[:12]] += 1
        used.sealed[(share_keys[id(box._cipher)], sealed[:12])] += 1
        return sealed

    monkeypatch.setattr(steps, "new_secret", new_secret)
    monkeypatch.setattr(masks, "Keystream", RecordedStream)
    monkeypatch.setattr(keys, "ChaCha20Poly1305", recorded_cipher)
    monkeypatch.setattr(ShareBox, "seal", recorded_seal)
    return used


def check_fresh(used: Used, rounds: int, clients: int) -> None:
    """Nothing was drawn twice, no nonce came twice, and nobody made a stream of one key twice."""
    assert len(used.drawn) >= 3 * clients * rounds
    assert len(used.sealed) >= clients * (clients - 1) * rounds
    assert max(used.drawn.values()) == 1, "a secret was drawn twice"
    assert max(used.nonces.values()) == 1, "a nonce came twice"
    assert max(used.sealed.values()) == 1, "two shares under one key and nonce"
    owners: Counter[bytes] = Counter()
    for who, streams in used.streams.items():
        assert max(streams.values()) == 1, f"{who} used a mask key twice"
        if who != "server":
            owners.update(streams.keys())
    own = sum(count == 1 for count in owners.values())
    assert set(owners.values()) == {1, 2}  # a client's own, or one of a pair
    assert own >= clients * rounds
    assert not used.drawn.keys() & owners.keys()


def run_rounds(network: Network, rounds: int) -> None:
    network.open()
    for _ in range(rounds):
        network.run_round()


def test_no_secret_comes_twice_in_many_rounds(tmp_path: Path, used: Used) -> None:
    run_rounds(Network(3, tmp_path, size=3, acting=used.act), 20)
    check_fresh(used, 20, 3)


@pytest.mark.slow
def test_no_secret_comes_twice_in_a_thousand_rounds(tmp_path: Path, used: Used) -> None:
    run_rounds(Network(3, tmp_path, size=3, acting=used.act), 1000)
    check_fresh(used, 1000, 3)


def run_crashes(network: Network, points: list[int], away: int) -> int:
    """Rounds in each of which client 1 is killed at another point. Returns how many."""
    kinds = [Fault("kill", point + WRITE_POINTS * away) for point in points]
    kinds += [Fault("kill in fill", amount + WRITE_POINTS * away) for amount in (0, 2)]
    network.open()
    network.run_round()
    for exchange in (1, 2, 3):
        for index in (0, 1):
            for fault in kinds:
                number = network.round + 1
                network.run_round(Listed({Place(number, 0, exchange, 1, False, index): fault}))
                if away:  # it comes back here, so that there is something to kill
                    network.run_round(QUIET)
    return network.round


def test_no_secret_comes_twice_after_a_crash(tmp_path: Path, used: Used) -> None:
    """Around every rename, and before every write, of every step."""
    network = Network(3, tmp_path, size=3, acting=used.act)
    rounds = run_crashes(network, [0, 3, 6, 9, 15], away=0)
    check_fresh(used, rounds, 3)


@pytest.mark.slow
@pytest.mark.parametrize("away", [0, 2])
def test_no_secret_comes_twice_after_a_crash_anywhere(
    tmp_path: Path, used: Used, away: int
) -> None:
    network = Network(4, tmp_path, size=3, acting=used.act)
    rounds = run_crashes(network, list(range(WRITE_POINTS)), away)
    check_fresh(used, rounds, 3)  # three at least take part in every round


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For mistakes that spoil the sum, too."""
    monkeypatch.setattr(Network, "_check_sum", lambda network, outcome: None)
    monkeypatch.setattr(Network, "_check_rejoined", lambda network, outcome, quiet: None)


def check_caught(used: Used, rounds: int, what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        check_fresh(used, rounds, 3)


def test_secrets_that_come_again_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    draw, pool = steps.new_secret, []

    def from_pool() -> bytes:
        pool.append(pool[-18] if len(pool) >= 18 else draw())
        return pool[-1]

    monkeypatch.setattr(steps, "new_secret", from_pool)
    used = request.getfixturevalue("used")
    run_rounds(Network(3, tmp_path, acting=used.act), 4)
    check_caught(used, 1, "drawn twice")


def test_nonces_that_come_again_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: Used
) -> None:
    run_rounds(Network(3, tmp_path / "good", acting=used.act), 2)
    check_fresh(used, 2, 3)
    monkeypatch.setattr("fedsa_secure.secagg.keys.os.urandom", lambda count: bytes(count))
    run_rounds(Network(3, tmp_path / "bad", acting=used.act), 2)
    check_caught(used, 2, "a nonce came twice")


def test_a_client_that_leaves_no_mark_before_it_masks_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: Used, lenient: None
) -> None:
    """Killed between masking and storing, it would mask again with the same streams."""
    honest = ClientSession._put

    def careless(session: ClientSession, after: AttemptState) -> None:
        if not isinstance(after, IsMasking):
            honest(session, after)

    monkeypatch.setattr(ClientSession, "_put", careless)
    network = Network(3, tmp_path, acting=used.act)
    rounds = run_crashes(network, [3], away=0)
    check_caught(used, rounds, "used a mask key twice")


# Masked vectors.

CLIENTS, SIZE, ROUNDS = 3, 2048, 16
PLAINTEXTS: dict[str, Callable[[int], int]] = {
    "zeros": lambda number: 0,
    "largest": lambda number: 2**32 - 1,
    "both in turn": lambda number: (number % 2) * (2**32 - 1),
}
FALSE_ALARM = 1e-6
TESTS = (len(PLAINTEXTS) + 1) * 2 * CLIENTS * 4
"""By plaintext, and in the last test; vectors and differences; by client; by byte of a word."""
EACH = FALSE_ALARM / TESTS


def masked_vectors(folder: Path, plaintext: str) -> dict[int, np.ndarray]:
    """What the server gets of each client. [round, value]"""

    def vector_of(client: int, number: int) -> np.ndarray:
        return np.full(SIZE, PLAINTEXTS[plaintext](number), dtype=np.uint32)

    network = Network(CLIENTS, folder, SIZE, vector_of=vector_of)
    run_rounds(network, ROUNDS)
    found: dict[int, list[np.ndarray]] = defaultdict(list)
    for (_, _, _, client), raw in network.vectors.items():
        found[client].append(decode_client(raw, network.terms).payload)
    return {client: np.stack(vectors) for client, vectors in found.items()}


def smallest_p_value(words: np.ndarray) -> float:
    """Of the four chi-square tests that each byte of a word is uniform."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 4)
    expected = len(octets) / 256
    assert expected >= 40  # the statistic is close to chi-square far into its tail
    counts = [np.bincount(octets[:, place], minlength=256) for place in range(4)]
    return min(chi2.sf(((found - expected) ** 2 / expected).sum(), 255) for found in counts)


def check_uniform(vectors: dict[int, np.ndarray]) -> None:
    """Each client's vectors, and the differences of two rounds, look like random bits."""
    assert {rounds.shape for rounds in vectors.values()} == {(ROUNDS, SIZE)}
    for tested in p_values(vectors):
        assert min(tested) > EACH


@pytest.mark.parametrize("plaintext", PLAINTEXTS)
def test_masked_vectors_are_uniform_whatever_is_masked(tmp_path: Path, plaintext: str) -> None:
    check_uniform(masked_vectors(tmp_path, plaintext))


def p_values(vectors: dict[int, np.ndarray]) -> list[tuple[float, float]]:
    """By client: of its vectors, and of their differences in disjoint pairs of rounds."""
    return [
        (smallest_p_value(rounds), smallest_p_value(rounds[0::2] - rounds[1::2]))
        for rounds in vectors.values()
    ]


def check_not_uniform(vectors: dict[int, np.ndarray]) -> None:
    """The differences alone betray the mistake, for every client."""
    assert {rounds.shape for rounds in vectors.values()} == {(ROUNDS, SIZE)}
    assert max(difference for _, difference in p_values(vectors)) < EACH


def test_vectors_without_masks_are_not_uniform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lenient: None
) -> None:
    monkeypatch.setattr(steps, "apply_masks", lambda vector, masks: None)
    check_not_uniform(masked_vectors(tmp_path, "zeros"))


def test_differences_under_masks_that_come_again_are_not_uniform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lenient: None
) -> None:
    """The vectors of one round look random then, and those of two rounds tell all."""
    honest, first = steps.deliver, {}

    def again(party: Party, state: HasShared, message: Delivery, model: bytes) -> IsReady:
        ready = honest(party, state, message, model)
        old = first.setdefault(party.client, ready.masks)
        return msgspec.structs.replace(ready, masks=old)

    monkeypatch.setattr(steps, "deliver", again)
    vectors = masked_vectors(tmp_path, "both in turn")
    check_not_uniform(vectors)
    assert all((rounds[0::2] - rounds[1::2] == 2**32 - 1).all() for rounds in vectors.values())


def test_secrets_that_stay_give_fresh_masks_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context of an attempt is part of every mask key: a second line of defence."""
    draw, kept = steps.new_secret, []

    def same() -> bytes:
        kept.append(kept[-3 * CLIENTS] if len(kept) >= 3 * CLIENTS else draw())
        return kept[-1]

    monkeypatch.setattr(steps, "new_secret", same)
    check_uniform(masked_vectors(tmp_path, "zeros"))
