"""What every adapter kernel takes on devices that are not here, as the table of docs/kernels.md.

python benchmarks/kernels/resources.py
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "kernels")]

from record import write_block  # noqa: E402 - both folders are of this repository
from test_adapters_aot import launches, variant  # noqa: E402 - the gate and the table see the same

from fedsa_kernels.aot import TARGETS, Resources, resources  # noqa: E402 - likewise

SHAPES = [(torch.bfloat16, 16), (torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float32, 16)]


def cell(found: Resources) -> str:
    """Registers, shared kilobytes, and instructions of Hopper's tensor cores."""
    spilled = f" **{found.spilled} spilled**" if found.spilled else ""
    wgmma = f" / {found.wgmma}" if found.wgmma else ""
    return f"{found.registers} / {found.shared / 1024:.0f}{wgmma}{spilled}"


def main() -> None:
    """Compile everything, then write the table."""
    lines = [
        f"| kernel | dtype | rank | {' | '.join(TARGETS)} |",
        "|---" * (3 + len(TARGETS)) + "|",
    ]
    for dtype, rank in SHAPES:
        for each in launches(dtype, rank, 0.1):
            cells = [cell(resources(each, target)) for target in TARGETS.values()]
            name = str(dtype).removeprefix("torch.")
            lines.append(f"| {variant(each)} | {name} | {rank} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    write_block(ROOT / "docs" / "kernels.md", "resources", "\n".join(lines))


if __name__ == "__main__":
    main()
