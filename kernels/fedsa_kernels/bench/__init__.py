"""The adapter kernels measured: checked, tuned and timed beside other orders of the same work."""

from fedsa_kernels.bench.ceilings import H200
from fedsa_kernels.bench.checks import Check
from fedsa_kernels.bench.measure import (
    Findings,
    Plan,
    Timing,
    WrongResultError,
    best_plain,
    name_of,
    plan_for,
    run,
)
from fedsa_kernels.bench.roofline import Ceilings, predicted
from fedsa_kernels.bench.shapes import CPU, DRY, GPU, Shape

__all__ = [
    "CPU",
    "DRY",
    "GPU",
    "H200",
    "Ceilings",
    "Check",
    "Findings",
    "Plan",
    "Shape",
    "Timing",
    "WrongResultError",
    "best_plain",
    "name_of",
    "plan_for",
    "predicted",
    "run",
]
