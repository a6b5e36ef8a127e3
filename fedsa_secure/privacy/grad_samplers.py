"""Our layers, as Opacus' ``GradSampleModule`` has to know them: per-record gradients of each.

Importing this module registers them. The gradients follow from what Opacus' hooks catch of a layer,
its input and the gradient of its output, so the one backward pass is all that is needed.
"""

from typing import Any

import torch
from opacus.grad_sample.utils import register_grad_sampler
from torch import Tensor, nn

from fedsa_kernels import sample_grad
from fedsa_kernels.dropout import dropout_factors
from fedsa_secure.adapters import GroupedLinear, LoRALinear, VeRALinear
from fedsa_secure.adapters.layer import AdapterLayer
from fedsa_secure.errors import PrivacyError

SampleGradients = dict[nn.Parameter, Tensor]


@register_grad_sampler(LoRALinear)  # type: ignore[untyped-decorator]
def lora_samples(
    layer: LoRALinear, activations: list[Tensor], backprops: Tensor
) -> SampleGradients:
    """Per-record gradients of A and B, and of private_A and private_B if there are any.

    Args:
        layer: the module.
        activations: its input. [row, *rest, d_in]
        backprops: gradient of its output. [row, *rest, d_out]
    """
    x, dy = _rows(layer, activations[0]), _rows(layer, backprops)
    dropped = _dropped(layer, x)
    found = SampleGradients()
    pairs = [(layer.A, layer.B)]
    if layer.private:
        pairs.append((layer.private_A, layer.private_B))
    for A, B in pairs:
        if A.requires_grad:
            found[A] = _matrix(A, layer.scaling * _grouped(dy, B.transpose(1, 2)), dropped)
        if B.requires_grad:
            found[B] = _matrix(B, dy, layer.scaling * _grouped(dropped, A))
    return found


@register_grad_sampler(VeRALinear)  # type: ignore[untyped-decorator]
def vera_samples(
    layer: VeRALinear, activations: list[Tensor], backprops: Tensor
) -> SampleGradients:
    """Per-record gradients of d and b, and of private_d and private_b; see ``lora_samples``."""
    x, dy = _rows(layer, activations[0]), _rows(layer, backprops)
    dropped = _dropped(layer, x)
    found = SampleGradients()
    pairs = [(layer.A, layer.B, layer.d, layer.b)]
    if layer.private:
        pairs.append((layer.private_A, layer.private_B, layer.private_d, layer.private_b))
    for A, B, d, b in pairs:
        xa = dropped @ A.t().to(dropped.dtype)
        if d.requires_grad:
            inner = _scaled(dy, b) @ B.to(dy.dtype)
            found[d] = (inner * xa).sum(1).to(d.dtype)
        if b.requires_grad:
            found[b] = (dy * (_scaled(xa, d) @ B.t().to(xa.dtype))).sum(1).to(b.dtype)
    return found


@register_grad_sampler(GroupedLinear)  # type: ignore[untyped-decorator]
def head_samples(
    layer: GroupedLinear, activations: list[Tensor], backprops: Tensor
) -> SampleGradients:
    """Per-record gradients of weight and bias; see ``lora_samples``."""
    x, dy = _rows(layer, activations[0]), _rows(layer, backprops)
    found = {layer.weight: _matrix(layer.weight, dy, x)}
    if layer.bias is not None:
        found[layer.bias] = dy.sum(1).to(layer.bias.dtype)
    return found


def _rows(layer: AdapterLayer | GroupedLinear, x: Tensor) -> Tensor:
    """One segment of vectors per record. [row, token, d]

    Raises:
        PrivacyError: if the layer was called with something that does not belong to single records.
    """
    rows = layer.context.rows
    if x.shape[0] != rows:
        raise PrivacyError(
            getattr(layer, "name", "head"),
            f"it is called with {x.shape[0]} rows where the batch has {rows}, so its gradient does "
            "not split over the records",
            "leave it out of target_modules",
        )
    return x.reshape(rows, -1, x.shape[-1])


def _dropped(layer: AdapterLayer, x: Tensor) -> Tensor:
    """The layer's input as its adapter saw it. [row, token, d_in]"""
    factors = dropout_factors(x.reshape(-1, x.shape[-1]), layer.keys(x), layer.dropout)
    return x if factors is None else x * factors.view_as(x)


def _grouped(x: Tensor, right: Tensor) -> Tensor:
    """x·rightᵀ with the factor of the client that each row belongs to. [row, token, m]"""
    segments = x.reshape(right.shape[0], -1, x.shape[-1])
    product = torch.bmm(segments, right.transpose(1, 2).to(x.dtype))
    return product.view(*x.shape[:2], -1)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """X times the vector of the client that each row belongs to. [row, token, m]"""
    segments = x.reshape(scale.shape[0], -1, x.shape[-1])
    return (segments * scale.unsqueeze(1).to(x.dtype)).view_as(x)


def _matrix(parameter: Any, left: Tensor, right: Tensor) -> Tensor:
    # Opacus adds up the gradients of a layer that is called more than once.
    again = parameter._forward_counter > 1 or hasattr(parameter, "_current_grad_sample")
    return sample_grad(left, right, whole=again).to(parameter.dtype)
