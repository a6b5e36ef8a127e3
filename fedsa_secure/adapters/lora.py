"""The LoRA module: one frozen linear layer, C adapters."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from fedsa_kernels import layer_keys, lora_linear
from fedsa_secure.adapters.context import BatchContext
from fedsa_secure.errors import AdapterError
from fedsa_secure.streams import derive, torch_stream


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """The shape of the adapters.

    Args:
        rank: r.
        alpha: numerator of the scaling.
        dropout: probability of dropping an input element of the adapter during training.
        target_modules: names of the linear layers to adapt; None for PEFT's default.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None

    @property
    def scaling(self) -> float:
        """Alpha / r (Hu et al., LoRA, §4.1)."""
        return self.alpha / self.rank


class LoRALinear(nn.Module):
    """``y = x·Wᵀ + bias + scaling · dropout(x)·A_cᵀ·B_cᵀ`` for the rows of client c.

    Shapes: A [client, r, d_in], B [client, d_out, r].

    Args:
        base: the layer that is adapted; frozen.
        settings: rank, scaling and dropout.
        name: path of the layer in its model; names it in errors and in random streams.
        context: the batch, shared by all adapters of a model.
    """

    def __init__(
        self, base: nn.Linear, settings: LoRASettings, name: str, context: BatchContext
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling, self.dropout, self.name = settings.scaling, settings.dropout, name
        self._context = context
        self._layer = derive(0, "dropout layer", name) & 0xFFFFFFFF
        rank, like = settings.rank, base.weight
        self.A = nn.Parameter(like.new_zeros(1, rank, base.in_features))
        self.B = nn.Parameter(like.new_zeros(1, base.out_features, rank))

    def start(self, seed: int) -> Float[Tensor, "r d_in"]:
        """The public start of A: Kaiming-uniform as PEFT draws it, from a stream of its own.

        B starts at zero, so that the adapted model starts as the base model.
        """
        stream = torch_stream(seed, "lora A", self.name)
        bound = self.base.in_features**-0.5
        values = torch.rand(self.A.shape[1:], generator=stream, dtype=torch.float64)
        start: Tensor = ((2 * values - 1) * bound).to(self.A)
        return start

    def forward(self, x: Float[Tensor, "row *rest"]) -> Float[Tensor, "row *rest_out"]:
        """Apply the layer; the first dimension of x is the rows of the batch.

        Raises:
            AdapterError: if x does not come in client segments.
        """
        context = self._context
        if context.clients > 1 and x.shape[0] != context.rows:
            raise AdapterError(
                f"{self.name} is called with {x.shape[0]} rows where the batch has {context.rows}, "
                f"so its input does not belong to single clients; "
                f"set clients_per_pass=1 or leave it out of target_modules"
            )
        return lora_linear(
            x,
            self.base.weight,
            self.base.bias,
            self.A,
            self.B,
            self.scaling,
            dropout=self.dropout,
            keys=self._keys(x),
        )

    def _keys(self, x: Tensor) -> Int32[Tensor, " vector"] | None:
        """One dropout key per vector of x. Inputs that are not [row, token, …] count on."""
        keys = self._context.keys
        if keys is None or self.dropout == 0.0:
            return None
        vectors = x.numel() // x.shape[-1]
        if vectors != keys.numel():  # a pooled row, or (with one client) any other shape
            per_row = keys[:, 0] if x.shape[0] == keys.shape[0] else keys[:1, 0]
            repeats = vectors // per_row.numel()
            place = torch.arange(repeats, dtype=torch.int32, device=keys.device)
            keys = per_row[:, None] + place
        return layer_keys(keys.reshape(-1), self._layer)
