"""The VeRA module: two trained vectors per layer around frozen random factors."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from fedsa_kernels import vera_linear
from fedsa_secure.adapters.context import BatchContext
from fedsa_secure.adapters.layer import AdapterLayer
from fedsa_secure.adapters.settings import AdapterSettings
from fedsa_secure.streams import derive, torch_stream
from fedsa_secure.types import Role


@dataclass(frozen=True)
class Projections:
    """VeRA's frozen factors: one pair for a whole model, of which every layer takes a slice.

    Args:
        A: as wide as the widest input. [r, largest d_in]
        B: as high as the widest output. [largest d_out, r]
    """

    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "d_out r"]

    @classmethod
    def draw(cls, key: int, rank: int, sizes: Iterable[tuple[int, int]]) -> "Projections":
        """Both factors as PEFT draws them, so that its files fit: Kaiming-uniform, on the CPU.

        Args:
            key: ``projection_prng_key``.
            rank: r.
            sizes: (d_in, d_out) of the layers.

        Source: Kopiczko et al., VeRA (ICLR 2024), §3.2.
        """
        widths = list(sizes)
        d_in, d_out = max(w for w, _ in widths), max(w for _, w in widths)
        stream = torch.Generator(device="cpu").manual_seed(key)
        return cls(_kaiming(rank, d_in, stream), _kaiming(d_out, rank, stream))


class VeRALinear(AdapterLayer):
    """``y = x·Wᵀ + bias + b_c ∘ ((d_c ∘ (dropout(x)·Aᵀ))·Bᵀ)`` for the rows of client c.

    d plays the part of LoRA's A, and b that of its B.

    Shapes: d [client, r], b [client, d_out]; private_d and private_b likewise. A [r, d_in] and
    B [d_out, r] are slices of the model's projections; a private adapter has a pair of its own,
    without which it could not be told from the other one.

    Args:
        base: the layer that is adapted; frozen.
        settings: rank, dropout and the start of d.
        name: path of the layer in its model.
        context: the batch, shared by all adapters of a model.
        projections: one pair, and a second one for private adapters.
    """

    A: Tensor
    B: Tensor
    private_A: Tensor
    private_B: Tensor

    def __init__(
        self,
        base: nn.Module,
        settings: AdapterSettings,
        name: str,
        context: BatchContext,
        projections: tuple[Projections, ...],
    ) -> None:
        super().__init__(base, name, settings.dropout, context)
        self._frozen_b = settings.frozen_b
        self.private, self._d_initial = settings.private, settings.d_initial
        # Not persistent: slices of one pair would be saved once per layer.
        for kind, pair in zip(("", "private_")[: 1 + self.private], projections, strict=True):
            inner, outer = pair.A[:, : self.d_in], pair.B[: self.d_out]
            self.register_buffer(f"{kind}A", inner.to(self.like), persistent=False)
            self.register_buffer(f"{kind}B", outer.to(self.like), persistent=False)
        self.d = nn.Parameter(self.like.new_zeros(1, settings.rank))
        self.b = nn.Parameter(self.like.new_zeros(1, self.d_out))
        if self.private:
            self.private_d = nn.Parameter(torch.zeros_like(self.d))
            self.private_b = nn.Parameter(torch.zeros_like(self.b))

    def starts(self, seed: int) -> dict[str, tuple[Role, Tensor]]:
        """Every d starts at a constant and every b at zero, as in the paper; no draw is needed.

        For a b that stays frozen it is the other way round: b random and d at zero.
        """
        inner = torch.full_like(self.d[0], self._d_initial)
        found = {"d": (Role.A, inner), "b": (Role.B, self.b[0])}
        if self._frozen_b:
            found = {"d": (Role.A, self.d[0]), "b": (Role.B, self._random_signs(seed))}
        if self.private:
            found["private_d"] = (Role.PRIVATE_A, inner)
            found["private_b"] = (Role.PRIVATE_B, self.private_b[0])
        return found

    def delta(self, tensors: dict[str, Tensor]) -> Float[Tensor, "d_out d_in"]:
        """``diag(b)·B·diag(d)·A``, of both adapters if there are two."""
        inner, outer = self.as_lora(tensors)
        return outer @ inner

    def as_lora(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The same ΔW as one product B·A of LoRA's form. A [k·r, d_in], B [d_out, k·r]"""
        pairs = self._pairs()
        outer = [tensors[f"{kind}b"][:, None] * B.to(tensors["b"]) for kind, _, B in pairs]
        inner = [tensors[f"{kind}d"][:, None] * A.to(tensors["d"]) for kind, A, _ in pairs]
        return torch.cat(inner, 0), torch.cat(outer, 1)

    def adapt(
        self,
        x: Float[Tensor, "row *rest d_in"],
        weight: Float[Tensor, "d_out d_in"] | None,
        bias: Float[Tensor, " d_out"] | None,
        keys: Int32[Tensor, " vector"] | None,
    ) -> Float[Tensor, "row *rest d_out"]:
        """One call of ``vera_linear`` per adapter."""
        y = vera_linear(
            x, weight, bias, self.A, self.B, self.d, self.b, dropout=self.dropout, keys=keys
        )
        if not self.private:
            return y
        A, B, d, b = self.private_A, self.private_B, self.private_d, self.private_b
        return y + vera_linear(x, None, None, A, B, d, b, dropout=self.dropout, keys=keys)

    def _random_signs(self, seed: int) -> Float[Tensor, " d_out"]:
        """A b of equal sizes and random signs.

        The entries of B have variance 2/r (Kaiming). With the size √(r / (2·d_out)) the columns of
        diag(b)·B have a mean squared norm of 1, as those of a frozen LoRA's B.
        """
        stream = torch_stream(seed, "frozen B", self.name)
        bits = torch.randint(2, self.b.shape[1:], generator=stream, device="cpu")
        size = (self.d.shape[1] / (2 * self.d_out)) ** 0.5
        start: Tensor = (size * (2.0 * bits - 1.0)).to(self.b)
        return start

    def _pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """Prefix of the attributes and frozen factors of each adapter."""
        found = [("", self.A, self.B)]
        if self.private:
            found.append(("private_", self.private_A, self.private_B))
        return found


def private_key(key: int) -> int:
    """Key of the second pair, which private adapters use."""
    return derive(key, "private projections") % 2**31


def _kaiming(rows: int, fan_in: int, stream: torch.Generator) -> Tensor:
    # PyTorch's kaiming_uniform_ with its default gain √2: the bound is √2·√(3/fan_in).
    bound = 3**0.5 * (2**0.5 / fan_in**0.5)
    # Neither torch's default dtype nor its default device may move a draw that all clients share.
    values = torch.empty(rows, fan_in, dtype=torch.float32, device="cpu")
    return values.uniform_(-bound, bound, generator=stream)
