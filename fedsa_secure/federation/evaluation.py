"""Personal models on their own test rows, and on rows that are the same for all."""

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import f1_score

from fedsa_secure.adapters import AdaptedModel
from fedsa_secure.data import EncodedRows, FederatedData, collate
from fedsa_secure.types import NamedTensors

_EVALUATION_TOKENS = 4096
"""Tokens in one forward pass without gradients."""


class ClientMetrics(BaseModel):
    """How one personal model did. All shares are in [0, 1].

    Args:
        client: its number.
        train_rows: rows that it trained on.
        test_rows: rows of its own test part.
        accuracy: on its own test part.
        macro_f1: on its own test part; mean over the classes that occur there or were predicted.
        majority: accuracy of always answering the most frequent class of its own test part.
        common_accuracy: on the class-balanced rows that are the same for all, if there are any.
    """

    model_config = ConfigDict(frozen=True)

    client: int
    train_rows: int
    test_rows: int
    accuracy: float
    macro_f1: float
    majority: float
    common_accuracy: float | None = None


def evaluate_client(
    model: AdaptedModel, data: FederatedData, client: int, tensors: NamedTensors, common: bool
) -> ClientMetrics:
    """Measure one personal model.

    Clients are measured one by one: a test part fills a pass by itself, and parts of unequal size
    side by side would mostly be filling.

    Args:
        model: the frozen base; whatever clients it held are replaced.
        data: everybody's rows.
        client: its number.
        tensors: all its trained tensors, shared ones included.
        common: also measure on the common test.
    """
    model.load([tensors], trained=())
    own = predict_classes(model, data.rows, data.shards[client].test)
    on_common = None
    if common and data.common is not None:
        on_common = predict_classes(model, data.common, np.arange(len(data.common)))
    return _metrics(data, client, own, on_common)


@torch.no_grad()
def predict_classes(model: AdaptedModel, rows: EncodedRows, chosen: np.ndarray) -> np.ndarray:
    """The most likely class of each chosen row.

    Args:
        model: with one client loaded.
        rows: what ``chosen`` points into.
        chosen: row numbers. [row]

    Returns:
        Classes in the order of ``chosen``. [row]
    """
    lengths = rows.lengths()[chosen]
    order = np.argsort(lengths, kind="stable")  # rows of like length together: little padding
    predicted = np.empty(len(chosen), dtype=np.int64)
    start = 0
    while start < len(order):
        size = max(1, _EVALUATION_TOKENS // int(lengths[order[start]]))
        while size > 1 and size * lengths[order[start : start + size][-1]] > _EVALUATION_TOKENS:
            size //= 2
        places = order[start : start + size]
        batch = collate(rows, [chosen[places]], model.device)
        predicted[places] = model(batch.inputs).argmax(-1).cpu().numpy()
        start += size
    return predicted


def _metrics(
    data: FederatedData, client: int, own: np.ndarray, common: np.ndarray | None
) -> ClientMetrics:
    shard = data.shards[client]
    labels = data.rows.labels[shard.test]
    common_accuracy = None
    if common is not None and data.common is not None:
        common_accuracy = float(np.mean(common == data.common.labels))
    return ClientMetrics(
        client=client,
        train_rows=len(shard.train),
        test_rows=len(shard.test),
        accuracy=float(np.mean(own == labels)),
        macro_f1=float(f1_score(labels, own, average="macro", zero_division=0.0)),
        majority=float(np.bincount(labels).max() / len(labels)),
        common_accuracy=common_accuracy,
    )
