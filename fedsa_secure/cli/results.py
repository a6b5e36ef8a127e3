"""What a run came to."""

from typing import Any

from rich.table import Table

from fedsa_secure.cli import terminal

# Columns of the table at the end of a run: heading, metric, format. Short headings: the table has
# to fit into 80 characters.
_COLUMNS = (
    ("train", "train_rows", ".0f"),
    ("test", "test_rows", ".0f"),
    ("loss", "loss", ".3f"),
    ("acc.", "accuracy", ".1%"),
    ("F1", "macro_f1", ".1%"),
    ("majority", "majority", ".1%"),
    ("others", "cross_accuracy", ".1%"),
    ("common", "common_accuracy", ".1%"),
    ("others' loss", "cross_loss", ".3f"),
    ("common loss", "common_loss", ".3f"),
)
_INSTEAD = {"cross_loss": "cross_accuracy", "common_loss": "common_accuracy"}
"""Losses that are shown where there is no accuracy."""
_LEGEND = {
    "train": "rows trained on",
    "test": "rows of the client's own test part",
    "loss": "cross-entropy there",
    "acc.": "accuracy there (generation: answers that are right)",
    "F1": "macro F1 there",
    "majority": "accuracy of always answering its most frequent class",
    "others": "accuracy of the same model on the other clients' test rows",
    "common": "accuracy on test rows that are the same for all",
    "others' loss": "loss of the same model on the other clients' test rows",
    "common loss": "loss on test rows that are the same for all",
}


def show(run: Any, seconds: float | None) -> None:
    """What a run came to: a table of its personal models, best and last round, and where it is."""
    measured = {c[1] for c in _COLUMNS if any(getattr(m, c[1]) is not None for m in run.metrics)}
    columns = [c for c in _COLUMNS if c[1] in measured and _INSTEAD.get(c[1]) not in measured]
    table = Table(title=f"personal models, {run.config.method}-{run.config.adapter}")
    table.add_column("client", justify="right")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for m in run.metrics:
        cells = [terminal.cell(getattr(m, name), form) for _, name, form in columns]
        table.add_row(str(m.client), *cells)
    table.add_section()
    means = [
        terminal.cell(_mean([getattr(m, name) for m in run.metrics]), f) for _, name, f in columns
    ]
    table.add_row("mean", *means)
    terminal.console.print(table)
    legend = "; ".join(f"{heading}: {_LEGEND[heading]}" for heading, _, _ in columns)
    terminal.console.print(legend, highlight=False)
    for line in _rounds(run, seconds):
        terminal.console.print(line, highlight=False)
    terminal.console.print(
        f"personal adapters in PEFT's format: {run.path / 'adapters'}",
        highlight=False,
        markup=False,
    )


def _rounds(run: Any, seconds: float | None) -> list[str]:
    """Best and last round, bytes and time."""
    last, best = run.history[-1], run.best
    lines = [
        f"last round {last.round}: {_round_scores(last)}; best round {best.round}: "
        f"{_round_scores(best)} (chosen on the test rows themselves, so optimistic)",
        f"each client sends {last.uplink_bytes:,} bytes a round{_seen_by_server(run)}",
    ]
    lost = [record.round for record in run.history if not record.survivors]
    aborts = [abort for record in run.history for abort in record.aborts]
    if aborts:
        lines.append(
            f"attempts aborted: {len(aborts)}, rounds lost: {lost or 'none'}; {aborts[-1]}"
        )
    if run.privacy is not None:
        lines.append(run.privacy.statement)
        lines.append("the scores above are measured by the simulation and are not covered")
    if seconds is not None:
        lines.append(f"{seconds:.0f} s for the rounds run now")
    return lines


def _seen_by_server(run: Any) -> str:
    if not run.history[-1].uplink_bytes:
        return ""
    secure = run.config.secure_aggregation
    return ", masked: the server sees sums only" if secure else ", in the clear"


def _round_scores(record: Any) -> str:
    accuracy = "" if record.accuracy is None else f"accuracy {record.accuracy:.1%}, "
    return f"{accuracy}test loss {record.test_loss:.3f}"


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
