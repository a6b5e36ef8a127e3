"""``encode`` and ``decode``: the shared tensors as one flat vector."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedsa_secure.types import NamedTensors


@dataclass(frozen=True)
class Layout:
    """Which tensors stand where in the vector. Equal for all clients of a run.

    Args:
        shapes: by name, in the order on the wire.
    """

    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, tensors: NamedTensors) -> "Layout":
        """The layout of exactly these tensors."""
        return cls({name: tensor.shape for name, tensor in tensors.items()})

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(shape.numel() for shape in self.shapes.values())

    def encode(self, tensors: NamedTensors) -> Float[Tensor, " value"]:
        """All tensors in one vector; tensors that the layout does not name cannot enter it."""
        if not self.shapes:
            return torch.zeros(0)
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])

    def decode(self, vector: Float[Tensor, " value"]) -> NamedTensors:
        """The tensors that a vector holds."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = torch.split(vector, sizes) if sizes else ()
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
