"""The trap of docs/privacy.md, measured: the obvious construction and planted bugs under the audit.

The unsound trainings are those of the tests (``tests/unsound_training.py``); the library has none.
Writes a table and a figure into ``docs``. The seed fixes the trials, so a rerun gives the same.

    python benchmarks/private_trap.py
"""

import sys
from dataclasses import replace
from pathlib import Path

from record import write_block

from fedsa_secure.audit.hidden_state import (
    TwoWorlds,
    audit_gaussian,
    clipped_record,
    hidden_record,
)
from fedsa_secure.audit.report import points_of
from fedsa_secure.reporting.audit import plot_audit

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import unsound_training as unsound  # noqa: E402 - it is not installed

EPSILONS, DELTA, TRIALS, SEED = (1.0, 8.0), 1e-5, 4000, 5


def cases() -> dict[str, TwoWorlds]:
    """What is audited, by name."""
    hidden, clipped = hidden_record(), clipped_record()
    return {
        "noise on A alone, B by SGD": replace(hidden, start=unsound.Naive),
        "noise on A alone, B by Adam": replace(hidden, start=unsound.NaiveAdam),
        "head left out of the clip": replace(
            hidden_record(frozen_b=True), start=unsound.UnclippedHead
        ),
        "sums not cleared between steps": replace(clipped, start=unsound.SumsThatStay),
        "noise divided by the batch": replace(clipped, start=unsound.NoiseDividedByTheBatch),
        "twin, the same worst case": hidden,
        "twin, a record at the clip norm": clipped,
        "frozen-b, the worst case in the head": hidden_record(frozen_b=True),
    }


def main() -> None:
    """Audit everything at both claims, then write table and figure."""
    lines = [
        "| | " + " | ".join(f"claimed {e:g}: proven" for e in EPSILONS) + " | |",
        "|---|---|---|---|",
    ]
    points = []
    for name, worlds in cases().items():
        found = [audit_gaussian(worlds, e, DELTA, TRIALS, SEED) for e in EPSILONS]
        points += points_of([each.model_copy(update={"name": name}) for each in found])
        cells = [f"{each.proven:.2f}" for each in found]
        verdicts = " and ".join(sorted({each.verdict for each in found}))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {verdicts} |")
    most = f"Most provable: {points[0].most_provable:.1f}. Trials: {TRIALS} a world."
    write_block(ROOT / "docs" / "privacy.md", "audit", "\n".join([*lines, "", most]))
    plot_audit(points, ROOT / "docs" / "privacy-audit.png")


if __name__ == "__main__":
    main()
