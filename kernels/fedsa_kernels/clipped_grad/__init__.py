"""``clipped_grad``: gradients of single records, their norms, and the clipped sum of every client.

A matrix parameter P [m, k] that acts on vectors gets from record n the gradient
``G_n = Σ_t left[n, t] · right[n, t]ᵀ``. Its norm is needed before its weight is known, so the work
is in three steps with the joint norm over all layers between them:

1. ``sample_grad``: in the one backward pass, per layer;
2. ``squared_norms``: added up over the layers of a clip group;
3. ``clipped_sum``: with the factors that follow from the norms.

For more tokens than the parameter is narrow (T > r) ``G_n`` is smaller than what it is made of and
is computed at once. For few tokens the factors are kept side by side, and the norm comes from their
Gram matrices. Neither needs a second backward pass.

Source: Lee and Kifer, Scaling up DP-SGD (PETS 2021), §3, for Gram norms; Bu et al., Book-Keeping
(ICML 2023), for one backward pass.
"""

from collections.abc import Sequence
from types import ModuleType

from jaxtyping import Float
from torch import Tensor

from fedsa_kernels.clipped_grad import reference
from fedsa_kernels.dispatch import runs_kernels

__all__ = ["clipped_sum", "sample_grad", "sample_grad_with_norms", "squared_norms"]


def _backend(name: str | None, *operands: Tensor) -> ModuleType:
    """The module that works."""
    if not runs_kernels("clipped_grad", name, *operands):
        return reference
    from fedsa_kernels.clipped_grad import triton

    return triton


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
    """
    found: Tensor = _backend(backend, left, right).sample_grad(left, right, whole)
    return found


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
    """
    module = _backend(backend, left, right)
    found: tuple[Tensor, Tensor] = module.sample_grad_with_norms(left, right)
    return found


def squared_norms(
    gradients: Float[Tensor, "row *rest"], shape: Sequence[int], *, backend: str | None = None
) -> Float[Tensor, " row"]:
    """Squared Euclidean norm of every record's gradient; of factors an upper bound to rounding.

    Args:
        gradients: of ``sample_grad``, or [row, *shape] for parameters that are no matrices.
        shape: of the parameter, without client axis.
        backend: as for ``sample_grad``.
    """
    squares: Tensor = _backend(backend, gradients).squared_norms(gradients, shape)
    return squares


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
            whatever its gradient is; that may be set to zero in place.
        factors: of every record.
        shape: of the parameter, without client axis.
        backend: as for ``sample_grad``.
    """
    total: Tensor = _backend(backend, gradients).clipped_sum(gradients, factors, shape)
    return total
