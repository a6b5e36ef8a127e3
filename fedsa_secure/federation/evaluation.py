"""Personal models on their own test rows, on the other clients', and on rows that all share."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import f1_score

from fedsa_secure.adapters import AdaptedModel
from fedsa_secure.config import TrainConfig
from fedsa_secure.data import EncodedRows, FederatedData, collate, exact_match
from fedsa_secure.federation.generation import write_answers
from fedsa_secure.federation.losses import learnt_positions, row_losses
from fedsa_secure.streams import numpy_stream
from fedsa_secure.types import NamedTensors

_EVALUATION_TOKENS = 4096
"""Tokens in one forward pass without gradients."""


class ClientMetrics(BaseModel):
    """How one personal model did. Shares are in [0, 1], losses in nats.

    Args:
        client: its number.
        train_rows: rows that it trained on.
        test_rows: rows of its own test part.
        loss: mean over the rows of its own test part of their cross-entropy; for generation of its
            mean over the tokens of a row's answer.
        accuracy: on its own test part: share of the classes that are right, or for generation of
            the answers that are (see ``exact_match``), if any were decoded.
        macro_f1: on its own test part; mean over the classes that occur there or were predicted.
        majority: accuracy of always answering the most frequent class of its own test part.
        cross_accuracy: the same model on test rows of the other clients. A personal model that
            is good at home and poor there has specialised; a global model is even.
        cross_loss: likewise.
        common_accuracy: on the rows that are the same for all, balanced over the classes.
        common_loss: likewise.
    """

    model_config = ConfigDict(frozen=True)

    client: int
    train_rows: int
    test_rows: int
    loss: float
    accuracy: float | None = None
    macro_f1: float | None = None
    majority: float | None = None
    cross_accuracy: float | None = None
    cross_loss: float | None = None
    common_accuracy: float | None = None
    common_loss: float | None = None


@dataclass(frozen=True)
class _Score:
    """Loss, accuracy if it was measured, and for classification the classes. [row]"""

    loss: float | None = None
    accuracy: float | None = None
    classes: np.ndarray | None = None


def evaluate_client(
    model: AdaptedModel,
    data: FederatedData,
    client: int,
    tensors: NamedTensors,
    config: TrainConfig,
    elsewhere: bool,
) -> ClientMetrics:
    """Measure one personal model.

    Clients are measured one by one: a test part fills a pass by itself, and parts of unequal size
    side by side would mostly be filling.

    Args:
        model: the frozen base; whatever clients it held are replaced.
        data: everybody's rows.
        client: its number.
        tensors: all its trained tensors, shared ones included.
        config: how many rows to take, and how to decode.
        elsewhere: also measure on the other clients' rows and on the common ones.
    """
    model.load([tensors], trained=())
    shard = data.shards[client]
    own = _score(model, data, data.rows, shard.test, config)
    cross, common = _Score(), _Score()
    if elsewhere:
        cross = _score(model, data, data.rows, rows_of_others(data, client, config), config)
        if data.common is not None:
            common = _score(model, data, data.common, np.arange(len(data.common)), config)
    labels, f1, majority = data.rows.labels[shard.test], None, None
    if own.classes is not None:
        f1 = float(f1_score(labels, own.classes, average="macro", zero_division=0.0))
        majority = float(np.bincount(labels).max() / len(labels))
    return ClientMetrics(
        client=client,
        train_rows=len(shard.train),
        test_rows=len(shard.test),
        loss=float(own.loss or 0.0),
        accuracy=own.accuracy,
        macro_f1=f1,
        majority=majority,
        cross_accuracy=cross.accuracy,
        cross_loss=cross.loss,
        common_accuracy=common.accuracy,
        common_loss=common.loss,
    )


def rows_of_others(data: FederatedData, client: int, config: TrainConfig) -> np.ndarray:
    """At most ``cross_rows`` test rows of the other clients, chosen from all of them. [row]"""
    parts = [shard.test for k, shard in enumerate(data.shards) if k != client]
    rows = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    stream = numpy_stream(config.seed, "cross rows", client)
    return np.sort(stream.permutation(rows)[: config.cross_rows])


def mean_of(metrics: list[ClientMetrics], name: str) -> float | None:
    """Mean of one metric over the clients that have it, or None if none has."""
    values = [value for m in metrics if (value := getattr(m, name)) is not None]
    return float(np.mean(values)) if values else None


@torch.no_grad()
def predict_classes(
    model: AdaptedModel, rows: EncodedRows, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The most likely class and the loss of each chosen row.

    Args:
        model: with one client loaded.
        rows: what ``chosen`` points into.
        chosen: row numbers. [row]

    Returns:
        Classes and losses in the order of ``chosen``. Each [row]
    """
    classes, losses = np.empty(len(chosen), dtype=np.int64), np.empty(len(chosen))
    for places in _like_lengths(rows, chosen):
        batch = collate(rows, [chosen[places]], model.device)
        logits = model(batch.inputs)
        classes[places] = logits.argmax(-1).cpu().numpy()
        losses[places] = row_losses(logits, batch.labels).cpu().numpy()
    return classes, losses


@torch.no_grad()
def answer_losses(model: AdaptedModel, rows: EncodedRows, chosen: np.ndarray) -> np.ndarray:
    """Mean loss over the tokens of each chosen row's answer, given the right tokens before. [row]

    Args: as for ``predict_classes``.
    """
    losses = np.empty(len(chosen))
    for places in _like_lengths(rows, chosen):
        batch = collate(rows, [chosen[places]], model.device)
        positions = learnt_positions(batch)
        logits = model(batch.inputs, positions=positions)
        losses[places] = row_losses(logits, batch.labels[:, positions]).cpu().numpy()
    return losses


def _score(
    model: AdaptedModel,
    data: FederatedData,
    rows: EncodedRows,
    chosen: np.ndarray,
    config: TrainConfig,
) -> _Score:
    if len(chosen) == 0:
        return _Score()
    if rows.answers is None:
        classes, losses = predict_classes(model, rows, chosen)
        right = float(np.mean(classes == rows.labels[chosen]))
        return _Score(float(losses.mean()), right, classes)
    loss = float(answer_losses(model, rows, chosen).mean())
    if config.decode_rows == 0 or rows.prompts is None:
        return _Score(loss)
    stream = numpy_stream(config.seed, "decoded rows", len(chosen))
    tried = np.sort(stream.permutation(chosen)[: config.decode_rows])
    prompts = [rows.prompts[row] for row in tried]
    written = write_answers(model, data.tokenizer, prompts, config.max_new_tokens)
    right = float(
        np.mean([exact_match(t, rows.answers[r]) for t, r in zip(written, tried, strict=True)])
    )
    return _Score(loss, right)


def _like_lengths(rows: EncodedRows, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Places of ``chosen`` in passes of bounded size; rows of like length together."""
    lengths = rows.lengths()[chosen]
    order, start = np.argsort(lengths, kind="stable"), 0
    while start < len(order):
        size = max(1, _EVALUATION_TOKENS // max(1, int(lengths[order[start]])))
        while size > 1 and size * lengths[order[start : start + size][-1]] > _EVALUATION_TOKENS:
            size //= 2
        yield order[start : start + size]
        start += size
