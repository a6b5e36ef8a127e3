"""What secure aggregation costs: one client, the server, whole rounds, Flower, and the bound.

Whatever is compared takes turns in one process.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from fedsa_secure.bench.bound import Bound
from fedsa_secure.bench.flower import SEED_BITS, FlowerSecAgg
from fedsa_secure.bench.large import NEIGHBOURS as LARGE_NEIGHBOURS
from fedsa_secure.bench.large import VALUES as LARGE_VALUES
from fedsa_secure.bench.large import masking_memory
from fedsa_secure.bench.rounds import (
    Cohort,
    OneClient,
    WholeRound,
    forget_what_is_remembered,
    sample_vector,
    whole_round,
)
from fedsa_secure.bench.timing import (
    Task,
    forget_peak_memory,
    peak_memory,
    seconds_of,
    take_turns,
)
from fedsa_secure.errors import ConfigError, MissingExtraError
from fedsa_secure.reporting.rows import Row
from fedsa_secure.secagg.masks import apply_masks
from fedsa_secure.secagg.server import CollectingReveals
from fedsa_secure.secagg.terms import Thresholds

CLIENTS = (3, 10, 50, 100, 200, 1000)
VALUES = 1_000_000
_WHOLE, _FEWER_VALUES = 100, 10_000
"""Whole rounds have full vectors up to so many clients, and so many values above."""
_FLOWER_SERVER = 10
"""Up to so many clients Flower's unmasking is measured; above, Shamir in Python takes minutes."""
_TURNS = 7
_MASKING, _MASKS = "client: masking step", "client: masks alone"
_SMALL_STEPS: tuple[tuple[str, Callable[[OneClient], object]], ...] = (
    ("client: advertise", OneClient.advertise),
    ("client: share", OneClient.share),
    ("client: agree", OneClient.agree),
    ("client: reveal", OneClient.reveal),
)
_STREAMS, _ADDITIONS = "bound: streams", "bound: additions"

Report = Callable[[str], None]


def bench_secagg(
    clients: Sequence[int] = CLIENTS,
    values: int = VALUES,
    large: bool = False,
    report: Report | None = None,
) -> list[Row]:
    """Measure secure aggregation.

    Args:
        clients: cohort sizes, each at least 3.
        values: in a vector.
        large: also the memory of masking 100 million values, in a process of its own.
        report: told what is measured next.

    Returns:
        Rows in the order of ``clients``. Without the extra ``flower`` those of Flower are missing.

    Raises:
        ConfigError: if a cohort or the vector is too small.
    """
    if values < 1:
        raise ConfigError("values", f"{values}; at least one is needed")
    say, flower = report or _silent, _flower()
    rows = []
    for n in clients:
        say(f"{n} clients: one client's steps")
        rows += _client_rows(n, values, flower)
        say(f"{n} clients: a whole round")
        rows += _round_rows(n, values)
        if flower is not None and n <= _WHOLE:
            say(f"{n} clients: the server of {flower.name}")
            rows += _flower_server_rows(flower, n, values)
    if large:
        say("memory of masking 100 million values")
        rows += _large_rows()
    return rows


def seed_note(rows: Sequence[Row]) -> str:
    """What has to be said of Flower's rows, or that there are none."""
    if not any("Flower" in row.name for row in rows):
        return "Flower's SecAgg+ is not installed and its rows are left out: see the extra 'flower'"
    return (
        f"Flower draws the mask of a pair from a seed of at most {SEED_BITS} bits, and a client's "
        "own from one of 32: its times buy masks that can be guessed"
    )


def _silent(_: str) -> None:
    """Tell nobody."""


def _short(values: int) -> str:
    """1M for a million, 10k for ten thousand; k in a name is the number of neighbours."""
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if values % size == 0:
            return f"{values // size}{letter}"
    return f"{values:,}"


def _flower() -> FlowerSecAgg | None:
    try:
        return FlowerSecAgg()
    except MissingExtraError:
        return None


def _client_rows(n: int, values: int, flower: FlowerSecAgg | None) -> list[Row]:
    """One client's steps, the bound and Flower's client, in turns."""
    cohort, vector = Cohort(n, values), sample_vector(values)
    one = OneClient(cohort, vector)
    masks, total = one.masks(), np.zeros(values, dtype=np.uint32)
    cold = forget_what_is_remembered
    tasks = {
        _MASKING: Task(lambda _: one.mask(), cold),
        _MASKS: Task(lambda _: apply_masks(total, masks)),
        **Bound(values, one.neighbours + 1).tasks(),
        **{name: Task(functools.partial(_step, step, one), cold) for name, step in _SMALL_STEPS},
    }
    size = f"k={one.neighbours}, {_short(values)} values"
    theirs = ""
    if flower is not None:
        theirs = f"{flower.name}: client masking ({SEED_BITS}-bit seeds), {size}"
        shares = cohort.terms.thresholds.shares
        tasks[theirs] = flower.masking(one.neighbours, shares, vector)
    seconds = take_turns(tasks, _TURNS)
    bound = seconds[_STREAMS] + seconds[_ADDITIONS]

    def row(name: str, sized: bool, to_bound: bool = False, to_flower: bool = False) -> Row:
        compared = bool(to_flower and theirs)
        return Row(
            name=f"{name}, {size}" if sized else name,
            n=n,
            value=seconds[name],
            unit="s",
            baseline=theirs if compared else None,
            ratio_to_baseline=seconds[name] / seconds[theirs] if compared else None,
            ratio_to_bound=seconds[name] / bound if to_bound else None,
        )

    rows = [
        row(_MASKING, sized=True, to_bound=True, to_flower=True),
        row(_MASKS, sized=True, to_bound=True),
        row(_STREAMS, sized=True),
        row(_ADDITIONS, sized=True),
        *(row(name, sized=False) for name, _ in _SMALL_STEPS),
    ]
    if theirs:
        rows.append(row(theirs, sized=False, to_bound=True))
    beyond = (one.upload - 4 * values) / one.neighbours
    return [
        *rows,
        Row(name=f"client: upload, {size}", n=n, value=one.upload, unit="bytes"),
        Row(name="client: upload per value", n=n, value=one.upload / values, unit="bytes"),
        Row(
            name="client: upload beyond the values, per neighbour",
            n=n,
            value=beyond,
            unit="bytes",
        ),
    ]


def _step(step: Callable[[OneClient], object], one: OneClient, _: object) -> None:
    step(one)


def _round_rows(n: int, values: int) -> list[Row]:
    """A whole round, its memory, and the server's steps of it."""
    fewer = values if n <= _WHOLE else min(values, _FEWER_VALUES)
    cohort, vector = Cohort(n, fewer), sample_vector(fewer)
    forget_what_is_remembered()
    forget_peak_memory()
    found: list[WholeRound] = []
    seconds = seconds_of(Task(lambda _: found.append(whole_round(cohort, vector))))
    peak, done = peak_memory(), found[0]
    rows = [
        Row(
            name=f"round: all in one process, {_short(fewer)} values", n=n, value=seconds, unit="s"
        ),
        Row(
            name=f"round: peak memory of that process, {_short(fewer)} values",
            n=n,
            value=peak / 2**20,
            unit="MiB",
        ),
    ]
    floors = cohort.terms.thresholds
    numbers = [dropped for dropped in (0, 1) if n - dropped >= floors.survivors]
    tasks = {
        f"server: adding a vector, {_short(fewer)} values": Task(
            lambda _: done.add(), forget_what_is_remembered
        )
    }
    for dropped in numbers:
        name = f"server: unmasking, {dropped} dropped, {_short(values)} values"
        tasks[name] = Task(
            lambda phase: phase.close(), functools.partial(_unmasking, done, dropped, values)
        )
    once = n > _WHOLE
    medians = take_turns(tasks, 1 if once else _TURNS, warm_up=not once)
    rows += [Row(name=name, n=n, value=each, unit="s") for name, each in medians.items()]
    return rows


def _unmasking(done: WholeRound, dropped: int, values: int) -> CollectingReveals:
    phase = done.unmasking(dropped, values)
    forget_what_is_remembered()
    return phase


def _flower_server_rows(flower: FlowerSecAgg, n: int, values: int) -> list[Row]:
    """Flower's unmasking with one client dropped: measured where that is quick."""
    floors = Thresholds.of(n)
    if n - 1 < floors.survivors:
        return []
    threshold = floors.shares
    name = f"{flower.name}: server unmasking, 1 dropped, {_short(values)} values"
    if n <= _FLOWER_SERVER:
        seconds = take_turns({name: flower.unmasking(n, threshold, values)}, 3)[name]
        return [Row(name=name, n=n, value=seconds, unit="s")]
    streams, one = 2 * (n - 1), 10  # own masks of the survivors, and theirs with the dropped one
    parts = take_turns(
        {"streams": flower.streams(one, values), "combining": flower.combining(n, threshold)}, 1
    )
    secrets = n - 1 + flower.chunks_of_a_key()
    seconds = parts["streams"] / one * streams + parts["combining"] * secrets
    return [Row(name=f"{name}, extrapolated", n=n, value=seconds, unit="s")]


def _large_rows() -> list[Row]:
    """Memory of masking a vector of 400 MB, over the bytes of the vector."""
    peak, seconds = masking_memory(LARGE_VALUES, LARGE_NEIGHBOURS)
    size = f"k={LARGE_NEIGHBOURS}, {_short(LARGE_VALUES)} values"
    vector = 4 * LARGE_VALUES
    return [
        Row(name=f"{_MASKING}, {size}", n=LARGE_NEIGHBOURS + 1, value=seconds, unit="s"),
        Row(
            name=f"client: peak memory of masking over the vector's own, {size}",
            n=LARGE_NEIGHBOURS + 1,
            value=peak / vector,
            unit="1",
        ),
    ]
