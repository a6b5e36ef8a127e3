"""The adapter kernels on this device: checked, tuned, timed, in one command.

On a GPU it appends a row for every order of work to `results/kernels.csv` and one for every whole
training step to `results/kernels_steps.csv`, draws a plot per shape, and writes the dispatcher's
table, which belongs into `kernels/fedsa_kernels/tuned/`. Under TRITON_INTERPRET=1 it is a dry run:
everything goes to `--out` and the times mean nothing. On a CPU it compares PEFT's order with ours.

    python benchmarks/kernels/measure.py [--out FOLDER]
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

from record import RESULTS, append_row, environment, write_block  # noqa: E402 - found through the lines above

from fedsa_kernels.bench import Findings, Timing, best_plain  # noqa: E402 - likewise
from fedsa_kernels.dispatch import BACKENDS, device_name  # noqa: E402 - likewise
from fedsa_kernels.launch import interpreted  # noqa: E402 - likewise
from fedsa_secure.bench.kernels import bench_kernels  # noqa: E402 - likewise


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


def table(timings: list[Timing]) -> str:
    """Medians and ratios, for the README."""
    lines = [
        "| layer | order | µs | of frozen | of PEFT | of roofline |",
        "|---|---|---|---|---|---|",
    ]
    for t in timings:
        others = {o.order: o.times.p50 for o in timings if o.shape == t.shape}
        bound = "–" if t.predicted is None else f"{t.times.p50 / t.predicted:.2f}"
        ratios = [f"{t.times.p50 / others[name]:.2f}" for name in ("frozen", "peft")]
        lines.append(
            f"| {t.shape} | {t.order} | {t.times.p50 * 1e6:.0f} | {' | '.join(ratios)} | {bound} |"
        )
    return "\n".join(lines)


def verdict(findings: Findings) -> str:
    """Each shape's fastest order of ours beside the best of plain torch."""
    lines = []
    for shape in dict.fromkeys(t.shape for t in findings.timings):
        of_shape = {t.order: t.times.p50 for t in findings.timings if t.shape == shape}
        ours = min((n for n in (*BACKENDS, "apart") if n in of_shape), key=of_shape.get)
        plain = best_plain(findings.timings, shape)
        lines.append(
            f"{shape}: {ours} {of_shape[ours] / of_shape['frozen']:.2f} of frozen, "
            f"{of_shape[ours] / plain.times.p50:.2f} of {plain.order}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run everything and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()

    def report(text: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} s  {text}", flush=True)

    mpl.use("agg")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = device_name(device) if device.type == "cuda" else "dry-run"
    around = environment() | {"triton": version("triton")}

    def keep(findings: Findings) -> None:
        """At once: the whole takes minutes, and a device may be lent for less."""
        for row in rows(findings):
            append_row(arguments.out / "kernels.csv", row | around | {"device": findings.device})
        plot(findings.timings, arguments.out)

    tuned = arguments.out / f"{name}.json"
    findings, steps = bench_kernels(tuned, report, secrets.randbits(31), keep)
    for step in steps:
        row = step.model_dump() | around | {"device": findings.device}
        append_row(arguments.out / "kernels_steps.csv", row)
        print(step.name, f"{step.value:.4g} {step.unit}", step.ratio_to_baseline or "", flush=True)
    if arguments.out == RESULTS and not interpreted():
        around_table = f"{findings.device}, commit {around['commit']}\n\n{table(findings.timings)}"
        write_block(ROOT / "benchmarks" / "README.md", "kernels", around_table)
    print(f"{len(findings.checks)} checks passed, largest error by arithmetic:")
    for arithmetic in dict.fromkeys(c.arithmetic for c in findings.checks):
        errors = [c.error for c in findings.checks if c.arithmetic == arithmetic]
        print(f"  {arithmetic}: {max(errors):.2e}")
    print(verdict(findings))
    report("done")


if __name__ == "__main__":
    main()
