"""What an order of work takes at least: operations and bytes of every kernel in it.

A kernel takes the longer of its operations at the device's rate and its bytes at the device's
bandwidth, and a launch. Every operand is read once and every result written once, so caches are
left out, which is too dear where everything fits into them; that the rates hold at every size is
too cheap where a kernel cannot fill the device. Measured times belong beside these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fedsa_kernels.bench.shapes import LAYERS, Shape, as_one_layer
from fedsa_kernels.launch import rank_block

_ROWS, _STRIP = 128, 128
"""Rows and columns of a tile that is taken for granted here; tuning finds the real ones."""


@dataclass(frozen=True)
class Ceilings:
    """What a device can do.

    Args:
        flops: of a large matrix product in half precision, per second.
        bandwidth: bytes per second, read and written, of a large copy.
        launch: seconds from one kernel of a graph to the next.
    """

    flops: float
    bandwidth: float
    launch: float


@dataclass(frozen=True)
class Kernel:
    """The work of one launch.

    Args:
        flops: operations.
        bytes: moved.
    """

    flops: int
    bytes: int


def seconds(kernels: list[Kernel], ceilings: Ceilings) -> float:
    """Time of kernels that run one after the other."""
    return sum(
        max(each.flops / ceilings.flops, each.bytes / ceilings.bandwidth) + ceilings.launch
        for each in kernels
    )


def predicted(shape: Shape, order: str, ceilings: Ceilings) -> float | None:
    """Least seconds of forward and backward; None for an order that is not counted here."""
    counted = ORDERS[shape.op].get(order)
    return None if counted is None else seconds(counted(_Sizes(shape)), ceilings)


class _Sizes:
    """A shape's kernels, by what they do."""

    def __init__(self, shape: Shape, rows: int | None = None) -> None:
        self.shape = shape
        self.m, self.k, self.n = rows or shape.rows, shape.d_in, shape.d_out
        self.r, self.e = rank_block(shape.rank), shape.torch_dtype.itemsize

    def frozen(self, onto: bool = False) -> Kernel:
        """x·Wᵀ, or dy·W; ``onto`` what is there already."""
        m, k, n = self.m, self.k, self.n
        return Kernel(2 * m * k * n, self.e * (m * k + k * n + (2 if onto else 1) * m * n))

    def narrow(self, wide: int, reads: int = 1) -> Kernel:
        """A product of the rows with a factor, or with another factor's rows."""
        values = self.m * (reads * wide + self.r) + wide * self.r
        return Kernel(2 * self.m * wide * self.r, self.e * values)

    def passes(self, wide: int, count: int) -> Kernel:
        """An elementwise kernel that touches the rows so many times."""
        return Kernel(self.m * wide, self.e * self.m * wide * count)

    def both(self) -> list[Kernel]:
        """Dxa and dB in one pass over dy, whose parts are written and added up in float32."""
        one = self.narrow(self.n)
        blocks = -(-self.m // _ROWS)
        parts = 4 * blocks * self.n * self.r
        return [Kernel(2 * one.flops, one.bytes + parts), Kernel(0, parts)]


def _frozen(s: _Sizes) -> list[Kernel]:
    return [s.frozen(), s.frozen()]


def _peft(s: _Sizes) -> list[Kernel]:
    """Per client: autograd's kernels of ``base(x) + lora_B(lora_A(x))·scaling``."""
    s = _of_one(s)
    forward = [s.frozen(), s.narrow(s.k), s.narrow(s.n), s.passes(s.n, 2), s.passes(s.n, 3)]
    factors = [s.passes(s.n, 2), s.narrow(s.n), s.narrow(s.n), s.narrow(s.k), s.narrow(s.k)]
    return (forward + factors + [s.frozen(), s.passes(s.k, 3)]) * s.shape.clients


def _base_first(s: _Sizes) -> list[Kernel]:
    """Per client: the adapter is added in place; the backward pass makes xa and dy·B again."""
    s = _of_one(s)
    forward = [s.frozen(), s.narrow(s.k), s.narrow(s.n, 2)]
    factors = [s.narrow(s.k), s.narrow(s.n), s.narrow(s.n), s.narrow(s.k)]
    return (forward + factors + [s.frozen(), s.narrow(s.n), s.narrow(s.k, 2)]) * s.shape.clients


def _reference(s: _Sizes) -> list[Kernel]:
    forward = [s.narrow(s.k), s.narrow(s.n), s.frozen(onto=True)]
    factors = [s.narrow(s.n), s.narrow(s.n), s.narrow(s.k)]
    return forward + factors + [s.narrow(s.k), s.frozen(onto=True)]


def _cublas(s: _Sizes) -> list[Kernel]:
    forward = [s.narrow(s.k), s.narrow(s.n), s.frozen(onto=True)]
    return forward + s.both() + [s.narrow(s.k), s.narrow(s.k), s.frozen(onto=True)]


def _fused(s: _Sizes) -> list[Kernel]:
    """Every strip of columns makes q again, which is the price of one pass over x."""
    frozen = s.frozen()
    again = 2 * s.m * s.k * s.r * -(-s.n // _STRIP)
    small = s.e * s.r * (s.m + s.k + s.n)
    forward = Kernel(frozen.flops + again + 2 * s.m * s.n * s.r, frozen.bytes + small)
    dx = Kernel(frozen.flops + 2 * s.m * s.k * s.r, frozen.bytes + small)
    return [forward, *s.both(), s.narrow(s.k), dx]


def _vera_peft(s: _Sizes) -> list[Kernel]:
    """Autograd's kernels of ``base(x) + b·B(d·A(x))``."""
    s = _of_one(s)
    branch = [s.narrow(s.k), s.passes(s.r, 2), s.narrow(s.n), s.passes(s.n, 2), s.passes(s.n, 3)]
    outer = [s.passes(s.n, 2), s.passes(s.n, 3), s.passes(s.n, 1), s.narrow(s.n)]
    inner = [s.passes(s.r, 2), s.passes(s.r, 3), s.passes(s.r, 1), s.narrow(s.k)]
    kernels = [s.frozen(), *branch, *outer, *inner, s.frozen(), s.passes(s.k, 3)]
    return kernels * s.shape.clients


def _vera_cublas(s: _Sizes) -> list[Kernel]:
    forward = [s.narrow(s.k), s.narrow(s.n), s.frozen(onto=True)]
    return [*forward, s.narrow(s.n), s.narrow(s.n), s.narrow(s.k), s.frozen(onto=True)]


def _vera_fused(s: _Sizes) -> list[Kernel]:
    frozen, small = s.frozen(), s.e * s.r * (s.m + s.k + s.n)
    onto = Kernel(frozen.flops + 2 * s.m * s.n * s.r, frozen.bytes + small)
    return [s.narrow(s.k), onto, s.narrow(s.n), s.narrow(s.n), onto]


def _apart(s: _Sizes, order: Callable[[_Sizes], list[Kernel]]) -> list[Kernel]:
    """Layers of one x by themselves; autograd adds their gradients of x up."""
    one = _Sizes(as_one_layer(s.shape))
    return order(one) * LAYERS + [s.passes(s.k, 3)] * (LAYERS - 1)


def _together(s: _Sizes) -> list[Kernel]:
    one = _Sizes(as_one_layer(s.shape))
    forward = [s.narrow(s.k), *[one.narrow(one.n), one.frozen(onto=True)] * LAYERS]
    factors = [*[one.narrow(one.n)] * (2 * LAYERS), s.narrow(s.k)]
    return [*forward, *factors, s.narrow(s.k), *[one.frozen(onto=True)] * LAYERS]


def _together_cublas(s: _Sizes) -> list[Kernel]:
    one = _Sizes(as_one_layer(s.shape))
    forward = [s.narrow(s.k), *[one.narrow(one.n), one.frozen(onto=True)] * LAYERS]
    factors = [*one.both() * LAYERS, s.narrow(s.k)]
    return [*forward, *factors, s.narrow(s.k), *[one.frozen(onto=True)] * LAYERS]


def _together_fused(s: _Sizes) -> list[Kernel]:
    one = _Sizes(as_one_layer(s.shape))
    frozen, small = one.frozen(), s.e * s.r * (s.m + s.k + one.n)
    both = Kernel(frozen.flops + 2 * s.m * one.n * s.r, frozen.bytes + small)
    factors = [*one.both() * LAYERS, s.narrow(s.k)]
    dx = [both, *[one.frozen(onto=True)] * (LAYERS - 1)]
    return [s.narrow(s.k), *[both] * LAYERS, *factors, *dx]


def _of_one(s: _Sizes) -> _Sizes:
    """The rows of one client: these orders know no others."""
    return _Sizes(s.shape, s.m // s.shape.clients)


ORDERS: dict[str, dict[str, Callable[[_Sizes], list[Kernel]]]] = {
    "lora_linear": {
        "frozen": _frozen,
        "peft": _peft,
        "base first": _base_first,
        "reference": _reference,
        "cublas": _cublas,
        "fused": _fused,
    },
    "lora_linears": {
        "frozen": partial(_apart, order=_frozen),
        "peft": partial(_apart, order=_peft),
        "apart": partial(_apart, order=_reference),
        "reference": _together,
        "cublas": _together_cublas,
        "fused": _together_fused,
    },
    "vera_linear": {
        "frozen": _frozen,
        "peft": _vera_peft,
        "cublas": _vera_cublas,
        "fused": _vera_fused,
    },
}
