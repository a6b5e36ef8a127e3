"""The LoRA module, which is also rsLoRA's."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from fedsa_kernels import lora_linear
from fedsa_secure.adapters.context import BatchContext
from fedsa_secure.adapters.layer import AdapterLayer
from fedsa_secure.adapters.settings import AdapterSettings
from fedsa_secure.streams import torch_stream
from fedsa_secure.types import Role


class LoRALinear(AdapterLayer):
    """``y = x·Wᵀ + bias + scaling · dropout(x)·A_cᵀ·B_cᵀ`` for the rows of client c.

    With a private adapter (FedDPA) the client's two adapters stand side by side in one of rank 2r:
    ``B·A + B'·A' = [B B']·[A; A']``, so both cost one call.

    Shapes: A [client, r, d_in], B [client, d_out, r]; private_A and private_B likewise.

    Args:
        base: the layer that is adapted; frozen.
        settings: rank, scaling and dropout.
        name: path of the layer in its model.
        context: the batch, shared by all adapters of a model.
    """

    def __init__(
        self, base: nn.Module, settings: AdapterSettings, name: str, context: BatchContext
    ) -> None:
        super().__init__(base, name, settings.dropout, context)
        self._frozen_b = settings.frozen_b
        self.scaling, self.private, rank = settings.scaling, settings.private, settings.rank
        self.total_rank = 2 * rank if settings.private else rank
        self.shared: Callable[[LoRALinear, Tensor], Tensor | None] | None = None
        """Gives the output where this layer is computed together with others, see ``Siblings``."""
        self.A = nn.Parameter(self.like.new_zeros(1, rank, self.d_in))
        self.B = nn.Parameter(self.like.new_zeros(1, self.d_out, rank))
        if self.private:
            self.private_A = nn.Parameter(torch.zeros_like(self.A))
            self.private_B = nn.Parameter(torch.zeros_like(self.B))

    def starts(self, seed: int) -> dict[str, tuple[Role, Tensor]]:
        """A starts Kaiming-uniform as PEFT draws it, from a stream of its own; B at zero.

        So the adapted model starts as the base model. For a B that stays frozen it is the other way
        round: B orthonormal and A at zero, which is the base model, too.
        """
        found = {"A": (Role.A, self._draw(seed, "lora A")), "B": (Role.B, self.B[0])}
        if self._frozen_b:
            found = {"A": (Role.A, self.A[0]), "B": (Role.B, self._orthonormal(seed))}
        if self.private:
            found["private_A"] = (Role.PRIVATE_A, self._draw(seed, "lora private A"))
            found["private_B"] = (Role.PRIVATE_B, self.private_B[0])
        return found

    def delta(self, tensors: dict[str, Tensor]) -> Float[Tensor, "d_out d_in"]:
        """``scaling · B·A``, of both adapters if there are two."""
        product = tensors["B"] @ tensors["A"]
        if self.private:
            product = product + tensors["private_B"] @ tensors["private_A"]
        return self.scaling * product

    def factors(self) -> tuple[Float[Tensor, "client k d_in"], Float[Tensor, "client d_out k"]]:
        """A and B, of both adapters side by side if there are two."""
        A: Tensor = self.A
        B: Tensor = self.B
        if self.private:
            A, B = torch.cat([A, self.private_A], 1), torch.cat([B, self.private_B], 2)
        return A, B

    def forward(self, x: Float[Tensor, "row *rest d_in"]) -> Float[Tensor, "row *rest d_out"]:
        """Apply the layer, together with others that take the same x if there are such."""
        y = None if self.shared is None else self.shared(self, x)
        return super().forward(x) if y is None else y

    def adapt(
        self,
        x: Float[Tensor, "row *rest d_in"],
        weight: Float[Tensor, "d_out d_in"] | None,
        bias: Float[Tensor, " d_out"] | None,
        keys: Int32[Tensor, " vector"] | None,
    ) -> Float[Tensor, "row *rest d_out"]:
        """One call of ``lora_linear``."""
        A, B = self.factors()
        return lora_linear(x, weight, bias, A, B, self.scaling, dropout=self.dropout, keys=keys)

    def _draw(self, seed: int, purpose: str) -> Float[Tensor, "r d_in"]:
        stream = torch_stream(seed, purpose, self.name)
        values = torch.rand(self.A.shape[1:], generator=stream, dtype=torch.float64)
        start: Tensor = ((2 * values - 1) * self.d_in**-0.5).to(self.A)
        return start

    def _orthonormal(self, seed: int) -> Float[Tensor, "d_out r"]:
        """A uniformly random B of orthonormal columns; of orthonormal rows where r > d_out.

        The signs make the diagonal of R positive, without which the factor is not unique (Mezzadri,
        How to Generate Random Matrices from the Classical Compact Groups, 2007, §5). Rounded to
        fp32, so that the clients' linear algebra libraries agree.
        """
        stream = torch_stream(seed, "frozen B", self.name)
        d_out, rank = self.B.shape[1:]
        shape = (max(d_out, rank), min(d_out, rank))
        values = torch.randn(shape, generator=stream, dtype=torch.float64, device="cpu")
        columns, triangle = torch.linalg.qr(values)
        columns = columns * triangle.diagonal().sign()
        start: Tensor = (columns if d_out >= rank else columns.t()).float().to(self.B)
        return start
