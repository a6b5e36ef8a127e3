"""Task heads with a client axis."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedsa_secure.adapters.context import BatchContext
from fedsa_secure.adapters.layer import trainable_like


class GroupedLinear(nn.Module):
    """A linear layer of its own for every client: ``y_c = x_c·W_cᵀ + bias_c``.

    Shapes: weight [client, d_out, d_in], bias [client, d_out]. Like adapters they are kept in
    float32, and brought to the dtype of x to compute.

    Args:
        base: gives sizes and the public starting values.
        context: the batch, shared by all adapters of a model.
    """

    def __init__(self, base: nn.Linear, context: BatchContext) -> None:
        super().__init__()
        self.context = context
        like = trainable_like(base)
        self.weight = nn.Parameter(base.weight.detach().to(like, copy=True).unsqueeze(0))
        self.bias = (
            nn.Parameter(base.bias.detach().to(like, copy=True).unsqueeze(0))
            if base.bias is not None
            else None
        )

    def forward(self, x: Float[Tensor, "row *rest"]) -> Float[Tensor, "row *rest_out"]:
        """Apply the layer of the client that each row belongs to."""
        clients, d_out, d_in = self.weight.shape
        segments = x.reshape(clients, -1, d_in)
        weights = self.weight.transpose(1, 2).to(x.dtype)
        if self.bias is None:
            y = torch.bmm(segments, weights)
        else:
            y = torch.baddbmm(self.bias.unsqueeze(1).to(x.dtype), segments, weights)
        return y.reshape(*x.shape[:-1], d_out)
