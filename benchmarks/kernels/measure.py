"""The adapter kernels on this device: checked, tuned, timed, in one command.

On a GPU it appends a row for every order of work to `results/kernels.csv` and one for every whole
training step to `results/kernels_steps.csv`, draws a plot per shape, and writes the dispatcher's
table, which belongs into `kernels/fedsa_kernels/tuned/`. Under TRITON_INTERPRET=1 it is a dry run:
everything goes to `--out` and the times mean nothing. On a CPU it compares PEFT's order with ours.

    python benchmarks/kernels/measure.py [--out FOLDER] [--only TEXT] [--resume]

What is found of a layer is written at once. After a run that was cut short, `--resume` checks
again and goes on with the layers and steps that are missing.
"""

import argparse
import secrets
import sys
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "kernels"), str(ROOT)]

from record import RESULTS, append_row, commit, environment, read_rows, write_block  # noqa: E402 - found through the lines above

from fedsa_kernels.bench import Findings, Shape, Timing, best_plain, name_of  # noqa: E402 - likewise
from fedsa_kernels.bench.work import orders_of  # noqa: E402 - likewise
from fedsa_kernels.dispatch import device_name  # noqa: E402 - likewise
from fedsa_kernels.launch import interpreted  # noqa: E402 - likewise
from fedsa_kernels.tables import BACKENDS  # noqa: E402 - likewise
from fedsa_secure.bench.kernels import bench_kernels, device_here, names_here  # noqa: E402 - likewise


def rows(findings: Findings) -> list[dict[str, object]]:
    """One row for every order on every shape; times in microseconds."""
    frozen = {t.shape: t.times.p50 for t in findings.timings if t.order == "frozen"}
    found = []
    for t in findings.timings:
        plain, top = best_plain(findings.timings, t.shape), findings.ceilings[t.shape.dtype]
        found.append(
            {
                **vars(t.shape),
                "order": t.order,
                "p20_us": f"{t.times.p20 * 1e6:.2f}",
                "p50_us": f"{t.times.p50 * 1e6:.2f}",
                "p80_us": f"{t.times.p80 * 1e6:.2f}",
                "of_frozen": f"{t.times.p50 / frozen[t.shape]:.3f}",
                "of_best_plain": f"{t.times.p50 / plain.times.p50:.3f}",
                "best_plain": plain.order,
                "roofline_us": "" if t.predicted is None else f"{t.predicted * 1e6:.2f}",
                "tflops_ceiling": f"{top.flops / 1e12:.3g}",
                "gb_per_s_ceiling": f"{top.bandwidth / 1e9:.4g}",
                "launch_us": f"{top.launch * 1e6:.2f}",
            }
        )
    return found


def plot(timings: list[Timing], folder: Path) -> None:
    """Measured medians with their spread, and the roofline's bound, of one shape."""
    shape = timings[0].shape
    figure, axes = pyplot.subplots(figsize=(8, 3))
    names = [t.order for t in timings]
    middle = [t.times.p50 * 1e6 for t in timings]
    below = [(t.times.p50 - t.times.p20) * 1e6 for t in timings]
    above = [(t.times.p80 - t.times.p50) * 1e6 for t in timings]
    axes.barh(names, middle, xerr=[below, above], color="#4878a8", label="measured")
    bounds = [(t.order, t.predicted * 1e6) for t in timings if t.predicted is not None]
    axes.plot([b for _, b in bounds], [n for n, _ in bounds], "k|", markersize=14, label="roofline")
    axes.invert_yaxis()
    axes.set(title=str(shape), xlabel="µs, forward and backward")
    axes.legend()
    figure.tight_layout()
    words = "".join(c if c.isalnum() else "-" for c in str(shape))
    figure.savefig(folder / f"{words}.png", dpi=120)
    pyplot.close(figure)


def table(found: list[dict[str, str]]) -> str:
    """Medians and ratios, for the README."""
    lines = [
        "| layer | order | µs | of frozen | of PEFT | of roofline |",
        "|---|---|---|---|---|---|",
    ]
    for layer, orders in by_layer(found).items():
        for order, row in orders.items():
            taken = float(row["p50_us"])
            bound = f"{taken / float(row['roofline_us']):.2f}" if row["roofline_us"] else "–"
            ratios = [f"{taken / float(orders[name]['p50_us']):.2f}" for name in ("frozen", "peft")]
            lines.append(f"| {layer} | {order} | {taken:.0f} | {' | '.join(ratios)} | {bound} |")
    return "\n".join(lines)


def verdict(found: list[dict[str, str]]) -> str:
    """Each layer's fastest order of ours beside the best of plain torch; who loses is named."""
    lines, lost = [], []
    for layer, orders in by_layer(found).items():
        ours = min(
            (row for name, row in orders.items() if name in (*BACKENDS, "apart")),
            key=lambda row: float(row["p50_us"]),
        )
        of_plain = float(ours["of_best_plain"])
        lines.append(
            f"{layer}: {ours['order']} {float(ours['of_frozen']):.2f} of frozen, "
            f"{of_plain:.2f} of {ours['best_plain']}"
        )
        lost += [f"  {layer}: {ours['best_plain']}"] if of_plain > 1 else []
    return "\n".join([*lines, f"plain torch is faster on {len(lost)} of {len(lines)}:", *lost])


def by_layer(found: list[dict[str, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """The last row of every order, by layer; layers in the order of their first row."""
    layers: dict[str, dict[str, dict[str, str]]] = {}
    for row in found:
        layers.setdefault(layer_of(row), {})[row["order"]] = row
    return layers


def layer_of(row: dict[str, str]) -> str:
    """The shape that a row is of, by its name."""
    sizes = {name: int(row[name]) for name in ("d_in", "d_out", "rows", "rank", "clients")}
    return str(Shape(**sizes, op=row["op"], dtype=row["dtype"]))


def already(path: Path, around: dict[str, str]) -> list[dict[str, str]]:
    """Rows that a run on this device and commit wrote before."""
    same = ("device", "commit")
    return [r for r in read_rows(path) if all(r.get(name) == around[name] for name in same)]


def finished(rows_before: list[dict[str, str]], device: torch.device) -> set[str]:
    """Names of the layers of which every order is there."""
    return {
        layer
        for layer, orders in by_layer(rows_before).items()
        if orders_of(next(iter(orders.values()))["op"], device).keys() <= orders.keys()
    }


def options() -> argparse.Namespace:
    """What the command line says; what makes no sense ends here, before anything is timed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--only", default="", help="layers and steps with this in their names")
    parser.add_argument("--resume", action="store_true", help="leave out what --out has")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    if interpreted() and arguments.out == RESULTS.resolve():
        parser.error("times of the interpreter mean nothing: name a folder of their own by --out")
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out {arguments.out} is no folder")
    if arguments.resume and commit() == "unknown":
        parser.error("--resume needs to know the commit: FEDSA_COMMIT may say it")
    if not any(arguments.only in name for name in names_here()):
        named = "\n  ".join(names_here())
        parser.error(f"--only {arguments.only!r} is in no name of\n  {named}")
    return arguments


def main() -> None:
    """Run everything and write it down."""
    arguments, begun = options(), time.monotonic()

    def report(text: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} s  {text}", flush=True)

    mpl.use("agg")
    device = device_here()
    around = environment() | {"triton": version("triton")}
    if interpreted():
        around["device"] = name_of(device)
    layers, steps = (arguments.out / name for name in ("kernels.csv", "kernels_steps.csv"))
    done = finished(already(layers, around), device)
    done |= {r["name"].split(": ")[0] for r in already(steps, around)}

    def wanted(name: str) -> bool:
        return arguments.only in name and not (arguments.resume and name in done)

    def keep(findings: Findings) -> None:
        """At once: the whole takes minutes, and a device may be lent for less."""
        for row in rows(findings):
            append_row(layers, row | around)
        plot(findings.timings, arguments.out)

    name = device_name(device) if device.type == "cuda" else "dry-run"
    seed = secrets.randbits(31)
    findings, taken = bench_kernels(arguments.out / f"{name}.json", report, seed, keep, wanted)
    for workload in taken:
        for step in workload:
            append_row(steps, step.model_dump() | around)
            print(
                step.name, f"{step.value:.4g} {step.unit}", step.ratio_to_baseline or "", flush=True
            )
    found = already(layers, around)
    if arguments.out == RESULTS.resolve():
        text = f"{around['device']}, commit {around['commit']}\n\n{table(found)}"
        write_block(ROOT / "benchmarks" / "README.md", "kernels", text)
    print(f"{len(findings.checks)} checks passed, largest error by arithmetic:")
    for arithmetic in dict.fromkeys(c.arithmetic for c in findings.checks):
        errors = [c.error for c in findings.checks if c.arithmetic == arithmetic]
        print(f"  {arithmetic}: {max(errors):.2e}")
    print(verdict(found))
    report("done")


if __name__ == "__main__":
    main()
