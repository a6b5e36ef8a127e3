"""Random operands of an adapted layer's training step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsa_kernels.bench.shapes import Shape

SCALING = 2.0


@dataclass(frozen=True)
class Inputs:
    """One set of operands, client-major.

    Args:
        shape: what they are of.
        x: [C·m, d_in]
        dy: gradient of the output. [C·m, d_out]
        weight: frozen. [d_out, d_in]
        bias: frozen. [d_out]
        A: of LoRA [C, r, d_in]; of VeRA [r, d_in], frozen.
        B: of LoRA [C, d_out, r]; of VeRA [d_out, r], frozen.
        d: VeRA's inner vectors. [C, r]
        b: VeRA's outer vectors. [C, d_out]
    """

    shape: Shape
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    d: Tensor | None = None
    b: Tensor | None = None

    @property
    def trained(self) -> list[Tensor]:
        """What gets a gradient: x, and the adapter's two parameters."""
        if self.d is None or self.b is None:
            return [self.x, self.A, self.B]
        return [self.x, self.d, self.b]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.x.device

    def double(self) -> "Inputs":
        """The same numbers in float64, as leaves of their own."""
        tensors = {
            name: value.detach().double().requires_grad_(value.requires_grad)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return Inputs(self.shape, **tensors)

    def clients(self) -> Iterator["Inputs"]:
        """Those of each client alone, as leaves of their own."""
        count = self.shape.clients
        rows = self.shape.rows // count
        one = Shape(**{**vars(self.shape), "rows": rows, "clients": 1})
        for client in range(count):
            segment, own = slice(client * rows, (client + 1) * rows), slice(client, client + 1)
            # The frozen factors of VeRA are everybody's.
            cut = {"A": own, "B": own} if self.d is None else {"d": own, "b": own}
            cut |= {"x": segment, "dy": segment}
            yield Inputs(one, **{name: self._leaf(name, cut) for name in _tensors(self)})

    def _leaf(self, name: str, cut: dict[str, slice]) -> Tensor:
        value: Tensor = getattr(self, name)
        if name not in cut or self.shape.clients == 1:
            return value
        return value.detach()[cut[name]].clone().requires_grad_(value.requires_grad)


def _tensors(inputs: Inputs) -> list[str]:
    return [name for name, value in vars(inputs).items() if isinstance(value, Tensor)]


def draw(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Fresh numbers, of about one in size everywhere; none on the meta device."""
    stream = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, scale: float = 1.0, trained: bool = False) -> Tensor:
        values = torch.randn(sizes, generator=stream, device=device).mul_(scale)
        return values.to(shape.torch_dtype).requires_grad_(trained)

    k, n, r, clients = shape.d_in, shape.d_out, shape.rank, shape.clients
    lora = shape.op == "lora_linear"
    own = (clients,) if lora else ()
    return Inputs(
        shape,
        x=normal(shape.rows, k, trained=True),
        dy=normal(shape.rows, n),
        weight=normal(n, k, scale=k**-0.5),
        bias=normal(n),
        A=normal(*own, r, k, scale=k**-0.5, trained=lora),
        B=normal(*own, n, r, scale=r**-0.5, trained=lora),
        d=None if lora else normal(clients, r, trained=True),
        b=None if lora else normal(clients, n, trained=True),
    )
