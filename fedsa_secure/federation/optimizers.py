"""SGD and AdamW for stacked clients: every client has its own moments, step count and clipping.

torch's optimizers keep one step count per parameter. Here the parameter holds C clients, and with
partial participation they have taken different numbers of steps.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsa_secure.types import NamedTensors

BETA_1, BETA_2, _EPSILON = 0.9, 0.999, 1e-8  # Kingma and Ba, Adam (ICLR 2015), §2
_CLIP_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What a step does, without the learning rate."""

    kind: str = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the tensors that are kept for every parameter."""
        if self.kind == "adamw":
            return ("m", "v")
        return ("m",) if self.momentum else ()


@dataclass
class OptimizerState:
    """Moments and steps of C clients.

    Args:
        moments: by ``name#moment``. Each [client, …]
        steps: optimizer steps that each client has taken. [client]
    """

    moments: NamedTensors = field(default_factory=dict)
    steps: Float[Tensor, " client"] = field(default_factory=lambda: torch.zeros(1))

    def unstack(self) -> list[tuple[NamedTensors, int]]:
        """Moments, on the host and without client axis, and steps of each client."""
        moments = {name: tensor.cpu().unbind() for name, tensor in self.moments.items()}
        return [
            ({name: slices[c].clone() for name, slices in moments.items()}, int(steps))
            for c, steps in enumerate(self.steps.tolist())
        ]


def clip_factors(gradients: list[Tensor], max_norm: float) -> Float[Tensor, " client"]:
    """What each client's gradients are multiplied by so that their joint norm is at most max_norm.

    Args:
        gradients: all gradients of the stack. Each [client, …]
        max_norm: bound on the Euclidean norm over all of one client's tensors.
    """
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients])  # [tensor, client]
    return (max_norm / (squares.sum(0).sqrt() + _CLIP_EPSILON)).clamp(max=1.0)


@torch.no_grad()
def optimizer_step(
    parameters: dict[str, nn.Parameter],
    rates: dict[str, float],
    state: OptimizerState,
    settings: OptimizerSettings,
) -> None:
    """One step of every client in the stack, in place.

    Args:
        parameters: trained parameters with their gradients. Each [client, …]
        rates: learning rate of each parameter.
        state: moments and step counts; updated.
        settings: the kind of optimizer.
    """
    present = {name: p for name, p in parameters.items() if p.grad is not None}
    gradients = {name: p.grad for name, p in present.items() if p.grad is not None}
    state.steps = state.steps + 1
    if settings.max_grad_norm is not None and gradients:
        factors = clip_factors(list(gradients.values()), settings.max_grad_norm)
        for gradient in gradients.values():
            gradient.mul_(_per_client(factors, gradient))
    for name, parameter in present.items():
        rate, gradient = rates[name], gradients[name]
        if settings.weight_decay:
            parameter.mul_(1 - rate * settings.weight_decay)
        if settings.kind == "adamw":
            _adam(parameter, gradient, name, rate, state)
        elif settings.momentum:
            moment = state.moments[f"{name}#m"].mul_(settings.momentum).add_(gradient)
            parameter.sub_(moment, alpha=rate)
        else:
            parameter.sub_(gradient, alpha=rate)


class StackedOptimizer(Optimizer):
    """``optimizer_step`` in the form of a torch optimizer, for Opacus to put its own around it.

    Args:
        parameters: what is trained. Each [client, …]
        state: moments and step counts; updated.
        settings: the kind of optimizer.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        state: OptimizerState,
        settings: OptimizerSettings,
    ) -> None:
        super().__init__(list(parameters.values()), {})
        self.rates: dict[str, float] = {}
        """Learning rate of each parameter at the next step."""
        self._parameters, self._moments, self._settings = parameters, state, settings

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take the step."""
        optimizer_step(self._parameters, self.rates, self._moments, self._settings)


def _adam(
    parameter: Tensor, gradient: Tensor, name: str, rate: float, state: OptimizerState
) -> None:
    first = state.moments[f"{name}#m"].lerp_(gradient, 1 - BETA_1)
    second = state.moments[f"{name}#v"].mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
    # In float64 before the cast: in half precision 1 - 0.999 would be 0.
    rates = _per_client((rate / (1 - BETA_1**state.steps)).to(parameter), parameter)
    scale = _per_client((1 - BETA_2**state.steps).sqrt().to(parameter), parameter)
    parameter.sub_(rates * first / (second.sqrt() / scale + _EPSILON))


def _per_client(values: Float[Tensor, " client"], like: Tensor) -> Tensor:
    """Values of shape [client] that broadcast over a tensor of shape [client, …]."""
    return values.view(-1, *[1] * (like.dim() - 1))
