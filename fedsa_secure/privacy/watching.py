"""Opacus' hooks on the layers that are trained, for as long as a context is open."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from opacus import GradSampleModule
from torch import nn

from fedsa_secure.adapters import GroupedLinear
from fedsa_secure.adapters.layer import AdapterLayer
from fedsa_secure.privacy import grad_samplers as grad_samplers  # registers our layers


@contextmanager
def watched(module: nn.Module) -> Iterator[None]:
    """Every backward pass leaves per-record gradients in ``grad_sample`` of what is trained.

    Afterwards no hook and no attribute of Opacus is left.
    """
    layers = [m for m in module.modules() if isinstance(m, AdapterLayer | GroupedLinear)]
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(setattr, layer, "training", layer.training)
            layer.training = True  # hooks sleep in eval mode; the base model stays in it
        # Our VeRA layers have buffers that are constants, which strict mode cannot know.
        wrapped = GradSampleModule(module, loss_reduction="sum", strict=False)
        stack.callback(_forget, wrapped)
        stack.enter_context(warnings.catch_warnings())
        # The first layer's input has no gradient, and its hook gets the output's all the same.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def _forget(wrapped: GradSampleModule) -> None:
    """Take Opacus' hooks and everything that they left on the parameters away."""
    wrapped.remove_hooks()
    for parameter in wrapped.parameters():
        for name in ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"):
            if hasattr(parameter, name):
                delattr(parameter, name)
        parameter.grad = None
    for module in wrapped.modules():
        for name in ("activations", "max_batch_len"):
            if hasattr(module, name):
                delattr(module, name)
