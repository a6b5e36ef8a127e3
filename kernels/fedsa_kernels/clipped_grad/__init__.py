"""``clipped_grad``: gradients of single records, their norms, and the clipped sum of every client.

A matrix parameter P [m, k] that acts on vectors gets from record n the gradient
``G_n = Σ_t left[n, t] · right[n, t]ᵀ``. Its norm is needed before its weight is known, so the work
is in three steps with the joint norm over all layers between them:

1. ``sample_grad``: in the one backward pass, per layer;
2. ``squared_norms``: added up over the layers of a clip group;
3. ``clipped_sum``: with the factors that follow from the norms.

For more tokens than the parameter is narrow (T > r) ``G_n`` is smaller than what it is made of and
is computed at once. For few tokens the factors are kept side by side, and the norm comes from their
Gram matrices. Neither needs a second backward pass. Results cannot be differentiated.

Source: Lee and Kifer, Scaling up DP-SGD (PETS 2021), §3, for Gram norms; Bu et al., Book-Keeping
(ICML 2023), for one backward pass.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from fedsa_kernels.clipped_grad import reference
from fedsa_kernels.dispatch import runs_kernels
from fedsa_kernels.operands import require_floats, require_shapes

__all__ = ["clipped_sum", "sample_grad", "sample_grad_with_norms", "squared_norms"]


def _backend(name: str | None, *operands: Tensor) -> ModuleType:
    """The module that works."""
    if not runs_kernels("clipped_grad", name, *operands):
        return reference
    from fedsa_kernels.clipped_grad import triton

    return triton


@torch.library.custom_op("fedsa::sample_grad", mutates_args=())
def _sample_grad(left: Tensor, right: Tensor, whole: bool, backend: str | None) -> Tensor:
    found: Tensor = _backend(backend, left, right).sample_grad(left, right, whole)
    return found


@_sample_grad.register_fake
def _sample_grad_fake(left: Tensor, right: Tensor, whole: bool, backend: str | None) -> Tensor:
    rows, tokens, m = left.shape
    k = right.shape[2]
    kept = not whole and reference.keeps_factors(left, right)
    shape = (rows, tokens, m + k) if kept else (rows, m, k)
    return left.new_empty(shape, dtype=reference.wide_dtype(left, right))


@torch.library.custom_op("fedsa::sample_grad_with_norms", mutates_args=())
def _with_norms(left: Tensor, right: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    module = _backend(backend, left, right)
    found: tuple[Tensor, Tensor] = module.sample_grad_with_norms(left, right)
    return found


@_with_norms.register_fake
def _with_norms_fake(left: Tensor, right: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    found = _sample_grad_fake(left, right, False, backend)
    return found, found.new_empty(left.shape[0])


@torch.library.custom_op("fedsa::squared_norms", mutates_args=())
def _squared_norms(gradients: Tensor, shape: Sequence[int], backend: str | None) -> Tensor:
    squares: Tensor = _backend(backend, gradients).squared_norms(gradients, shape)
    return squares


@_squared_norms.register_fake
def _squared_norms_fake(gradients: Tensor, shape: Sequence[int], backend: str | None) -> Tensor:
    return gradients.new_empty(gradients.shape[0], dtype=reference.wide_dtype(gradients))


@torch.library.custom_op("fedsa::clipped_sum", mutates_args=())
def _clipped_sum(
    gradients: Tensor, factors: Tensor, shape: Sequence[int], backend: str | None
) -> Tensor:
    total: Tensor = _backend(backend, gradients).clipped_sum(gradients, factors, shape)
    return total


@_clipped_sum.register_fake
def _clipped_sum_fake(
    gradients: Tensor, factors: Tensor, shape: Sequence[int], backend: str | None
) -> Tensor:
    return gradients.new_empty(factors.shape[0], *shape)


def sample_grad(
    left: Float[Tensor, "row token m"],
    right: Float[Tensor, "row token k"],
    whole: bool = False,
    *,
    backend: str | None = None,
) -> Float[Tensor, "row _ _"]:
    """Gradient of a matrix parameter [m, k] for every record, in float32 at least.

    Args:
        left: gradient of the product's output.
        right: its input.
        whole: never keep factors, so that the result may be added to another.
        backend: "reference" or "triton"; else FEDSA_KERNELS decides.

    Returns:
        [row, m, k], or the factors side by side [row, token, m + k] where these are smaller.

    Raises:
        ValueError: if records or tokens are not as many on both sides, or these are no floating
            point, or on two devices.
    """
    _require_pairs("sample_grad", left, right)
    found: Tensor = _sample_grad(left, right, whole, backend)
    return found


def _require_pairs(op: str, left: Tensor, right: Tensor) -> None:
    require_floats(op, ("left", left), ("right", right))
    if left.dim() != 3:
        raise ValueError(f"{op}: left is {list(left.shape)}; it needs records, tokens and columns")
    records, tokens, _ = left.shape
    require_shapes(op, ("right", right, (records, tokens, right.shape[-1])))


def sample_grad_with_norms(
    left: Float[Tensor, "row token m"],
    right: Float[Tensor, "row token k"],
    *,
    backend: str | None = None,
) -> tuple[Float[Tensor, "row _ _"], Float[Tensor, " row"]]:
    """``sample_grad`` and its ``squared_norms``; a kernel makes both in one pass.

    The norms are those of the very numbers returned. Who rounds these or adds to them needs
    ``squared_norms`` of what comes out.

    Args:
        left: gradient of the product's output.
        right: its input.
        backend: as for ``sample_grad``.

    Raises: as ``sample_grad``.
    """
    _require_pairs("sample_grad_with_norms", left, right)
    found: tuple[Tensor, Tensor] = _with_norms(left, right, backend)
    return found


def squared_norms(
    gradients: Float[Tensor, "row *rest"], shape: Sequence[int], *, backend: str | None = None
) -> Float[Tensor, " row"]:
    """Squared Euclidean norm of every record's gradient; of factors an upper bound to rounding.

    Args:
        gradients: of ``sample_grad``, or [row, *shape] for parameters that are no matrices.
        shape: of the parameter, without client axis.
        backend: as for ``sample_grad``.

    Raises:
        ValueError: if gradients have another shape, or are no floating point.
    """
    _require_parameter("squared_norms", gradients, shape)
    squares: Tensor = _squared_norms(gradients, shape, backend)
    return squares


def _require_parameter(op: str, gradients: Tensor, shape: Sequence[int]) -> None:
    require_floats(op, ("gradients", gradients))
    if not (reference.factored(gradients, shape) and gradients.dim() == 3):
        require_shapes(op, ("gradients", gradients, (len(gradients), *shape)))


def clipped_sum(
    gradients: Float[Tensor, "row *rest"],
    factors: Float[Tensor, "client own"],
    shape: Sequence[int],
    *,
    backend: str | None = None,
) -> Float[Tensor, "client *shape"]:
    """Sum over each client's own records of factor · gradient.

    Args:
        gradients: client-major, as for ``squared_norms``. A record with factor 0 does not count,
            whatever its gradient is.
        factors: of every record.
        shape: of the parameter, without client axis.
        backend: as for ``sample_grad``.

    Raises:
        ValueError: if there is another number of factors, gradients have another shape, or these
            are no floating point, or on two devices.
    """
    _require_parameter("clipped_sum", gradients, shape)
    require_floats("clipped_sum", ("gradients", gradients), ("factors", factors))
    if factors.dim() != 2:
        raise ValueError(f"clipped_sum: factors are {list(factors.shape)}, and not [client, own]")
    if factors.numel() != len(gradients):
        raise ValueError(f"clipped_sum: {factors.numel()} factors for {len(gradients)} records")
    total: Tensor = _clipped_sum(gradients, factors, shape, backend)
    return total
