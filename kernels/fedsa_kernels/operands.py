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


def client_products(
    left: Float[Tensor, "client a b"], right: Float[Tensor, "client b c"]
) -> Float[Tensor, "client a c"]:
    """left·right, client by client.

    A single client's is taken as one plain product: a batch of one takes up to twice as long.
    """
    if len(left) == 1:
        return torch.mm(left[0], right[0]).unsqueeze(0)
    return torch.bmm(left, right)


def onto_bias(
    bias: Float[Tensor, " c"] | None,
    left: Float[Tensor, "client a b"],
    right: Float[Tensor, "client b c"],
    scaling: float,
) -> Float[Tensor, "client a c"]:
    """``bias + scaling·left·right``, client by client."""
    if bias is None:
        return client_products(left, right).mul_(scaling)
    if len(left) == 1:
        return torch.addmm(bias, left[0], right[0], alpha=scaling).unsqueeze(0)
    return torch.baddbmm(bias, left, right, alpha=scaling)
