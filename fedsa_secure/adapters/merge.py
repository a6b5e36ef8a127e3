"""Adapters merged into the weights of their layers."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedsa_secure.adapters.attach import AdaptedModel
from fedsa_secure.adapters.layer import is_plain
from fedsa_secure.errors import AdapterError
from fedsa_secure.types import NamedTensors


def merged_weights(adapted: AdaptedModel, tensors: NamedTensors) -> NamedTensors:
    """W + ΔW of every adapted layer for one client, in the layout of the layer.

    Args:
        adapted: the model that the tensors belong to.
        tensors: one client's tensors, without client axis; what is missing is at its public start.

    Returns:
        Weights by the path of the layer. nn.Linear [d_out, d_in], Conv1D [d_in, d_out]

    Raises:
        AdapterError: if a layer keeps its weight in a packed form.
    """
    merged = NamedTensors()
    for path, layer in adapted.layers().items():
        weight = getattr(layer.base, "weight", None)
        if not isinstance(weight, Tensor) or not is_plain(weight):
            kind, form = type(layer.base).__name__, type(weight).__name__
            raise AdapterError(f"{path} is a {kind} whose weight is a packed {form}")
        own = {
            name.removeprefix(f"{path}."): tensors.get(name, start).to(weight.device)
            for name, start in adapted.initial.items()
            if name.startswith(f"{path}.")
        }
        delta = layer.delta(own)
        delta = delta.t() if isinstance(layer.base, Conv1D) else delta
        merged[path] = (weight.detach() + delta).to(weight.dtype)
    return merged
