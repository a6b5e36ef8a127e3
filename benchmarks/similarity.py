"""How alike the A and B of clients are that train on their own, at three levels of heterogeneity.

Figures 2 to 6 of the FedSA-LoRA paper ask this of models that were fine-tuned on their own.

    python benchmarks/similarity.py [--adapters lora rslora vera] [--tables-only]

Writes ``results/similarity.csv``, one figure per adapter into ``docs/``, and a table into
``docs/experiments.md``. What is in the CSV already is not run again.
"""

import argparse
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

from record import RESULTS, append_row, environment, read_rows, write_block

import fedsa_secure
from fedsa_secure.federation.similarity import LayerSimilarity
from fedsa_secure.reporting.similarity import plot_similarity

CSV, DOCS = RESULTS / "similarity.csv", Path(__file__).parents[1] / "docs"
LEVELS = {
    "IID": {"partition": "iid"},
    "Dirichlet(0.5)": {"partition": "dirichlet:0.5"},
    "Dirichlet(0.1)": {"partition": "dirichlet:0.1", "min_rows": 20},
}
ADAPTERS = ("lora", "rslora", "vera")


def run_one(adapter: str, level: str) -> None:
    """Ten clients of the lexicon, each on its own, as long as the default run."""
    with tempfile.TemporaryDirectory() as folder:
        run = fedsa_secure.train(
            output_dir=f"{folder}/run",
            method="local",
            adapter=adapter,
            cross_rows=0,
            evaluate_every=10_000,
            **LEVELS[level],
        )
        for layer in run.similarity():
            append_row(CSV, {"adapter": adapter, "level": level, **asdict(layer), **environment()})


def by_level(adapter: str) -> dict[str, list[LayerSimilarity]]:
    """What the CSV holds of one adapter."""
    found: dict[str, list[LayerSimilarity]] = {}
    for row in read_rows(CSV):
        if row["adapter"] == adapter:
            values = {name: float(row[name]) for name in ("a", "b", "a_update")}
            found.setdefault(row["level"], []).append(LayerSimilarity(row["layer"], **values))
    return {level: found[level] for level in LEVELS if level in found}


def write_results() -> None:
    """A figure per adapter, and the means over the layers as a table."""
    lines = [
        "| adapter | heterogeneity | A | B | A − A₀ | layers in which A is above B |",
        "|---|---|---|---|---|---|",
    ]
    for adapter in ADAPTERS:
        levels = by_level(adapter)
        if not levels:
            continue
        plot_similarity(levels, DOCS / f"similarity-{adapter}.png")
        for level, layers in levels.items():
            means = [statistics.mean(getattr(x, n) for x in layers) for n in ("a", "b", "a_update")]
            above = sum(layer.a > layer.b for layer in layers)
            shown = " | ".join(f"{mean:.2f}" for mean in means)
            lines.append(f"| {adapter} | {level} | {shown} | {above} of {len(layers)} |")
    write_block(DOCS / "experiments.md", "similarity", "\n".join(lines))


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    parser.add_argument("--tables-only", action="store_true")
    arguments = parser.parse_args()
    done = {(row["adapter"], row["level"]) for row in read_rows(CSV)}
    for adapter in [] if arguments.tables_only else arguments.adapters:
        for level in LEVELS:
            if (adapter, level) not in done:
                run_one(adapter, level)
                print(adapter, level, flush=True)
    write_results()


if __name__ == "__main__":
    main()
