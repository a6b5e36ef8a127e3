"""What every op does with its operands."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def product_dtype(x: Float[Tensor, "... d"]) -> torch.dtype:
    """The dtype that all operands of an op are brought to.

    Under autocast this is autocast's dtype, since an op of our own is not on its list; else it is
    that of x, so that adapters kept in float32 fit a base model in half precision.
    """
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def in_dtype(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """The operand in a dtype; torch would take its time to find that nothing is to be done."""
    return operand if operand.dtype == dtype else operand.to(dtype)


def rows_of(x: Float[Tensor, "... d"]) -> Float[Tensor, "row d"]:
    """The vectors of x as one matrix."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def require_segments(x: Float[Tensor, "... d"], clients: int, op: str) -> None:
    """Refuse vectors that cannot be split into one equal segment per client.

    Raises:
        ValueError: saying how many there are.
    """
    rows = math.prod(x.shape[:-1])
    if rows % clients:
        raise ValueError(f"{op}: {rows} rows do not split into {clients} client segments")


def by_client(x: Float[Tensor, "vector d"], clients: int) -> Float[Tensor, "*client row d"]:
    """Rows by client, as matrices that ``@`` multiplies; a single client's is one plain matrix.

    A batch of one takes MKL up to twice as long as the plain product.
    """
    return x if clients == 1 else x.view(clients, len(x) // clients, x.shape[-1])


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
