"""What every op does with its operands."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Result = TypeVar("Result")

Gradients = tuple[Tensor | None, ...]
"""Of the operands that may be trained; None for those that need none."""


_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_NONE_OF_THEM = "not float16, bfloat16, float32 or float64"


def product_dtype(x: Float[Tensor, "... d"]) -> torch.dtype:
    """The dtype that all operands of an op are brought to.

    Under autocast this is autocast's dtype, since an op of our own is not on its list; else, and in
    float64, which autocast leaves alone, it is that of x, so that adapters kept in float32 fit a
    base model in half precision.

    Raises:
        ValueError: for an x of any other numbers: weights would be rounded to integers, say.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}, and {_NONE_OF_THEM}")
    kind = _autocast_of(x)
    return x.dtype if kind is None or x.dtype == torch.float64 else torch.get_autocast_dtype(kind)


def _autocast_of(x: Tensor) -> str | None:
    """The kind of device on which autocast is in force for x; None without."""
    if x.is_meta:  # a device that autocast does not know
        return None
    # To make a device's name takes as long as all the rest of ``product_dtype``.
    kind = "cpu" if x.is_cpu else x.device.type
    return kind if torch.is_autocast_enabled(kind) else None


def without_autocast(work: Callable[..., Result]) -> Callable[..., Result]:
    """Work that autocast leaves alone: a backward pass has the dtypes of its forward pass, say.

    Args:
        work: its first operand is a tensor, or several.
    """

    @wraps(work)
    def run(first: Any, *others: Any) -> Result:
        kind = _autocast_of(first if isinstance(first, Tensor) else first[0])
        if kind is None:
            return work(first, *others)
        with torch.autocast(kind, enabled=False):
            return work(first, *others)

    return run


def in_one_dtype(x: Tensor, *others: Tensor | None) -> list[Any]:
    """All operands in ``product_dtype(x)``; None stays None.

    Torch would take its time to find that nothing is to be done.

    Raises:
        ValueError: as ``product_dtype``, also for other operands; or if one is not where x is: a
            kernel would take another device's address for one of its own.
    """
    dtype, on_cpu = product_dtype(x), x.is_cpu
    for each in others:
        # Where x is on a CPU there is one such device, and its name need not be made.
        if each is not None and not (each.is_cpu if on_cpu else each.device == x.device):
            raise ValueError(f"x is on {x.device}, and an operand {_of(each)} on {each.device}")
    return [
        each if each is None or each.dtype == dtype else _converted(each, dtype)
        for each in (x, *others)
    ]


def _converted(operand: Tensor, dtype: torch.dtype) -> Tensor:
    if operand.dtype not in _DTYPES:  # such as the integers of a quantised weight
        raise ValueError(f"an operand {_of(operand)} is {operand.dtype}, and {_NONE_OF_THEM}")
    return operand.to(dtype)


def _of(operand: Tensor) -> str:
    return f"of shape {list(operand.shape)}"


def rows_of(x: Float[Tensor, "... d"]) -> Float[Tensor, "row d"]:
    """The vectors of x as one matrix."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def require_factors(op: str, x: Tensor, axes: int, *factors: tuple[str, Tensor]) -> None:
    """Refuse factors without client axis, or without any numbers; and an x of no vectors.

    Raises:
        ValueError: naming op, operand and its shape.
    """
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"{op}: x is {list(x.shape)}, and holds no vectors")
    for name, factor in factors:
        if factor.dim() != axes or 0 in factor.shape:
            raise ValueError(
                f"{op}: {name} is {list(factor.shape)}; it needs {axes} axes, the first of "
                "clients, and none of them empty"
            )


def require_floats(op: str, *operands: tuple[str, Tensor]) -> None:
    """Refuse operands that are no floating point, or not on one device.

    Raises:
        ValueError: naming op and operand.
    """
    first, one = operands[0]
    for name, operand in operands:
        if operand.dtype not in _DTYPES:
            raise ValueError(f"{op}: {name} is {operand.dtype}, and {_NONE_OF_THEM}")
        if operand.device != one.device:
            raise ValueError(f"{op}: {first} is on {one.device}, and {name} on {operand.device}")


def require_segments(x: Float[Tensor, "... d"], clients: int, op: str) -> None:
    """Refuse rows that cannot be split into one equal segment per client.

    Raises:
        ValueError: saying how many there are.
    """
    rows = x.shape[0] if x.dim() > 1 else 1
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
    if scaling == 0.0:  # in half precision a CPU's baddbmm then writes nothing
        return (left @ right) * 0.0
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
