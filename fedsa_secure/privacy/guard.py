"""Models in which one row of a batch could change the gradient of another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsa_kernels import squared_norms
from fedsa_secure.errors import PrivacyError
from fedsa_secure.privacy.watching import watched

_MIXING = {
    "Linear8bitLt": "it looks for outliers over the whole batch",
    "SwitchTransformersSparseMLP": "its experts have a capacity that the rows of a batch share",
    "NllbMoeSparseMLP": "its experts have a capacity that the rows of a batch share",
}
_DYNAMIC = "torch.ao.nn.quantized.dynamic"
_TOLERANCE = 1e-4


def refuse_mixing(module: nn.Module) -> None:
    """Refuse a model with an operator that is known to mix the rows of a batch.

    Raises:
        PrivacyError: naming the first one.
    """
    for name, part in module.named_modules():
        kind, reason = type(part).__name__, _MIXING.get(type(part).__name__)
        if isinstance(part, _BatchNorm):
            reason = "it takes statistics over the rows of a batch"
        if type(part).__module__.startswith(_DYNAMIC):
            reason = "it takes one scale over the whole batch"
        if reason:
            raise PrivacyError(
                f"{name or 'the model'} ({kind})",
                f"{reason}, so one record would change the gradients of others, and clipping would "
                "bound nothing",
                "take a model without it",
            )


def refuse_dependent_rows(
    forward: Callable[[], Float[Tensor, "row *rest"]],
    with_other_last: Callable[[], Float[Tensor, "row *rest"]],
) -> None:
    """Refuse a model whose outputs for some rows change with another row of the batch.

    It catches what a list of operators does not know; a model that mixes rows in rare batches only
    can pass.

    Args:
        forward: outputs of a batch.
        with_other_last: outputs of the batch with another last row.

    Raises:
        PrivacyError: if any other row's output differs by more than rounding.
    """
    with torch.no_grad():
        first, second = forward()[:-1], with_other_last()[:-1]
    length = min(first.shape[1], second.shape[1])  # of sequences; padding may differ
    first, second = first[:, :length], second[:, :length]
    scale = float(first.abs().max().clamp(min=1.0))
    difference = float((first - second).abs().max()) / scale
    if not difference <= _TOLERANCE:
        raise PrivacyError(
            "the model",
            f"the outputs of some rows move by {difference:.2g} when another row of the batch is "
            "replaced, so one record would change the gradients of others",
            "take a model whose layers treat every row by itself",
        )


def refuse_shared_gradients(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    losses: Callable[[], Float[Tensor, " row"]],
    rows: int,
) -> None:
    """Refuse a model in which the gradient of one record's loss is found at other rows.

    That happens where rows mix, and where a layer's first dimension is not the batch.

    Args:
        module: the model that carries one client.
        parameters: what is trained.
        losses: of the rows of a batch, by a new forward pass.
        rows: of the batch.

    Raises:
        PrivacyError: if a row other than its own has more than rounding of a record's gradient.
    """
    with watched(module):
        for row in range(rows):
            _forget_gradients(parameters)
            losses()[row].backward()  # type: ignore[no-untyped-call]
            squares = torch.stack([_squares(parameter) for parameter in parameters]).sum(0)
            own, most = float(squares[row]), float(squares.max())
            if not most <= own:
                raise _misplaced()
            squares[row] = 0.0
            if not float(squares.max()) <= _TOLERANCE**2 * own:
                raise _misplaced()


def _squares(parameter: nn.Parameter) -> Tensor:
    gradients: Any = getattr(parameter, "grad_sample", None)
    return squared_norms(gradients, parameter.shape[1:])


def _forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        untyped: Any = parameter
        untyped.grad_sample = untyped.grad = None


def _misplaced() -> PrivacyError:
    return PrivacyError(
        "the model",
        "the gradient of one record's loss is found at other rows of the batch, so clipping record "
        "by record would bound nothing",
        "take a model whose layers have the batch as their first dimension and treat every row by "
        "itself",
    )
