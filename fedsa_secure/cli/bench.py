"""``fedsa-secure bench``."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from fedsa_secure.cli import terminal
from fedsa_secure.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure this library on this machine."
)


@app.command("secagg")
def _bench_secagg(
    clients: Annotated[
        str, typer.Option(metavar="N,N,…", help="cohort sizes, each at least 3")
    ] = "3,10,50,100,200,1000",
    values: Annotated[int, typer.Option(help="values in a vector")] = 1_000_000,
    large: Annotated[
        bool, typer.Option("--large", help="also the memory of masking 100 million values")
    ] = False,
    json: terminal.Json = None,
) -> None:
    """Time secure aggregation beside its bound and, where it is installed, Flower's SecAgg+."""
    from fedsa_secure.bench import bench_secagg, seed_note, write_rows

    sizes = terminal.numbers("clients", clients, int)
    terminal.require_places(json=json)
    with terminal.console.status("") as status:
        rows = bench_secagg(sizes, values, large, status.update)
    terminal.console.print(_bench_table("secure aggregation", rows, ("of Flower", "of bound")))
    for line in (*_BENCH_LEGEND, seed_note(rows)):
        terminal.console.print(line, highlight=False)
    if json is not None:
        write_rows(json, rows)


@app.command("dp")
def _bench_dp(
    sizes: Annotated[
        str, typer.Option(metavar="TxB,…", help="tokens of a record x records of a batch")
    ] = "128x8,32x16,512x2,6x64",
    json: terminal.Json = None,
) -> None:
    """Time a private training step beside the plain one, and Opacus' beside PEFT's."""
    from fedsa_secure.bench import write_rows
    from fedsa_secure.bench.dp import bench_dp, size_of

    wanted = [size_of(size) for size in sizes.split(",")]
    terminal.require_places(json=json)
    with terminal.console.status("") as status:
        rows = bench_dp(wanted, status.update)
    terminal.console.print(_bench_table("a private training step", rows, ("of plain",)))
    if json is not None:
        write_rows(json, rows)


@app.command("kernels")
def _bench_kernels(
    table: Annotated[
        Path | None,
        typer.Option(help="add what was fastest here, for FEDSA_KERNEL_TABLE to name"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="of the numbers that the check draws")
    ] = 0,
    json: terminal.Json = None,
) -> None:
    """Check, tune and time the adapter kernels beside PEFT, other orders of work and the roofline.

    On a CPU there is nothing to tune. TRITON_INTERPRET=1 makes it a dry run at tiny sizes, whose
    times mean nothing.
    """
    from fedsa_kernels.bench import WrongResultError
    from fedsa_kernels.tables import Table as MeasuredTable
    from fedsa_secure.bench import write_rows
    from fedsa_secure.bench.kernels import bench_kernels, rows_of

    terminal.require_places(json=json, table=table)
    if table is not None and table.exists():
        try:
            MeasuredTable.read(table)
        except ValueError as error:
            raise ConfigError("table", str(error), "give another file") from None
    with terminal.console.status("") as status, TemporaryDirectory() as folder:
        try:
            findings, more = bench_kernels(table or Path(folder) / "table", status.update, seed)
            steps = [row for workload in more for row in workload]
        except WrongResultError as error:
            terminal.console.print(f"wrong results:\n{error}", style="red")
            raise typer.Exit(1) from None
    rows = rows_of(findings)
    terminal.console.print(_bench_table(findings.device, rows, ("of frozen", "of bound")))
    terminal.console.print(_bench_table("training steps", steps, ("of PEFT",)))
    for line in (f"{len(findings.checks)} checks passed", *_KERNELS_LEGEND):
        terminal.console.print(line, highlight=False)
    if table is not None and not findings.table.rows:
        terminal.console.print(f"{table} was not written: nothing is tuned on a CPU")
    if json is not None:
        write_rows(json, [*rows, *steps])


_KERNELS_LEGEND = (
    "of frozen: time over that of the frozen layer, forward and gradient of x",
    "of bound: time over the least that the roofline allows, at rates measured in this run",
)
_BENCH_LEGEND = (
    "k: neighbours; of Flower: time over that of Flower's client with as many neighbours",
    "of bound: time over that of k + 1 AES-256-CTR streams and additions with as many threads",
)


def _bench_table(title: str, rows: Any, ratios: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for heading in ("n", "", "value", "unit", *ratios):
        table.add_column(heading, justify="left" if heading in ("", "unit") else "right")
    last = None
    for row in rows:
        if last not in (None, row.n):
            table.add_section()
        last = row.n
        cells = (
            terminal.cell(row.ratio_to_baseline, ".3f"),
            terminal.cell(row.ratio_to_bound, ".2f"),
        )
        table.add_row(
            str(row.n),
            row.name,
            f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}",
            row.unit,
            *cells[: len(ratios)],
        )
    return table
