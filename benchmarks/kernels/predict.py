"""What the roofline predicts for every shape that is measured on a GPU, before it is measured.

    python benchmarks/kernels/predict.py [--flops F] [--bandwidth B] [--launch L]

writes the table into docs/kernels.md. The rates assumed by default are those at which an H200 was
seen to copy and to multiply; the time of a launch is a guess.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "kernels")]

from record import write_block  # noqa: E402 - found through the lines above

from fedsa_kernels.bench import GPU, H200, Ceilings, predicted  # noqa: E402 - likewise

ORDERS = ("peft", "base first", "apart", "reference", "cublas", "fused")


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flops", type=float, default=H200.flops)
    parser.add_argument("--bandwidth", type=float, default=H200.bandwidth)
    parser.add_argument("--launch", type=float, default=H200.launch)
    given = parser.parse_args()
    top = Ceilings(given.flops, given.bandwidth, given.launch)
    lines = [
        f"{top.flops / 1e12:.0f} TFLOP/s, {top.bandwidth / 1e12:.2f} TB/s, "
        f"{top.launch * 1e6:.1f} µs a launch.",
        "",
        f"| layer | frozen µs | {' | '.join(ORDERS)} |",
        "|---" * (2 + len(ORDERS)) + "|",
    ]
    for shape in GPU:
        frozen = predicted(shape, "frozen", top)
        ratios = [(order, predicted(shape, order, top)) for order in ORDERS]
        cells = ["–" if found is None else f"{found / frozen:.2f}" for _, found in ratios]
        lines.append(f"| {shape} | {frozen * 1e6:.1f} | {' | '.join(cells)} |")
    write_block(ROOT / "docs" / "kernels.md", "predicted", "\n".join(lines))


if __name__ == "__main__":
    main()
