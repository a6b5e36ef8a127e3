"""Vectors through a real round of secure aggregation: encode, mask, sum, unmask, decode."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from fedsa_secure.config import TrainConfig
from fedsa_secure.federation.aggregation import Contribution
from fedsa_secure.federation.encoding import Layout
from fedsa_secure.federation.secure_aggregation import SecureAggregation
from fedsa_secure.privacy import TurnSecret

CLIENTS = 3
"""Of the round; the fewest that the protocol allows."""


def masked_sum(
    vectors: Sequence[Float64[Tensor, " value"]], bound: float
) -> Float64[Tensor, "..."]:
    """The sum that the server sees, with rounding coins that are secret, as in a private run.

    Args:
        vectors: of the first clients of the round, at most three; the others send zeros, as
            someone who colludes with the server would.
        bound: range of a value; what lies beyond is clipped, and counted nowhere.

    Returns:
        The decoded sum. [value]
    """
    config = TrainConfig.build(clients=CLIENTS, rounds=1, dp_epsilon=1.0)
    shared = {"released": torch.zeros(len(vectors[0]))}
    zeros = torch.zeros(len(vectors[0]), dtype=torch.float64)

    def contribute(clients: Sequence[int]) -> Iterator[Contribution]:
        for client in clients:
            vector = vectors[client] if client < len(vectors) else zeros
            key = TurnSecret.fresh().key("rounding")
            yield Contribution(client, vector, None, rounding_key=key)

    cohort = list(range(CLIENTS))
    server = SecureAggregation(config, Layout.of(shared), lambda _: cohort, lambda *_: bound)
    mean = server.round(1, cohort, None, shared, contribute).mean
    if mean is None:
        raise RuntimeError("a round in which nobody fails was lost")
    return mean * CLIENTS
