"""What every op does with its operands."""

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


def flat_segments(x: Float[Tensor, "... d"], clients: int, op: str) -> Float[Tensor, "vector d"]:
    """The vectors of x in one dimension.

    Raises:
        ValueError: if they cannot be split into one equal segment per client.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] % clients:
        raise ValueError(f"{op}: {flat.shape[0]} rows do not split into {clients} client segments")
    return flat


def by_client(x: Float[Tensor, "vector d"], clients: int) -> Float[Tensor, "*client row d"]:
    """Rows by client, as matrices that ``@`` multiplies; a single client's is one plain matrix.

    A batch of one takes MKL up to twice as long as the plain product.
    """
    return x if clients == 1 else x.view(clients, len(x) // clients, x.shape[-1])


def per_client(factor: Float[Tensor, "client a b"]) -> Float[Tensor, "*client a b"]:
    """A factor as a partner of ``by_client``."""
    return factor.squeeze(0)


def onto_bias(
    bias: Float[Tensor, " c"] | None,
    left: Float[Tensor, "*client a b"],
    right: Float[Tensor, "*client b c"],
    scaling: float,
) -> Float[Tensor, "*client a c"]:
    """``bias + scaling·left·right``."""
    if bias is None:
        return (left @ right).mul_(scaling)
    add = torch.addmm if left.dim() == 2 else torch.baddbmm
    return add(bias, left, right, alpha=scaling)
