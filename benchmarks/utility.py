"""What sharing A is worth: every method and control in several settings, one CSV row per run.

Rows that are in the CSV already are not run again, so the script can be stopped and started at
will. At the end it writes its tables into ``docs/experiments.md``.

    python benchmarks/utility.py [--settings NAME …] [--data FOLDER] [--tables-only]

``--data`` is a folder that holds ``glue/sst2`` as parquet files; without it that setting is left
out.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from record import RESULTS, append_row, environment, read_rows, write_block

import fedsa_secure
from fedsa_secure.data.lexicon import load_lexicon

CONTROLS = ("local", "random-a", "head-only")
METHODS = ("fedsa", "fedavg", *CONTROLS)
EVERYTHING = ("fedsa", "fedsa-rslora", "fedsa-vera", "fedavg", "ffa", "feddpa", *CONTROLS)
CSV = RESULTS / "utility.csv"
TABLES = Path(__file__).parents[1] / "docs" / "experiments.md"
_TEST_ROWS = 500


@dataclass(frozen=True)
class Setting:
    """Options of one setting; those that are not named are the defaults of ``train``.

    Args:
        title: heading of its table.
        seeds: root seeds, one run each.
        options: keyword arguments of ``train``.
        data: makes the data set of a seed, where the options do not name one.
        methods: which methods make sense here.
    """

    title: str
    seeds: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[[int], Dataset] | None = None
    methods: tuple[str, ...] = METHODS


def opposed_lexicon(records: int, test_rows: int = _TEST_ROWS) -> Callable[[int], Dataset]:
    """Ten clients with balanced words of their own; every second client calls good bad.

    Each has about ``records`` rows to train on and others to be tested on, with other word stems.
    """

    def make(seed: int) -> Dataset:
        words = load_lexicon()
        stream = np.random.default_rng(seed)
        labels = np.asarray(words["label"])
        each = (records + test_rows) // 2
        per_class = [stream.permutation(np.flatnonzero(labels == k))[: 10 * each] for k in (0, 1)]
        chosen = np.concatenate(per_class)
        clients = np.concatenate([np.repeat(np.arange(10), each)] * 2)
        opposed = np.where(clients % 2 == 1, 1 - labels[chosen], labels[chosen])
        rows = words.select(chosen).select_columns(["text", "stem"])
        rows = rows.add_column("label", opposed.tolist()).add_column("client", clients.tolist())
        return rows.cast_column("label", ClassLabel(names=["negative", "positive"]))

    return make


def _opposed(title: str, records: int, methods: tuple[str, ...] = METHODS, **more: Any) -> Setting:
    options = {
        "partition": "column:client",
        "group_column": "stem",
        "test_fraction": _TEST_ROWS / (records + _TEST_ROWS),
        "common_rows": 0,
        "rank": 4,
        "alpha": 8,
        "rounds": 30,
        "local_steps": 2,
        "learning_rate": 4e-3,
        **more,
    }
    return Setting(title, (0, 1, 2), options, opposed_lexicon(records), methods)


def _lexicon(skew: str, **options: Any) -> Setting:
    """The default run under one kind of skew."""
    options = {"evaluate_every": 2, "cross_rows": 100, **options}
    return Setting(f"Lexicon, 10 clients, {skew}", (0, 1, 2), options, methods=EVERYTHING)


def settings(data: Path | None) -> dict[str, Setting]:
    """All settings by name."""
    found = {
        "opposed-60": _opposed("Opposed labels, about 60 records per client", 60),
        "opposed-60-frozen-head": _opposed(
            "Opposed labels, about 60 records per client, frozen head",
            60,
            ("fedsa", "fedavg", "local", "random-a"),
            head="frozen",
        ),
        "lexicon-dirichlet-0.1": _lexicon("Dirichlet(0.1)", partition="dirichlet:0.1", min_rows=20),
        "lexicon-dirichlet-0.5": _lexicon("Dirichlet(0.5): the default"),
        "lexicon-iid": _lexicon("IID", partition="iid"),
    }
    if data is not None:
        found["sst2-dirichlet"] = Setting(
            "SST-2, 4 clients, Dirichlet(0.5), 3,200 samples trained on in all",
            (0,),
            {
                "dataset": str(data / "glue" / "sst2"),
                "max_rows": 6000,
                "clients": 4,
                "rounds": 10,
                "local_steps": 5,
                "batch_size": 16,
            },
        )
    return found


def run_one(name: str, setting: Setting, method: str, seed: int) -> dict[str, object]:
    """Train once, through the public interface."""
    options = {**setting.options, "method": method, "seed": seed}
    if setting.data is not None:
        options["dataset"] = setting.data(seed)
    options.setdefault("evaluate_every", 10_000)
    with tempfile.TemporaryDirectory() as folder:
        run = fedsa_secure.train(output_dir=f"{folder}/run", **options)
        seconds = sum(timing.total for timing in run.timings.values())
        return {
            "setting": name,
            "method": method,
            "seed": seed,
            "accuracy": _shown(run.accuracy),
            "macro_f1": _shown(run.macro_f1),
            "common_accuracy": _shown(run.common_accuracy),
            "majority": _shown(run.majority),
            "uplink_bytes_per_round": run.history[-1].uplink_bytes,
            "rounds": len(run.history),
            "train_rows_per_client": round(np.mean([m.train_rows for m in run.metrics])),
            "seconds": f"{seconds:.1f}",
            **environment(),
            "best_accuracy": _shown(run.best.accuracy),
            "best_round": run.best.round,
            "cross_accuracy": _shown(run.cross_accuracy),
        }


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def table(setting: Setting, rows: list[dict[str, str]]) -> str:
    """Means and standard deviations over seeds, and the paired difference to fedsa."""
    majority = _mean_sd([float(row["majority"]) for row in rows])
    lines = [
        f"### {setting.title}",
        "",
        f"Majority class of the clients' test parts: {majority} %. "
        f"Seeds: {', '.join(sorted({row['seed'] for row in rows}))}.",
        "",
        "| method | accuracy % | best round % | macro F1 % | other clients % | common test % "
        "| fedsa − this, accuracy | bytes up per client and round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    fedsa = {row["seed"]: float(row["accuracy"]) for row in rows if row["method"] == "fedsa"}
    for method in setting.methods:
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        gaps = [fedsa[row["seed"]] - float(row["accuracy"]) for row in own if row["seed"] in fedsa]
        lines.append(
            f"| {method} | {_column(own, 'accuracy')} | {_column(own, 'best_accuracy')} "
            f"| {_column(own, 'macro_f1')} | {_column(own, 'cross_accuracy')} "
            f"| {_column(own, 'common_accuracy')} "
            f"| {'' if method == 'fedsa' else _mean_sd(gaps, signed=True)} "
            f"| {int(own[0]['uplink_bytes_per_round']):,} |"
        )
    return "\n".join(lines)


def _column(rows: list[dict[str, str]], name: str) -> str:
    values = [float(row[name]) for row in rows if row[name]]
    return _mean_sd(values) if values else "–"


def _mean_sd(values: list[float], signed: bool = False) -> str:
    if not values:
        return "–"
    mean = f"{100 * statistics.mean(values):{'+' if signed else ''}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def write_tables(known: dict[str, Setting]) -> None:
    """Put the tables between the two marks in the document."""
    rows = read_rows(CSV)
    parts = [
        table(setting, own)
        for name, setting in known.items()
        if (own := [row for row in rows if row["setting"] == name])
    ]
    write_block(TABLES, "utility", "\n\n".join(parts))


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tables-only", action="store_true")
    arguments = parser.parse_args()
    known = settings(arguments.data or Path("absent"))
    wanted = arguments.settings or [
        name for name in known if arguments.data is not None or name != "sst2-dirichlet"
    ]
    done = {(row["setting"], row["method"], row["seed"]) for row in read_rows(CSV)}
    jobs = [
        (name, method, seed)
        for name in wanted
        for seed in known[name].seeds
        for method in known[name].methods
        if (name, method, str(seed)) not in done
    ]
    for count, (name, method, seed) in enumerate([] if arguments.tables_only else jobs, start=1):
        row = run_one(name, known[name], method, seed)
        append_row(CSV, row)
        print(f"{count}/{len(jobs)} {name} {method} seed {seed}: accuracy {row['accuracy']}")
    write_tables(known)


if __name__ == "__main__":
    main()
