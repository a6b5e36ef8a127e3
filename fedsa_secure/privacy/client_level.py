"""Protection of whole clients: the update as one vector, clipped and noised by its client."""

import torch
from jaxtyping import Float64
from torch import Tensor

from fedsa_secure.privacy.randomness import TurnSecret


def clipped_update(update: Float64[Tensor, " value"], norm: float) -> Float64[Tensor, " value"]:
    """The update, shortened to this norm if it is longer; zero if it is not finite.

    An error instead of the zero would tell the server about the data.
    """
    length = float(update.norm())
    if not torch.isfinite(update).all() or length == float("inf"):
        return torch.zeros_like(update)
    return update * min(1.0, norm / length) if length > 0 else update


def gaussian_update(
    update: Float64[Tensor, " value"],
    norm: float,
    noise_multiplier: float,
    secret: TurnSecret,
    label: str,
) -> Float64[Tensor, " value"]:
    """Clip a whole update to C and add Gaussian noise of standard deviation σ·2C to every value.

    Args:
        update: how far training moved the shared tensors.
        norm: C.
        noise_multiplier: σ.
        secret: of this client's turn.
        label: names the block of noise.

    Guarantee: the Gaussian mechanism with noise multiplier σ for the replacement of the client by
        any other, which moves the clipped update by at most 2C; so also for a change of any of its
        records.

    Source: McMahan et al., Learning Differentially Private Recurrent Language Models (ICLR 2018),
        §2, with the sensitivity of a replacement.
    """
    noise = torch.from_numpy(secret.gaussian(label, len(update)))
    return clipped_update(update, norm) + 2 * norm * noise_multiplier * noise
