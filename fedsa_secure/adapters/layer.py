"""What all adapter modules share: the frozen layer below, client segments, dropout keys."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsa_kernels import layer_keys, token_keys
from fedsa_secure.adapters.context import BatchContext
from fedsa_secure.errors import AdapterError
from fedsa_secure.streams import derive
from fedsa_secure.types import Role


class AdapterLayer(nn.Module, ABC):
    """A frozen linear layer with one adapter per client.

    Subclasses make their parameters, each with a leading client axis, and say how they act.

    Args:
        base: the layer that is adapted; frozen. The weight of an ``nn.Linear`` or ``Conv1D`` goes
            into the op of the adapter; any other linear layer, such as a quantised one, is called.
        name: path of the layer in its model; names it in errors and in random streams.
        dropout: probability of dropping an input element of the adapter.
        context: the batch, shared by all adapters of a model.
    """

    def __init__(self, base: nn.Module, name: str, dropout: float, context: BatchContext) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.name, self.dropout = name, dropout
        self.d_in, self.d_out = linear_sizes(base) or (0, 0)
        self.like = trainable_like(base)
        """Dtype and device of what is trained; empty."""
        self.context = context
        self._layer = derive(0, "dropout layer", name) & 0xFFFFFFFF

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight: some models (T5) ask their layers for its dtype."""
        base: Any = self.base
        weight: Tensor = base.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's bias."""
        base: Any = self.base
        bias: Tensor | None = base.bias
        return bias

    @abstractmethod
    def starts(self, seed: int) -> dict[str, tuple[Role, Tensor]]:
        """Role and public start of every parameter, by attribute; without client axis."""

    @abstractmethod
    def delta(self, tensors: dict[str, Tensor]) -> Float[Tensor, "d_out d_in"]:
        """ΔW of one client, from its tensors by attribute."""

    @abstractmethod
    def adapt(
        self,
        x: Float[Tensor, "row *rest d_in"],
        weight: Float[Tensor, "d_out d_in"] | None,
        bias: Float[Tensor, " d_out"] | None,
        keys: Int32[Tensor, " vector"] | None,
    ) -> Float[Tensor, "row *rest d_out"]:
        """The adapter's branch, on top of the frozen product if there is a weight."""

    def forward(self, x: Float[Tensor, "row *rest d_in"]) -> Float[Tensor, "row *rest d_out"]:
        """Apply the layer; the first dimension of x is the rows of the batch.

        Raises:
            AdapterError: if x does not come in client segments, or a foreign base layer does not
                pass gradients to its input.
        """
        context = self.context
        if context.clients > 1 and x.shape[0] != context.rows:
            raise AdapterError(
                f"{self.name} is called with {x.shape[0]} rows where the batch has {context.rows}, "
                f"so its input does not belong to single clients; "
                f"set clients_per_pass=1 or leave it out of target_modules"
            )
        weight, bias = plain_weights(self.base)
        if weight is not None:
            return self.adapt(x, weight, bias, self.keys(x))
        frozen: Tensor = self.base(x)
        if x.requires_grad and torch.is_grad_enabled() and not frozen.requires_grad:
            raise AdapterError(
                f"{self.name} is a {type(self.base).__name__}, which passes no gradient to its "
                "input, so that layers below it would train on wrong gradients; use a quantisation "
                "that supports training, or leave it out of target_modules"
            )
        return frozen + self.adapt(x, None, None, self.keys(x)).to(frozen.dtype)

    def keys(self, x: Tensor) -> Int32[Tensor, " vector"] | None:
        """One dropout key per vector of x, by its row and its place in it.

        Sequences are padded on the right, so the place does not depend on the padding. With one
        client x may have any shape; then its vectors count as one row.
        """
        rows = self.context.keys
        if rows is None or self.dropout == 0.0:
            return None
        rows = rows if x.shape[0] == rows.numel() else rows[:1]
        count = x.numel() // x.shape[-1] // rows.numel()
        places = torch.arange(count, dtype=torch.int32, device=x.device)
        keys = token_keys(rows, places.expand(rows.numel(), count))
        return layer_keys(keys, self._layer).view(-1)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Width of input and output of a linear layer; None if the module is none.

    Quantised layers of other libraries are known by the attributes that they share with nn.Linear.
    """
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return int(d_in), int(d_out)
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


def is_plain(weight: object) -> bool:
    """Whether a weight is stored as the numbers that it stands for.

    torchao puts a tensor of its own into an nn.Linear, bitsandbytes one of integers.
    """
    if not isinstance(weight, Tensor) or type(weight) not in (nn.Parameter, Tensor):
        return False
    return weight.is_floating_point()


def plain_weights(base: Any) -> tuple[Tensor | None, Tensor | None]:
    """Weight [d_out, d_in] and bias of a layer that is nothing but their product; else None."""
    if type(base) not in (nn.Linear, Conv1D) or "forward" in vars(base) or is_hooked(base):
        return None, None
    weight, bias = base.weight, base.bias
    if not is_plain(weight):
        return None, None
    return (weight if type(base) is nn.Linear else weight.t()), bias


def is_hooked(module: nn.Module) -> bool:
    """Whether anything is to happen around the calls of a module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def trainable_like(base: nn.Module) -> Tensor:
    """What is trained lives where its layer does, and is in float32, unless it is in float64.

    Packed layers of other libraries may have no tensors; those are on the CPU.
    """
    tensors = [*base.parameters(), *base.buffers()]
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty(0, dtype=torch.float64 if double else torch.float32, device=device)
