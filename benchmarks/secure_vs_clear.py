"""The default run with secure aggregation and without: accuracy, and what the protocol costs.

    python benchmarks/secure_vs_clear.py [--seeds 0 1 2]

Runs that are in the results already are not repeated.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from record import RESULTS, append_row, environment, read_rows, write_block

import fedsa_secure

_FILE = RESULTS / "secure_vs_clear.csv"
_PAGE = Path(__file__).parents[1] / "docs" / "experiments.md"


def run_one(secure: bool, seed: int) -> dict[str, object]:
    """Train once, through the public interface."""
    with tempfile.TemporaryDirectory() as folder:
        run = fedsa_secure.train(
            output_dir=f"{folder}/run", secure_aggregation=secure, seed=seed, evaluate_every=100
        )
        timings = run.timings.values()
        return {
            "secure_aggregation": secure,
            "seed": seed,
            "accuracy": f"{run.accuracy:.5f}",
            "macro_f1": f"{run.macro_f1:.5f}",
            "common_accuracy": f"{run.common_accuracy:.5f}",
            "test_loss": f"{run.loss:.7f}",
            "uplink_bytes_per_round": run.history[-1].uplink_bytes,
            "overhead_bytes_per_client_and_round": round(
                np.mean([t.overhead_bytes for t in timings]) / len(run.clients)
            ),
            "exchanges_last_round": list(timings)[-1].exchanges,
            "aggregate_over_train_seconds": f"{_share(timings):.4f}",
            **environment(),
        }


def _share(timings) -> float:
    return float(sum(t.aggregate for t in timings) / sum(t.train for t in timings))


def table(rows: list[dict[str, str]]) -> str:
    """Both ways side by side, a line per seed."""
    lines = [
        "| seed | accuracy, secure | clear | macro F1, secure | clear | test loss, secure − clear "
        "| time of the protocol / of training |",
        "|---|---|---|---|---|---|---|",
    ]
    by_key = {(row["secure_aggregation"] == "True", row["seed"]): row for row in rows}
    for seed in sorted({row["seed"] for row in rows}):
        if not {(True, seed), (False, seed)} <= by_key.keys():
            continue
        ours, clear = by_key[True, seed], by_key[False, seed]
        scores = [
            f"{float(row[name]):.2%}" for name in ("accuracy", "macro_f1") for row in (ours, clear)
        ]
        moved = float(ours["test_loss"]) - float(clear["test_loss"])
        share = ours["aggregate_over_train_seconds"]
        lines.append(f"| {seed} | {' | '.join(scores)} | {moved:+.1e} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    done = {(row["secure_aggregation"], row["seed"]) for row in read_rows(_FILE)}
    for seed in seeds:
        for secure in (True, False):
            if (str(secure), str(seed)) not in done:
                append_row(_FILE, run_one(secure, seed))
    write_block(_PAGE, "secure_vs_clear", table(read_rows(_FILE)))


if __name__ == "__main__":
    main()
