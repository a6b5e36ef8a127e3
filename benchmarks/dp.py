"""What a private training step costs beside the plain one, and Opacus' beside PEFT's, in one run.

The figures are those of ``fedsa-secure bench dp``; this script keeps them.

    python benchmarks/dp.py [--sizes 128x8,32x16,...] [--threads 1,2]
"""

import argparse
import os
from pathlib import Path

import torch
from record import RESULTS, append_row, environment, write_block

from fedsa_secure.bench import Row
from fedsa_secure.bench.dp import SIZES, bench_dp, size_of
from fedsa_secure.bench.private_steps import base_model


def shown(threads: int, row: Row) -> str:
    """A line of the table in the README."""
    ratio = "–" if row.ratio_to_baseline is None else f"{row.ratio_to_baseline:.2f}"
    return f"| {threads} | {row.name} | {row.value:.3g} | {row.unit} | {ratio} |"


def main() -> None:
    """Measure, append to the results, and write the table into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(f"{s.tokens}x{s.rows}" for s in SIZES))
    parser.add_argument("--threads", default="1,2")
    arguments = parser.parse_args()
    sizes = [size_of(size) for size in arguments.sizes.split(",")]
    lines = ["| threads | | value | unit | of plain |", "|---|---|---|---|---|"]
    model = base_model()[1]
    for threads in (int(number) for number in arguments.threads.split(",")):
        torch.set_num_threads(threads)
        around = {**environment(), "cores": str(len(os.sched_getaffinity(0))), "model": model}
        for size in sizes:  # what is measured is kept at once
            for row in bench_dp([size], lambda text: print(text, flush=True)):
                append_row(RESULTS / "dp.csv", {**row.model_dump(), **around})
                lines.append(shown(threads, row))
    write_block(Path(__file__).parent / "README.md", "dp", "\n".join(lines))


if __name__ == "__main__":
    main()
