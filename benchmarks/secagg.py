"""What secure aggregation costs, beside the bound and Flower's SecAgg+, in one run.

The figures are those of ``fedsa-secure bench secagg``; this script keeps them.

    python benchmarks/secagg.py [--clients 3,10,...] [--values N] [--large]
"""

import argparse
import os
from pathlib import Path

from record import RESULTS, append_row, environment, write_block

from fedsa_secure.bench import Row, bench_secagg, seed_note
from fedsa_secure.bench.secagg import CLIENTS, VALUES


def shown(row: Row) -> str:
    """A line of the table in the README."""
    figure = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}"
    ratios = (row.ratio_to_baseline, row.ratio_to_bound)
    cells = ["–" if ratio is None else f"{ratio:.3g}" for ratio in ratios]
    return f"| {row.n} | {row.name} | {figure} | {row.unit} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, append to the results, and write the table into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", default=",".join(map(str, CLIENTS)))
    parser.add_argument("--values", type=int, default=VALUES)
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.clients.split(",")]
    rows = bench_secagg(sizes, arguments.values, arguments.large, lambda text: print(text))
    around = {**environment(), "cores": str(len(os.sched_getaffinity(0)))}
    for row in rows:
        append_row(RESULTS / "secagg.csv", {**row.model_dump(), **around})
    lines = ["| n | | value | unit | of Flower | of bound |", "|---|---|---|---|---|---|"]
    lines += [shown(row) for row in rows]
    lines += ["", seed_note(rows) + "."]
    write_block(Path(__file__).parent / "README.md", "secagg", "\n".join(lines))


if __name__ == "__main__":
    main()
