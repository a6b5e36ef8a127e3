"""The server's side of a round: who takes part, and how the sum changes the shared tensors."""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from fedsa_secure.federation.encoding import Layout
from fedsa_secure.streams import numpy_stream
from fedsa_secure.types import NamedTensors


def select_clients(clients: int, participation: float, seed: int, round_number: int) -> list[int]:
    """The clients of one round, in order of their number; at least one."""
    count = max(1, round(participation * clients))
    if count == clients:
        return list(range(clients))
    chosen = numpy_stream(seed, "participation", round_number).permutation(clients)[:count]
    return [int(client) for client in np.sort(chosen)]


def difference(trained: NamedTensors, start: NamedTensors) -> NamedTensors:
    """A client's update: how far its training moved the shared tensors from their public values."""
    return {name: trained[name] - start[name] for name in start}


def apply_mean(shared: NamedTensors, layout: Layout, mean: Float[Tensor, " value"]) -> NamedTensors:
    """The shared tensors after a round: moved by the mean of the clients' updates.

    Args:
        shared: public values before the round.
        layout: which value of the mean belongs where.
        mean: of the updates.
    """
    moved = layout.decode(mean)
    return {
        name: (tensor.double() + moved[name]).to(tensor.dtype) for name, tensor in shared.items()
    }
