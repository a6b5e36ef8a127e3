"""The sparse graph of more than 100 clients: its shape, its conditions, and why they suffice."""

import itertools

import numpy as np
import pytest
from scipy.stats import hypergeom
from secagg_attackers import Federation

from fedsa_secure.secagg import Thresholds, graph
from fedsa_secure.secagg.graph import neighbours
from fedsa_secure.secagg.terms import sparse_graph
from fedsa_secure.secagg.wire import Advertised, Delivery, Shares, decode_client

COHORT = tuple(range(0, 300, 2))  # numbers are not places
FLOORS = Thresholds.of(len(COHORT))
ROUNDS = 30
SIZES = (101, 150, 200, 500, 1000)


def drawn(sid: bytes = bytes(32), round_number: int = 1) -> dict[int, frozenset[int]]:
    graph._circle.cache_clear()
    return {k: neighbours(k, COHORT, FLOORS, sid, round_number) for k in COHORT}


def test_neighbours_are_mutual_and_everyone_has_k_of_them() -> None:
    assert not FLOORS.complete
    found = drawn()
    for client, around in found.items():
        assert len(around) == FLOORS.neighbours
        assert client not in around
        assert all(client in found[other] for other in around)


def test_everybody_draws_the_same_graph_and_every_round_and_session_another() -> None:
    graphs = [drawn(), drawn(round_number=2), drawn(sid=b"s" * 32)]
    assert graphs[0] == drawn()
    for one, other in itertools.combinations(graphs, 2):
        shared = np.mean([len(one[k] & other[k]) for k in COHORT])
        by_chance = FLOORS.neighbours**2 / (len(COHORT) - 1)
        assert abs(shared - by_chance) < 0.04 * by_chance


def test_up_to_100_clients_everyone_is_everyones_neighbour() -> None:
    floors, cohort = Thresholds.of(100), tuple(range(100))
    assert neighbours(3, cohort, floors, bytes(32), 1) == frozenset(cohort) - {3}


def test_every_order_of_the_circle_is_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    """χ² over the 24 orders of four clients; false alarm below 10⁻⁶, and the seeds are fixed."""
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    monkeypatch.setattr(graph, "BLOCK", 16)  # quicker, and often more than one block
    for seed in range(4800):
        counts[graph._circle.__wrapped__(tuple(range(4)), seed.to_bytes(32, "big"))] += 1
    statistic = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert statistic < 73.0  # the 1 − 10⁻⁶ quantile with 23 degrees of freedom is 73.7


def test_words_that_would_bias_an_index_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/protocol.md §3, written out again with one word at a time."""

    class Words:
        """First the largest word there is, which every odd count has to skip."""

        def __init__(self, key: bytes, offset: int = 0) -> None:
            self.start = 0

        def words(self, count: int, block: object) -> np.ndarray:
            made = (np.arange(self.start, self.start + count) * 2654435761 + 2**32 - 1) % 2**32
            self.start += count
            return made.astype(np.uint32)

    monkeypatch.setattr(graph, "Keystream", Words)
    monkeypatch.setattr(graph, "BLOCK", 2)
    found = graph._circle.__wrapped__(tuple(range(9)), bytes(32))
    words = (word for start in itertools.count() for word in [(start * 2654435761 - 1) % 2**32])
    expected, skipped = list(range(9)), 0
    for place in range(8, 0, -1):
        word = next(words)
        while word >= 2**32 // (place + 1) * (place + 1):
            word, skipped = next(words), skipped + 1
        other = word % (place + 1)
        expected[place], expected[other] = expected[other], expected[place]
    assert found == tuple(expected)
    assert skipped >= 1


def privacy(n: int, c: int, k: int, t_k: int) -> float:
    """Probability that a window of k/2 places holds t_k − 1 − k/2 colluders, times n windows of
    64 circles in each of 30 rounds.
    """
    return float(n * 64 * ROUNDS * hypergeom.sf(t_k - 2 - k // 2, n, c, k // 2))


def correctness(n: int, k: int, t_k: int) -> float:
    """Expected number of clients of whom fewer than t_k holders survive."""
    dropped = n // 10
    survivor = hypergeom.sf(k + 1 - t_k, n - 1, dropped, k)
    lost = hypergeom.sf(k - t_k, n - 1, dropped - 1, k)
    return float((n - dropped) * survivor + dropped * lost)


def smallest_t_k(n: int, c: int, k: int) -> int:
    """Private t_k grow monotonically, so the first is the smallest."""
    return next(t for t in range(k // 2 + 2, k + 4) if privacy(n, c, k, t) <= 2**-40)


@pytest.mark.parametrize("n", SIZES)
def test_the_parameters_meet_both_conditions_and_smaller_ones_do_not(n: int) -> None:
    c = (n - 1) // 3
    k, t_k = sparse_graph(n, c, ROUNDS) or (n - 1, Thresholds.of(n).signatures)
    floors = Thresholds.of(n, rounds=ROUNDS)
    assert (floors.neighbours, floors.shares) == (k, t_k)
    if not floors.complete:
        assert k % 2 == 0
        assert privacy(n, c, k, t_k) <= 2**-40 < privacy(n, c, k, t_k - 1)
        assert correctness(n, k, t_k) <= 2**-20
    for smaller in range(2, k, 2):
        lowest = smallest_t_k(n, c, smaller)
        assert lowest > smaller + 1 or correctness(n, smaller, lowest) > 2**-20


def test_where_no_sparse_graph_is_safe_the_complete_one_is_taken() -> None:
    n, c = 101, 60
    assert sparse_graph(n, c, ROUNDS) is None
    assert all(
        smallest_t_k(n, c, k) > k + 1 or correctness(n, k, smallest_t_k(n, c, k)) > 2**-20
        for k in range(2, n - 1, 2)
    )
    assert Thresholds.of(n, c).complete


def test_without_colluders_one_more_than_half_is_enough_to_be_connected() -> None:
    k, t_k = sparse_graph(200, 0, ROUNDS)
    assert t_k == k // 2 + 2


def is_connected(places: set[int], n: int, half: int) -> bool:
    """Whether places on a circle of n hang together by steps of at most ``half``."""
    seen, front = set(), [min(places)]
    while front:
        place = front.pop()
        if place not in seen:
            seen.add(place)
            front += [(place + s) % n for s in range(-half, half + 1) if (place + s) % n in places]
    return seen == places


@pytest.mark.parametrize(("n", "k", "t_k"), [(8, 4, 4), (9, 4, 4), (9, 4, 5), (9, 6, 5)])
def test_honest_survivors_are_connected_if_no_window_is_corrupt(n: int, k: int, t_k: int) -> None:
    """The lemma of docs/protocol.md §5, for every set of dropped and of corrupt clients."""
    half, split_without = k // 2, 0
    limit = t_k - 1 - half
    for kinds in itertools.product("hcd", repeat=n):  # honest survivor, corrupt, dropped
        honest = {place for place in range(n) if kinds[place] == "h"}
        around = {
            place: [kinds[(place + s) % n] for s in range(-half, half + 1)] for place in honest
        }
        if not honest or any(k + 1 - near.count("d") < t_k for near in around.values()):
            continue  # an honest survivor refuses (step 4)
        window = max([kinds[(p + s) % n] for s in range(half)].count("c") for p in range(n))
        if window < limit:
            assert is_connected(honest, n, half)
        else:
            split_without += not is_connected(honest, n, half)
    assert split_without > 0  # the condition is needed


def test_a_whole_round_on_a_sparse_graph_gives_the_exact_sum() -> None:
    """101 clients; some drop out at every step."""
    federation = Federation(101, Thresholds.of(101, colluders=1)).opened()
    k = federation.terms.thresholds.neighbours
    assert not federation.terms.thresholds.complete
    shown = federation.until(Advertised)
    assert {len(federation.read(message).advertises) for message in shown.values()} == {k + 1}
    answer = decode_client(federation.tell(0, shown[0]), federation.terms).message
    assert isinstance(answer, Shares)
    assert len(answer.sealed) == k
    federation.finish(shown, {Advertised: [7], Delivery: [3, 50]})
    survivors = set(range(101)) - {3, 7, 50}
    assert federation.server.total.tolist() == federation.sum_of(survivors).tolist()


def test_the_cohort_that_is_dropped_needs_its_key_rebuilt_by_others_alone() -> None:
    """A client that dropped out holds a share that nobody gets: one survivor more is needed."""
    for n in SIZES:
        floors = Thresholds.of(n)
        if floors.complete:
            continue
        k, t_k, dropped = floors.neighbours, floors.shares, int(0.1 * n)
        survivor = (n - dropped) * hypergeom.sf(k + 1 - t_k, n - 1, dropped, k)
        gone = dropped * hypergeom.sf(k - t_k, n - 1, dropped - 1, k)
        assert survivor + gone <= 2**-20
