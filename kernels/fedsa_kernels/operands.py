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


_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def product_dtype(x: Float[Tensor, "... d"]) -> torch.dtype:
    """The dtype that all operands of an op are brought to.

    Under autocast this is autocast's dtype, since an op of our own is not on its list; else, and in
    float64, which autocast leaves alone, it is that of x, so that adapters kept in float32 fit a
    base model in half precision.

    Raises:
        ValueError: for an x of any other numbers: weights would be rounded to integers, say.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}, and not float16, bfloat16, float32 or float64")
    kind = _autocast_of(x)
    return x.dtype if kind is None or x.dtype == torch.float64 else torch.get_autocast_dtype(kind)


def _autocast_of(x: Tensor) -> str | None:
    """The kind of device on which autocast is in force for x; None without."""
    if x.is_meta:  # a device that autocast does not know
        return None
    # To make a device's name takes as long as all the rest of ``product_dtype``.
    kind = "cpu" if x.is_cpu else x.device.type
    return kind if torch.is_autocast_enabled(kind) else None


def without_autocast(gradients: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A backward pass in the dtypes of its forward pass, wherever it is called."""

    @wraps(gradients)
    def run(dy: Any, *others: Any) -> Gradients:
        kind = _autocast_of(dy if isinstance(dy, Tensor) else dy[0])
        if kind is None:
            return gradients(dy, *others)
        with torch.autocast(kind, enabled=False):
            return gradients(dy, *others)

    return run


def in_one_dtype(x: Tensor, *others: Tensor | None) -> list[Any]:
    """All operands in ``product_dtype(x)``; None stays None.

    Torch would take its time to find that nothing is to be done.

    Raises:
        ValueError: as ``product_dtype``, or for operands of which some are not where x is.
    """
    dtype = product_dtype(x)
    operands = (x, *others)
    if not x.is_cpu:  # a kernel would take another device's address for one of its own
        elsewhere = {str(t.device) for t in others if t is not None and t.device != x.device}
        if elsewhere:
            raise ValueError(f"x is on {x.device}, and operands on {', '.join(sorted(elsewhere))}")
    return [each if each is None or each.dtype == dtype else each.to(dtype) for each in operands]


def rows_of(x: Float[Tensor, "... d"]) -> Float[Tensor, "row d"]:
    """The vectors of x as one matrix."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def require_factors(op: str, x: Tensor, axes: int, *factors: tuple[str, Tensor]) -> None:
    """Refuse factors of clients that have not so many axes, or no client; and an x of no vectors.

    Raises:
        ValueError: naming op, operand and its shape.
    """
    if not x.dim():
        raise ValueError(f"{op}: x is one number, and no vectors")
    for name, factor in factors:
        if factor.dim() != axes or not len(factor):
            raise ValueError(
                f"{op}: {name} is {list(factor.shape)}; it has {axes} axes, the first of clients"
            )


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
