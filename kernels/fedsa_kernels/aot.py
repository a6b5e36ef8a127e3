"""Kernels compiled for devices that are not here: what they would need, and whether it fits.

    with recording() as launches:
        lora_linear(...)            # on the meta device
    resources(launches[0], TARGETS["sm_90"])

No driver is asked for anything, so this runs on any machine that has Triton.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedsa_kernels.launch import Launch


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Args:
        gpu: as Triton names it.
        shared: bytes of shared memory that a program may have.
        registers: that a thread may have.
    """

    gpu: GPUTarget
    shared: int
    registers: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, 255),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, 255),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, 255),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 512),
}
"""A100, H100 and H200, B200, MI300."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Args:
        shared: bytes of shared memory.
        registers: of a thread.
        spilled: registers or bytes that did not fit and are kept in memory.
        wgmma: instructions of Hopper's asynchronous tensor cores.
    """

    shared: int
    registers: int
    spilled: int
    wgmma: int


_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip
_COMPILER = ("num_warps", "num_stages")
"""Options of a launch that are the compiler's and not the kernel's."""


def resources(launch: Launch, target: Target) -> Resources:
    """Compile one launch for a device, specialised as it would be there."""
    options = {name: launch.options[name] for name in _COMPILER}
    compiled = triton.compile(_source(launch), target=target.gpu, options=options)
    return _read(compiled, target)


def machine_code(launch: Launch) -> str:
    """A name of the machine code that a launch runs: equal names, one compilation."""
    options = [f"{name}={launch.options[name]}" for name in _COMPILER]
    return " ".join([str(_source(launch).hash()), *options])


def _source(launch: Launch) -> ASTSource:
    """The kernel with all that its machine code depends on."""
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.arguments, strict=False)) | launch.options
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(names):
        kept = launch.kernel.params[place].do_not_specialize
        kind, constant, divisible = _specialised(given[name], name in launch.options, kept)
        signature[name] = kind
        if kind == "constexpr":
            constants[(place,)] = constant
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def resources_of_all(
    launches: Sequence[Launch], targets: Sequence[Target]
) -> list[list[Resources]]:
    """What ``resources`` finds for every launch (outer) and device (inner), on all cores.

    Threads are enough: Triton holds no lock of Python while it compiles.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = [
            [pool.submit(resources, launch, target) for target in targets] for launch in launches
        ]
        return [[each.result() for each in row] for row in waiting]


def _specialised(value: Any, constant: bool, kept: bool) -> tuple[str, Any, bool]:
    """Type, constant and divisibility of an argument, as Triton's own launcher decides them."""
    if constant or value is None or (isinstance(value, int) and value == 1 and not kept):
        return "constexpr", value, False
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}", None, True
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", None, value % 16 == 0 and not kept
    return "fp32", None, False


def _read(compiled: Any, target: Target) -> Resources:
    if target.gpu.backend == "hip":
        text = compiled.asm["amdgcn"]
        spilled = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)))
        registers = max(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", text)))
        return Resources(compiled.metadata.shared, registers, spilled, 0)
    usage = _tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in: {usage}")
    return Resources(
        compiled.metadata.shared,
        int(found.group(1)),
        int(found.group(2)),
        compiled.asm["ptx"].count("wgmma.mma_async"),
    )


def _tool(name: str, option: str, cubin: bytes) -> str:
    """Run one of NVIDIA's tools that Triton ships."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(  # noqa: S603 - a tool of Triton on a file of our own
            [str(path), option, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout
