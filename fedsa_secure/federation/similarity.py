"""How alike the clients' factors are, layer by layer.

Source: Guo et al. (ICLR 2025, arXiv 2410.01463), figures 2-6: adapters that every client trained by
itself from one common start. Tensors that the server has averaged are equal at all clients, and
their similarity is 1 whatever the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedsa_secure.types import NamedTensors


@dataclass(frozen=True)
class LayerSimilarity:
    """Mean pairwise cosine similarities over the clients in one layer. Without unit, in [-1, 1].

    Args:
        layer: path of the layer in its model.
        a: of A. A is its public start plus a movement that is small beside it, so this is near 1
            even where the clients have learnt nothing in common.
        b: of B. B starts at zero, so this is what the clients have learnt.
        a_update: of A - A_0, the movement of A from the common public start A_0: what the clients
            have learnt, without what they were given.
    """

    layer: str
    a: float
    b: float
    a_update: float


def layer_similarity(
    clients: Sequence[NamedTensors], initial: NamedTensors, pairs: Sequence[tuple[str, str]]
) -> list[LayerSimilarity]:
    """Similarity of A, of B and of the movement of A, for every layer.

    Args:
        clients: each client's tensors by name, without client axis; at least two clients. What a
            client lacks is at its public start.
        initial: the public start of all tensors by name.
        pairs: for every layer the name of the tensor in A's role and of the one in B's role. A
            name is ``path.attribute``, and the two of a pair have the same path.

    Raises:
        ValueError: if there are fewer than two clients, or a pair is not of one layer.
    """
    return [_of_layer(clients, initial, *pair) for pair in pairs]


def mean_pairwise_cosine(tensors: Sequence[Tensor]) -> float:
    """Mean of the cosine similarity over all pairs of clients.

    Every tensor is taken as one flat vector, in float64. A zero tensor has no direction; its
    similarity with any other tensor, zero or not, is counted as 0.

    Shapes: each tensor any shape, the same for all.

    Args:
        tensors: one per client; finite values.

    Returns:
        A number in [-1, 1]; 1 if all tensors are positive multiples of one.

    Raises:
        ValueError: if there are fewer than two tensors, or their shapes differ.
    """
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(tensors) < 2:
        raise ValueError(f"similarity needs the tensors of 2 clients or more, not {len(tensors)}")
    if len(shapes) > 1:
        raise ValueError(f"similarity needs tensors of one shape, not {shapes}")
    # The pairs are not gone through: |sum of u|^2 = sum of |u|^2 + 2 * sum over pairs of u·v.
    total, squares = torch.zeros(tensors[0].numel(), dtype=torch.float64), 0.0
    for tensor in tensors:
        direction = _direction(tensor)
        total += direction
        squares += float(direction @ direction)
    mean = (float(total @ total) - squares) / (len(tensors) * (len(tensors) - 1))
    return min(max(mean, -1.0), 1.0)  # rounding may step out by one unit


def _of_layer(
    clients: Sequence[NamedTensors], initial: NamedTensors, name_a: str, name_b: str
) -> LayerSimilarity:
    layer = name_a.rpartition(".")[0]
    if layer != name_b.rpartition(".")[0]:
        raise ValueError(f"{name_a} and {name_b} are not of one layer")
    start_a, start_b = initial[name_a].cpu().double(), initial[name_b]
    ends = [tensors.get(name_a, start_a).cpu().double() for tensors in clients]
    return LayerSimilarity(
        layer=layer,
        a=mean_pairwise_cosine(ends),
        b=mean_pairwise_cosine([tensors.get(name_b, start_b) for tensors in clients]),
        a_update=mean_pairwise_cosine([end - start_a for end in ends]),
    )


def _direction(tensor: Tensor) -> Float[Tensor, " value"]:
    """The tensor as a flat vector of length 1, or of length 0 if it is zero. On the host."""
    flat = tensor.detach().cpu().double().flatten()
    largest = float(flat.abs().max())
    if largest == 0:
        return flat
    scaled = flat / largest  # so that the squares of tiny values do not vanish
    return scaled / float(torch.linalg.vector_norm(scaled))
