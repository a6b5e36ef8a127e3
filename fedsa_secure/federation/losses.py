"""What is minimised: every client's own mean over its own rows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from fedsa_secure.data import IGNORED, Batch


def row_losses(
    logits: Float[Tensor, "row *token out"], labels: Int[Tensor, "row *token"]
) -> Float[Tensor, " row"]:
    """Cross-entropy of each row; for generation the mean over the tokens of its own answer.

    The mean is taken row by row, so that no row's loss depends on how long the others are.

    Args:
        logits: of the classes, or of the tokens at each position.
        labels: class of each row, or the token that each position has to predict, or ``IGNORED``.
    """
    if labels.dim() == 1:
        return functional.cross_entropy(logits, labels, reduction="none")
    learnt = labels != IGNORED
    by_token = logits.new_zeros(labels.shape).masked_scatter(
        learnt, functional.cross_entropy(logits[learnt], labels[learnt], reduction="none")
    )
    return by_token.sum(1) / learnt.sum(1).clamp(min=1)


def client_losses(
    by_row: Float[Tensor, " rows"], batch: Batch, counts: Int[Tensor, " client"] | None = None
) -> Float[Tensor, " client"]:
    """Each client's mean loss over its own real rows. Filling rows do not count.

    Args:
        by_row: losses of the batch's rows.
        batch: says which rows are real.
        counts: what the sum is divided by, if the batch is part of a larger one.
    """
    counts = batch.real.sum(1) if counts is None else counts
    # where, and not a product: whatever a filling row gives, even NaN, is not looked at
    return torch.where(batch.real, by_row.view(batch.real.shape), 0.0).sum(1) / counts


def learnt_positions(batch: Batch) -> Int[Tensor, " kept"] | None:
    """For generation the positions at which any row has a token to predict, else None."""
    if batch.labels.dim() == 1:
        return None
    return (batch.labels != IGNORED).any(0).nonzero().squeeze(1)
