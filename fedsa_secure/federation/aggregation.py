"""``sum``: all that the server learns of the clients' updates."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def sum_updates(
    vectors: Iterable[Float[Tensor, " value"]], size: int
) -> tuple[Float[Tensor, " value"], int]:
    """The sum of the clients' vectors, in the order given, and how many there were.

    Sums are kept in float64 and the caller gives the vectors in client-id order, so that the result
    does not depend on how the clients were spread over passes.

    Args:
        vectors: one per client; consumed one at a time.
        size: values in each vector.
    """
    total, count = torch.zeros(size, dtype=torch.float64), 0
    for vector in vectors:
        total += vector
        count += 1
    return total, count
