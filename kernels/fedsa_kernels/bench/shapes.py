"""The sizes that are measured."""

from dataclasses import dataclass, replace

import torch

from fedsa_kernels.tables import Problem


@dataclass(frozen=True)
class Shape:
    """One adapted layer and its batch.

    Args:
        d_in: width of x.
        d_out: width of y.
        rows: of x, of all clients.
        rank: of the adapters.
        clients: with equal segments of the rows.
        op: ``lora_linear``, ``vera_linear``, or ``lora_linears`` for three layers of one x, whose
            d_out and rank are those of all three together; or another one that is checked only.
        dtype: of all operands.
    """

    d_in: int
    d_out: int
    rows: int
    rank: int = 16
    clients: int = 1
    op: str = "lora_linear"
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def problem(self) -> Problem:
        """What the dispatcher is asked."""
        sizes = (self.rows, self.d_in, self.d_out, self.rank, self.clients)
        return Problem(self.op, self.torch_dtype, *sizes)

    @property
    def bytes(self) -> int:
        """Of x, y, their gradients, and the frozen weight."""
        wide = 2 * self.rows * (self.d_in + self.d_out)
        return self.torch_dtype.itemsize * (wide + self.d_in * self.d_out)

    def __str__(self) -> str:
        clients = "" if self.clients == 1 else f" {self.clients} clients"
        op = self.op.removesuffix("_linear")
        return f"{op} {self.d_in}→{self.d_out} M={self.rows} r={self.rank}{clients} {self.dtype}"


def square(d: int, rows: int, rank: int = 16, **others: object) -> Shape:
    """A layer as wide as it is high."""
    return Shape(d, d, rows, rank, **others)  # type: ignore[arg-type]


LAYERS = 3
"""That a shape of ``lora_linears`` stands for."""


def as_one_layer(shape: Shape) -> Shape:
    """One of the layers that a shape of ``lora_linears`` stands for."""
    return replace(shape, d_out=shape.d_out // LAYERS, rank=shape.rank // LAYERS, op="lora_linear")


def ragged(shape: Shape) -> Shape:
    """A neighbour whose edges no tile meets, on the same machine code.

    Widths stay multiples of 16, which a compiler uses; it does not know the rows.
    """
    layers = LAYERS if shape.op == "lora_linears" else 1
    return replace(
        shape,
        d_in=shape.d_in + 16,
        d_out=shape.d_out + 16 * layers,
        rows=shape.rows + 13 * shape.clients,
    )


GPU = (
    *(square(d, rows) for d in (768, 1024) for rows in (512, 2048, 8192, 16384)),
    *(square(4096, rows) for rows in (512, 2048, 8192)),
    square(14336, 2048),
    Shape(4096, 14336, 4096),
    Shape(14336, 4096, 4096),
    square(768, 8192, 64),
    square(4096, 8192, 64),
    square(768, 4096, 8, clients=8),
    square(1024, 4096, clients=8),
    square(4096, 4096, clients=8),
    square(768, 8192, 256, op="vera_linear"),
    square(4096, 4096, 256, op="vera_linear"),
    square(768, 4096, 256, clients=8, op="vera_linear"),
    *(Shape(d, 3 * d, 8192, 3 * 16, op="lora_linears") for d in (768, 1024, 4096)),
    Shape(768, 3 * 768, 4096, 3 * 8, clients=8, op="lora_linears"),
    *(Shape(d, 3 * d, 4096, 3 * 16, clients=8, op="lora_linears") for d in (1024, 4096)),
)
"""RoBERTa's two sizes, Llama 8B's projections, one client and eight.

Single layers come before layers of one x, which are compared with them.
"""

CPU = (
    *(square(d, 128 * batch, 8, dtype="float32") for d in (384, 768) for batch in (1, 8, 32)),
    *(Shape(d, 3 * d, 1024, 24, op="lora_linears", dtype="float32") for d in (384, 768)),
)
"""MiniLM's and BERT's width; 1, 8 and 32 records of 128 tokens; single layers, and three."""

DRY = (
    Shape(48, 32, 40, 4, dtype="float16"),
    Shape(48, 32, 36, 4, clients=3, dtype="float16"),
    Shape(48, 32, 40, 20, op="vera_linear", dtype="float16"),
    Shape(48, 3 * 32, 40, 3 * 4, op="lora_linears", dtype="float16"),
)
"""So small that Triton's interpreter works them off in seconds."""
