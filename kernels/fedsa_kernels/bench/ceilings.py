"""What a device can do, measured in the run that it is compared with."""

from collections.abc import Sequence

import torch

from fedsa_kernels.bench.roofline import Ceilings
from fedsa_kernels.bench.timing import Step, take_turns
from fedsa_kernels.launch import interpreted

H200 = Ceilings(flops=790e12, bandwidth=4.3e12, launch=2.5e-6)
"""Assumed where none is at hand: rates as such a device was seen to have, the launch a guess."""

_LAUNCHES = 200


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Rate of a large matrix product, bandwidth of a large copy, and time between launches.

    Args:
        device: what is measured.
        dtype: of the product.
    """
    gpu = device.type == "cuda"
    width, values = (8192, 2**29) if gpu else (1024, 2**25)
    if interpreted():  # a dry run
        width, values = 64, 2**16
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    source = torch.randn(values, device=device)
    target, small = torch.empty_like(source), torch.zeros(1, device=device)
    tasks: dict[str, Sequence[Step]] = {
        "product": [lambda: left @ right],
        "copy": [lambda: target.copy_(source)],
        "launch": [lambda: small.add_(1)] * _LAUNCHES,
    }
    times = take_turns(tasks, device, 15)
    return Ceilings(
        flops=2.0 * width**3 / times["product"].p50,
        bandwidth=2 * source.nbytes / times["copy"].p50,
        # On a CPU this is Python's overhead, which the steps hide in their arithmetic no less.
        launch=times["launch"].p50,
    )
