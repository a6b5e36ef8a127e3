"""Kernels compiled before they run, by all cores.

One after the other, as they come, compilation would take most of a measurement's time.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from fedsa_kernels.aot import machine_code
from fedsa_kernels.launch import Launch, interpreted, recording


def launches_of(*steps: Callable[[], object]) -> list[Launch]:
    """One launch for every machine code that the steps need; nothing is launched.

    Torch's own work is done, on memory that no kernel wrote.
    """
    distinct: dict[str, Launch] = {}
    # Gradients of a GPU's tensors are made by a thread of their own, which does not record.
    with torch.autograd.set_multithreading_enabled(False), recording() as found:
        for step in steps:
            step()
            distinct |= {machine_code(each): _without_memory(each) for each in found}
            found.clear()
    return list(distinct.values())


def _without_memory(launch: Launch) -> Launch:
    """The same machine code, and no tensor of any size kept alive."""
    arguments = (
        each.new_empty(0) if isinstance(each, Tensor) else each for each in launch.arguments
    )
    return replace(launch, arguments=tuple(arguments))


def compile_ahead(launches: Iterable[Launch]) -> int:
    """Compile for the device at hand, and count what could be compiled.

    Threads are enough: Triton holds no lock of Python while it compiles.
    """
    distinct = {machine_code(each): each for each in launches}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(found is not None for found in pool.map(compiled, distinct.values()))


def compiled(launch: Launch) -> Any:
    """The machine code; None for a tile that does not fit the device."""
    try:
        return launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    except (RuntimeError, TritonError):
        return None


def runs(step: Callable[[], object]) -> bool:
    """Whether the device can run all that a step launches, without keeping registers in memory."""
    if interpreted():
        return True
    for found in map(compiled, launches_of(step)):
        if found is None:
            return False
        try:
            found._init_handles()  # loads it, which is what counts the registers
        except (RuntimeError, TritonError):
            return False
        if found.n_spills:
            return False
    return True
