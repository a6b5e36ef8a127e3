"""Three layers of one x, such as queries, keys and values.

    frozen                      without adapters, of all clients at once
    peft                        PEFT's modules, client after client
    apart                       our op for each layer
    reference, cublas, fused    our op for all three

A shape of the op ``lora_linears`` stands for three square layers: its d_out and its rank are those
of all three together, as the dispatcher counts them.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsa_kernels.bench.inputs import SCALING, Inputs, draw
from fedsa_kernels.bench.orders import Results, Step, peft_module
from fedsa_kernels.bench.shapes import LAYERS, Shape, as_one_layer
from fedsa_kernels.launch import interpreted
from fedsa_kernels.lora_linear import lora_linear
from fedsa_kernels.lora_linears import lora_linears
from fedsa_kernels.tables import BACKENDS


@dataclass(frozen=True)
class Block:
    """Operands of three layers that share x.

    Args:
        shape: of all together.
        layers: of each.
    """

    shape: Shape
    layers: tuple[Inputs, ...]

    @property
    def factors(self) -> list[Tensor]:
        """What is trained besides x: every A, then every B."""
        return [*(each.A for each in self.layers), *(each.B for each in self.layers)]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.layers[0].device

    def double(self) -> "Block":
        """The same numbers in float64, as leaves of their own."""
        return self.of(self.shape, [each.double() for each in self.layers])

    @classmethod
    def of(cls, shape: Shape, layers: Sequence[Inputs]) -> "Block":
        """Layers with the x of the first."""
        return cls(shape, tuple(replace(each, x=layers[0].x) for each in layers))


def draw_block(shape: Shape, device: torch.device, seed: int) -> Block:
    """Fresh numbers, of about one in size everywhere."""
    one = as_one_layer(shape)
    return Block.of(shape, [draw(one, device, seed * LAYERS + k) for k in range(LAYERS)])


def block_orders(device: torch.device) -> dict[str, Callable[[Block], Step]]:
    """Every order that can run here."""
    found: dict[str, Callable[[Block], Step]] = {"frozen": _frozen, "apart": _apart}
    if importlib.util.find_spec("peft") is not None:
        found["peft"] = _peft
    kernels = device.type == "cuda" or interpreted()
    return found | {n: partial(_together, n) for n in BACKENDS if kernels or n == "reference"}


def joined_block(results: Results, block: Block) -> list[Tensor]:
    """Results of clients, one after the other, in the shapes of one call for all."""
    whole = [torch.cat(parts) for parts in zip(*results, strict=True)]
    like = [*(each.dy for each in block.layers), block.layers[0].x, *block.factors]
    return [each.reshape(other.shape) for each, other in zip(whole, like, strict=True)]


def _step(
    run: Callable[[], Sequence[Tensor]], layers: Sequence[Inputs], factors: Sequence[Tensor]
) -> Results:
    """All outputs, the gradient of x, and those of the factors."""
    ys = run()
    gradients = torch.autograd.grad(ys, [layers[0].x, *factors], [each.dy for each in layers])
    return [[*(y.detach() for y in ys), *gradients]]


def _frozen(block: Block) -> Step:
    def run() -> list[Tensor]:
        return [functional.linear(i.x, i.weight, i.bias) for i in block.layers]

    return partial(_step, run, block.layers, ())


def _apart(block: Block) -> Step:
    def run() -> list[Tensor]:
        return [lora_linear(i.x, i.weight, i.bias, i.A, i.B, SCALING) for i in block.layers]

    return partial(_step, run, block.layers, block.factors)


def _together(backend: str, block: Block) -> Step:
    weights, biases, As, Bs = zip(
        *((each.weight, each.bias, each.A, each.B) for each in block.layers), strict=True
    )
    operands = (block.layers[0].x, weights, biases, As, Bs, SCALING)
    return partial(
        _step, partial(lora_linears, *operands, backend=backend), block.layers, block.factors
    )


def _peft(block: Block) -> Step:
    """Client after client."""
    by_client = zip(*(each.clients() for each in block.layers), strict=True)
    steps = []
    for layers in (Block.of(block.shape, each).layers for each in by_client):
        modules = [peft_module(each) for each in layers]
        factors = [trained[k] for k in (0, 1) for _, trained in modules]
        run = partial(_call_each, [module for module, _ in modules], layers[0].x)
        steps.append(partial(_step, run, layers, factors))
    return lambda: [result for step in steps for result in step()]


def _call_each(modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    return [module(x) for module in modules]
