"""One training step of an adapted layer, in every order of work that is compared.

Each order is made ready for one set of operands and is then called without arguments; it gives the
output and the gradients of x and of the adapter's two parameters, one list per client where it
knows one client only.

    frozen            the layer without adapter: y and the gradient of x, of all clients at once
    peft              PEFT's module, client after client
    peft compiled     the same under torch.compile
    base first        plain torch, the adapter's product added in place to the frozen one, as
                      Unsloth does it; client after client
    reference         plain torch, LoRA first, all clients at once
    cublas, fused     our kernels, all clients at once
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsa_kernels.bench.inputs import SCALING, Inputs
from fedsa_kernels.launch import interpreted
from fedsa_kernels.lora_linear import lora_linear
from fedsa_kernels.operands import scaled
from fedsa_kernels.tables import BACKENDS
from fedsa_kernels.vera_linear import vera_linear

Results = list[list[Tensor]]
Step = Callable[[], Results]
OURS = BACKENDS
"""The backends of the ops."""
PLAIN = ("peft", "peft compiled", "base first", "reference")
"""What needs torch alone."""


def orders(op: str, device: torch.device) -> dict[str, Callable[[Inputs], Step]]:
    """Every order that can run here, by name."""
    found: dict[str, Callable[[Inputs], Step]] = {"frozen": _frozen}
    if importlib.util.find_spec("peft") is not None:
        found["peft"] = partial(_one_by_one, _peft)
        if device.type == "cuda":
            found["peft compiled"] = partial(_one_by_one, _peft_compiled)
    if op == "lora_linear":
        found["base first"] = partial(_one_by_one, _base_first)
    kernels = device.type == "cuda" or interpreted()
    return found | {name: partial(_ours, name) for name in OURS if kernels or name == "reference"}


def joined(results: Results, inputs: Inputs) -> list[Tensor]:
    """Results of clients, one after the other, in the shapes of one call for all."""
    if len(results) == 1:
        whole = results[0]
    else:
        whole = [torch.cat(parts) for parts in zip(*results, strict=True)]
    shapes = [inputs.dy.shape, *(each.shape for each in inputs.trained)]
    return [each.reshape(shape) for each, shape in zip(whole, shapes, strict=False)]


def _step(run: Callable[[], Tensor], dy: Tensor, trained: Sequence[Tensor]) -> list[Tensor]:
    y = run()
    return [y.detach(), *torch.autograd.grad(y, trained, dy)]


def _ours(backend: str, inputs: Inputs) -> Step:
    if inputs.d is None or inputs.b is None:
        lora = (inputs.x, inputs.weight, inputs.bias, inputs.A, inputs.B, SCALING)
        run = partial(lora_linear, *lora, backend=backend)
    else:
        vera = (inputs.x, inputs.weight, inputs.bias, inputs.A, inputs.B, inputs.d, inputs.b)
        run = partial(vera_linear, *vera, backend=backend)
    return lambda: [_step(run, inputs.dy, inputs.trained)]


def _frozen(inputs: Inputs) -> Step:
    run = partial(functional.linear, inputs.x, inputs.weight, inputs.bias)
    return lambda: [_step(run, inputs.dy, [inputs.x])]


def _one_by_one(order: Callable[[Inputs], Callable[[], list[Tensor]]], inputs: Inputs) -> Step:
    steps = [order(each) for each in inputs.clients()]
    return lambda: [step() for step in steps]


def _base_first(inputs: Inputs) -> Callable[[], list[Tensor]]:
    operands = (inputs.x, inputs.weight, inputs.bias, inputs.A, inputs.B)
    run = partial(_BaseFirst.apply, *operands)
    return lambda: _step(run, inputs.dy, inputs.trained)


class _BaseFirst(torch.autograd.Function):
    """The frozen product, then the adapter's in place; nothing but the operands is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        return functional.linear(x, weight, bias).addmm_(x @ A[0].t(), B[0].t(), alpha=SCALING)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, A, B = ctx.saved_tensors
        dB = scaled(dy.t(), x @ A[0].t(), SCALING)
        dA = scaled((dy @ B[0]).t(), x, SCALING)
        dx = (dy @ weight).addmm_(dy @ B[0], A[0], alpha=SCALING)
        return dx, None, None, dA[None], dB[None]


def _peft(inputs: Inputs) -> Callable[[], list[Tensor]]:
    module, trained = peft_module(inputs)
    run = partial(module, inputs.x)
    return lambda: _step(run, inputs.dy, [inputs.x, *trained])


def _peft_compiled(inputs: Inputs) -> Callable[[], list[Tensor]]:
    module, trained = peft_module(inputs)
    run = partial(torch.compile(module, dynamic=False), inputs.x)
    return lambda: _step(run, inputs.dy, [inputs.x, *trained])


def peft_module(inputs: Inputs) -> tuple[nn.Module, list[Tensor]]:
    """PEFT's module of one client, all in the dtype of x, and its two trained parameters."""
    from peft import LoraConfig, VeraConfig, get_peft_model

    shape = inputs.shape
    linear = nn.Linear(shape.d_in, shape.d_out, device="meta")
    linear.weight, linear.bias = nn.Parameter(inputs.weight), nn.Parameter(inputs.bias)
    base = nn.Sequential()
    base.add_module("linear", linear)
    common: dict[str, Any] = {"r": shape.rank, "target_modules": ["linear"]}
    if inputs.d is None or inputs.b is None:
        alpha = round(SCALING * shape.rank)
        model = get_peft_model(base, LoraConfig(**common, lora_alpha=alpha), "measured")
        layer: Any = model.base_model.model.linear
        return layer, [
            _replace(layer.lora_A.measured, inputs.A[0]),
            _replace(layer.lora_B.measured, inputs.B[0]),
        ]
    config = VeraConfig(**common, save_projection=True)
    model = get_peft_model(base, config, "measured")
    layer = model.base_model.model.linear
    layer.vera_A["measured"], layer.vera_B["measured"] = inputs.A, inputs.B
    layer.vera_lambda_d["measured"] = nn.Parameter(inputs.d[0].detach().clone())
    layer.vera_lambda_b["measured"] = nn.Parameter(inputs.b[0].detach().clone())
    return layer, [layer.vera_lambda_d["measured"], layer.vera_lambda_b["measured"]]


def _replace(linear: nn.Linear, weight: Tensor) -> Tensor:
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear.weight
