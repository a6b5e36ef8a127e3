"""What every launch decides besides its operands."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from fedsa_kernels.launch import precision, within_reach

X = torch.zeros(1)
# Every way to set torch's switch, and a way to set it back.
SWITCHES = {
    "allow_tf32": (torch.backends.cuda.matmul, "allow_tf32", True, False),
    "cuda.matmul": (torch.backends.cuda.matmul, "fp32_precision", "tf32", "ieee"),
    "cudnn": (torch.backends.cudnn, "fp32_precision", "tf32", "ieee"),
    "all backends": (torch.backends, "fp32_precision", "tf32", "ieee"),
}


@pytest.fixture(autouse=True)
def _switches_are_put_back() -> Iterator[None]:
    with warnings.catch_warnings():  # torch warns of the old names, once in a process
        warnings.simplefilter("ignore")
        yield
        torch.set_float32_matmul_precision("highest")
        for module in (torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends):
            module.fp32_precision = "none"
    assert precision(X) == "ieee"


def turn(name: str, on: bool) -> None:
    module, attribute, *values = SWITCHES[name]
    setattr(module, attribute, values[0 if on else 1])


@pytest.mark.parametrize("name", SWITCHES)
def test_products_of_float32_follow_the_switch_by_any_of_its_names(name):
    turn(name, True)
    assert precision(X) == "tf32"
    turn(name, False)
    assert precision(X) == "ieee"


@pytest.mark.parametrize(
    ("level", "expected"), [("high", "tf32"), ("medium", "tf32"), ("highest", "ieee")]
)
def test_products_of_float32_follow_torchs_level_of_precision(level, expected):
    torch.set_float32_matmul_precision(level)
    assert precision(X) == expected


def test_what_was_set_last_counts_where_both_apis_are_mixed():
    """Torch refuses to read the old name then."""
    turn("allow_tf32", True)
    turn("cuda.matmul", False)
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        _ = torch.backends.cuda.matmul.allow_tf32
    assert precision(X) == "ieee"
    turn("cuda.matmul", True)
    assert precision(X) == "tf32"


def test_columns_too_far_apart_for_a_kernel_are_brought_together():
    """Without memory: 14,336 columns of 160,000 numbers end beyond 2³¹."""
    far = torch.empty(14336, 160000, device="meta").t()
    assert far.stride() == (1, 160000)
    assert within_reach(far).stride() == (14336, 1)
    near = torch.empty(64, 100, device="meta").t()
    assert within_reach(near) is near
