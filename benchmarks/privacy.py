"""What differential privacy costs, and what a private A is worth: one CSV row per run.

Every arm takes the same number of optimizer steps per client. Rows that are in the CSV already are
not run again, so the script can be stopped and started at will. At the end it writes its tables
into ``docs/privacy.md``.

    python benchmarks/privacy.py [--settings NAME …] [--seeds N …] [--data FOLDER] [--tables-only]

``--data`` is a folder that holds ``glue/sst2`` as parquet files; without it that setting is left
out. A private run splits train from test and draws its noise with secret coins, so a rerun differs.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from record import RESULTS, append_row, environment, read_rows, write_block
from utility import opposed_lexicon

import fedsa_secure

CSV = RESULTS / "privacy.csv"
TABLES = Path(__file__).parents[1] / "docs" / "privacy.md"
SEEDS = (0, 1, 2)
ROUNDS, NOISED, PERSONAL = 10, 2, 20
"""Rounds; noised steps in each; personal steps after the last. The others take as many in all."""
RATE = 4e-3
"""Learning rate of every arm that names no other."""


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Args:
        title: what the table calls it.
        epsilon: None without differential privacy.
        options: keyword arguments of ``train``.
    """

    title: str
    epsilon: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def _private(title: str, epsilon: float, **options: Any) -> Arm:
    return Arm(title, epsilon, {"dp_epsilon": epsilon, "local_steps": NOISED, **options})


def _plain(method: str, title: str | None = None, **options: Any) -> Arm:
    return Arm(title or method, None, {"method": method, **options})


ARMS = (
    _plain("fedsa", "fedsa, not private"),
    _private("twin", 8.0),
    _plain("random-a", "random frozen A"),
    _plain("local"),
    _private("noise-only A", 8.0, dp_control="noise"),
    _private("twin", 1.0),
    _private("twin", 3.0),
    _private("frozen-b", 8.0, dp_release="frozen-b"),
    _plain("head-only"),
)
FASTER = _private("twin, learning rate 0.008", 8.0, learning_rate=8e-3)
OPPOSED = (
    _plain("fedsa", "fedsa, not private"),
    _private("twin", 8.0),
    _plain("random-a", "random frozen A"),
    _plain("local"),
    _private("twin", 100.0),
    _private("twin", 1000.0),
    _private("noise-only A", 8.0, dp_control="noise"),
)
CHOICES = (
    _plain("fedsa", "fedsa, not private"),
    _plain("local"),
    _plain("random-a", "random frozen A"),
    _plain("random-a", "random frozen A, learning rate 0.008", learning_rate=8e-3),
    _private("noise-only A", 8.0, dp_control="noise"),
    _private("noise-only A, learning rate 0.008", 8.0, dp_control="noise", learning_rate=8e-3),
    _private("twin, learning rate 0.002", 8.0, learning_rate=2e-3),
    _private("twin", 8.0),
    FASTER,
    _private("twin, learning rate 0.016", 8.0, learning_rate=16e-3),
    _private("twin, one norm over all", 8.0, dp_clip_weights="joint"),
    _private("twin, q = 1/2, 10 steps", 8.0, dp_sampling_rate=0.5, local_steps=1),
    _private("twin, q = 1/8, 40 steps", 8.0, dp_sampling_rate=0.125, local_steps=4),
)


@dataclass(frozen=True)
class Setting:
    """Options of one setting; those that are not named are the defaults of ``train``."""

    title: str
    arms: tuple[Arm, ...]
    options: dict[str, Any] = field(default_factory=dict)
    data: Callable[[int], Dataset] | None = None


def _opposed(title: str, records: int, test_rows: int, **more: Any) -> Setting:
    options = {
        "partition": "column:client",
        "group_column": "stem",
        "test_fraction": test_rows / (records + test_rows),
        "common_rows": 0,
        "rank": 4,
        "alpha": 8,
        **more,
    }
    return Setting(title, OPPOSED, options, opposed_lexicon(records, test_rows))


def settings(data: Path | None) -> dict[str, Setting]:
    """All settings by name."""
    found = {
        "lexicon": Setting("Lexicon, 10 clients, Dirichlet(0.5): the default", (*ARMS, FASTER)),
        "opposed-60-frozen-head": _opposed(
            "Opposed labels, about 60 records per client, frozen head", 60, 250, head="frozen"
        ),
    }
    found["choices"] = Setting("Choices: lexicon, 10 clients, IID", CHOICES, {"partition": "iid"})
    if data is not None:
        found["sst2"] = Setting(
            "SST-2, 10 clients, IID, about 80 records per client",
            ARMS,
            {
                "dataset": str(data / "glue" / "sst2"),
                "max_rows": 1000,
                "max_length": 24,
                "batch_size": 8,
                "common_rows": 100,
                "partition": "iid",
            },
        )
    return found


def run_one(name: str, setting: Setting, arm: Arm, seed: int) -> dict[str, object]:
    """Train once, through the public interface."""
    options = {"rounds": ROUNDS, "learning_rate": RATE, "evaluate_every": 10_000, "cross_rows": 0}
    options |= {**setting.options, **arm.options}
    if setting.data is not None:
        options["dataset"] = setting.data(seed)
    with tempfile.TemporaryDirectory() as folder:
        if arm.epsilon is None:
            options["local_steps"] = NOISED + PERSONAL // ROUNDS
        else:
            options |= {"dp_home": f"{folder}/home", "personal_steps": PERSONAL}
        run = fedsa_secure.train(output_dir=f"{folder}/run", seed=seed, **options)
        seconds = sum(timing.total for timing in run.timings.values())
        private = run.privacy
        return {
            "setting": name,
            "arm": arm.title,
            "epsilon": "" if arm.epsilon is None else f"{arm.epsilon:g}",
            "seed": seed,
            "certified_epsilon": "" if run.epsilon is None else f"{run.epsilon:.4f}",
            "delta": "" if private is None else f"{private.delta:g}",
            "noise_multiplier": "" if private is None else f"{private.noise_multiplier:g}",
            "sampling_rate": "" if private is None else f"{private.sampling_rate:g}",
            "noised_steps": "" if private is None else private.steps,
            "accuracy": f"{run.accuracy:.4f}",
            "macro_f1": f"{run.macro_f1:.4f}",
            "common_accuracy": "" if run.common_accuracy is None else f"{run.common_accuracy:.4f}",
            "majority": f"{run.majority:.4f}",
            "train_rows_per_client": round(statistics.mean(m.train_rows for m in run.metrics)),
            "seconds": f"{seconds:.1f}",
            **environment(),
        }


def table(setting: Setting, rows: list[dict[str, str]]) -> str:
    """Means and standard deviations over seeds."""
    seeds = ", ".join(sorted({row["seed"] for row in rows}))
    records = statistics.mean(int(row["train_rows_per_client"]) for row in rows)
    lines = [
        f"### {setting.title}",
        "",
        f"Majority class: {_mean_sd(rows, 'majority')} %. Train rows per client: {records:.0f} on "
        f"average. Seeds: {seeds}.",
        "",
        "| | ε asked for | ε certified, most | σ | accuracy % | macro F1 % | common test % |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in setting.arms:
        epsilon = "" if arm.epsilon is None else f"{arm.epsilon:g}"
        own = [row for row in rows if (row["arm"], row["epsilon"]) == (arm.title, epsilon)]
        if own:
            lines.append(_line(arm, epsilon, own))
    return "\n".join(lines)


def _line(arm: Arm, epsilon: str, own: list[dict[str, str]]) -> str:
    certified = [float(row["certified_epsilon"]) for row in own if row["certified_epsilon"]]
    cells = (
        arm.title,
        epsilon or "–",
        f"{max(certified):.4g}" if certified else "–",
        own[0]["noise_multiplier"] or "–",
        *(_mean_sd(own, name) for name in ("accuracy", "macro_f1", "common_accuracy")),
    )
    return "| " + " | ".join(cells) + " |"


def _mean_sd(rows: list[dict[str, str]], name: str) -> str:
    values = [100 * float(row[name]) for row in rows if row[name]]
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def write_tables(known: dict[str, Setting]) -> None:
    """Put the tables between the two marks in the document."""
    rows = read_rows(CSV)
    parts = [
        table(setting, own)
        for name, setting in known.items()
        if (own := [row for row in rows if row["setting"] == name])
    ]
    write_block(TABLES, "privacy", "\n\n".join(parts))


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tables-only", action="store_true")
    arguments = parser.parse_args()
    known = settings(arguments.data or Path("absent"))
    wanted = arguments.settings or [
        name for name in known if arguments.data is not None or name != "sst2"
    ]
    done = {(r["setting"], r["arm"], r["epsilon"], r["seed"]) for r in read_rows(CSV)}
    jobs = [
        (name, arm, seed)
        for name in wanted
        for arm in known[name].arms
        for seed in arguments.seeds
        if (name, arm.title, f"{arm.epsilon:g}" if arm.epsilon else "", str(seed)) not in done
    ]
    for count, (name, arm, seed) in enumerate([] if arguments.tables_only else jobs, start=1):
        row = run_one(name, known[name], arm, seed)
        append_row(CSV, row)
        what = f"{name} {arm.title} {arm.epsilon} seed {seed}"
        print(f"{count}/{len(jobs)} {what}: {row['accuracy']}", flush=True)
    write_tables(known)


if __name__ == "__main__":
    main()
