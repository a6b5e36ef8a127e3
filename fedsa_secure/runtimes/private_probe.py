"""Whether a model treats the rows of a batch apart, tried on made-up rows before a private run.

Private rows would not do: that a model is refused must not depend on them.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedsa_secure.adapters import AdaptedModel
from fedsa_secure.data import Batch, EncodedRows, FederatedData, collate
from fedsa_secure.federation.losses import learnt_positions, row_losses
from fedsa_secure.methods import Method
from fedsa_secure.privacy import refuse_dependent_rows, refuse_mixing, refuse_shared_gradients
from fedsa_secure.streams import numpy_stream, torch_stream

_LENGTHS = (5, 4, 7)
"""Of the rows; none is the number of rows, so that a layer with the sequence first shows."""
_OTHERS = (2, 16)
"""Lengths of another last row: shorter and longer than all."""


def refuse_unsound_model(
    model: AdaptedModel, method: Method, data: FederatedData, max_length: int
) -> None:
    """Refuse a model in which one record could change the gradient of another.

    Raises:
        PrivacyError: naming the operator, where it is known.
    """
    refuse_mixing(model.model)
    model.load([_start(model)], method.trained)
    batch = _batch(model, data, _LENGTHS)
    for length in _OTHERS:
        other = _batch(model, data, (*_LENGTHS[:-1], min(length, max_length)))
        refuse_dependent_rows(partial(model, batch.inputs), partial(model, other.inputs))
    parameters = list(model.parameters(method.trained).values())
    refuse_shared_gradients(model.model, parameters, lambda: _losses(model, batch), len(_LENGTHS))


def _start(model: AdaptedModel) -> dict[str, Tensor]:
    """Values at which no gradient is zero, as B's start would make that of A."""
    stream = torch_stream(0, "probe")
    return {
        name: start + 0.1 * torch.randn(start.shape, generator=stream).to(start)
        for name, start in model.initial.items()
    }


def _batch(model: AdaptedModel, data: FederatedData, lengths: Sequence[int]) -> Batch:
    """Rows of random tokens; of equal place and length they are the same in every batch."""
    vocabulary = int(model.model.config.get_text_config().vocab_size)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in data.rows.columns}
    for place, length in enumerate(lengths):
        for name, rows in columns.items():
            tokens = numpy_stream(0, "probe", name, place).integers(vocabulary, size=length)
            if name.endswith("attention_mask"):
                tokens = np.ones_like(tokens)
            elif name.endswith("type_ids"):
                tokens = np.zeros_like(tokens)
            elif name != "labels":  # some models count up to the first padding
                tokens = np.where(tokens == data.rows.pad[name], (tokens + 1) % vocabulary, tokens)
            rows.append(tokens)
    encoded = EncodedRows(columns, np.zeros(len(lengths), dtype=np.int64), data.rows.pad)
    return collate(encoded, [np.arange(len(lengths))], model.device)


def _losses(model: AdaptedModel, batch: Batch) -> Tensor:
    positions = learnt_positions(batch)
    labels = batch.labels if positions is None else batch.labels[:, positions]
    return row_losses(model(batch.inputs, None, positions), labels)
