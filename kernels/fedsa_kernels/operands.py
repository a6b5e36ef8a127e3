"""What every op does with its operands."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
"""Of the operands that may be trained; None for those that need none."""


def product_dtype(x: Float[Tensor, "... d"]) -> torch.dtype:
    """The dtype that all operands of an op are brought to.

    Under autocast this is autocast's dtype, since an op of our own is not on its list; else, and in
    float64, which autocast leaves alone, it is that of x, so that adapters kept in float32 fit a
    base model in half precision.
    """
    kind = _kind(x)
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _kind(x: Tensor) -> str:
    """The kind of device; to make its name takes as long as all the rest of ``product_dtype``."""
    return "cpu" if x.is_cpu else x.device.type


def without_autocast(gradients: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A backward pass in the dtypes of its forward pass, wherever it is called."""

    @wraps(gradients)
    def run(dy: Any, *others: Any) -> Gradients:
        kind = _kind(dy if isinstance(dy, Tensor) else dy[0])
        if not torch.is_autocast_enabled(kind):
            return gradients(dy, *others)
        with torch.autocast(kind, enabled=False):
            return gradients(dy, *others)

    return run


def in_one_dtype(x: Tensor, *others: Tensor | None) -> list[Any]:
    """All operands in ``product_dtype(x)``; None stays None.

    Torch would take its time to find that nothing is to be done.
    """
    dtype = product_dtype(x)
    operands = (x, *others)
    return [each if each is None or each.dtype == dtype else each.to(dtype) for each in operands]


def rows_of(x: Float[Tensor, "... d"]) -> Float[Tensor, "row d"]:
    """The vectors of x as one matrix."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def require_segments(x: Float[Tensor, "... d"], clients: int, op: str) -> None:
    """Refuse vectors that cannot be split into one equal segment per client.

    Raises:
        ValueError: saying how many there are.
    """
    if clients == 1:
        return
    rows = math.prod(x.shape[:-1])
    if rows % clients:
        raise ValueError(f"{op}: {rows} rows do not split into {clients} client segments")


Expected = tuple[str, Tensor | None, tuple[int, ...]]
"""An operand's name, the operand, and the shape that it should have."""


def require_shapes(op: str, *expected: Expected) -> None:
    """Refuse operands of other shapes: kernels would read what is beside them in memory.

    Raises:
        ValueError: naming op, operand and both shapes.
    """
    for name, operand, shape in expected:
        if operand is not None and operand.shape != shape:
            raise ValueError(f"{op}: {name} is {list(operand.shape)}, and not {list(shape)}")


def segments(x: Float[Tensor, "vector d"], clients: int) -> Float[Tensor, "client row d"]:
    """Rows with a client axis."""
    return x.view(clients, x.shape[0] // clients, x.shape[1])


def by_client(x: Float[Tensor, "vector d"], clients: int) -> Float[Tensor, "*client row d"]:
    """Rows by client, as matrices that ``@`` multiplies; a single client's is one plain matrix.

    A batch of one takes MKL up to twice as long as the plain product.
    """
    return x if clients == 1 else segments(x, clients)


def per_client(factor: Float[Tensor, "client a b"]) -> Float[Tensor, "*client a b"]:
    """A factor as a partner of ``by_client``."""
    return factor.squeeze(0)


def scaled(
    left: Float[Tensor, "*client a b"], right: Float[Tensor, "*client b c"], scaling: float
) -> Float[Tensor, "*client a c"]:
    """``scaling·left·right``, scaled on the way out of the product."""
    if scaling == 1.0:
        return left @ right
    multiply = torch.addmm if left.dim() == 2 else torch.baddbmm
    return multiply(left.new_empty(()), left, right, beta=0, alpha=scaling)


def onto_bias(
    bias: Float[Tensor, " c"] | None,
    left: Float[Tensor, "*client a b"],
    right: Float[Tensor, "*client b c"],
    scaling: float,
) -> Float[Tensor, "*client a c"]:
    """``bias + scaling·left·right``."""
    if bias is None:
        return scaled(left, right, scaling)
    add = torch.addmm if left.dim() == 2 else torch.baddbmm
    return add(bias, left, right, alpha=scaling)
