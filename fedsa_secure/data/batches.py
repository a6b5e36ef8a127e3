"""Which rows a client trains on, and how rows of many clients become one batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fedsa_secure.data.encoding import EncodedRows
from fedsa_secure.streams import numpy_stream


@dataclass(frozen=True)
class Batch:
    """Client-major rows in equal segments.

    Args:
        inputs: padded inputs of the model. Each [client·row, token]
        labels: class of each row [client·row], or for generation the token that each position has
            to predict [client·row, token].
        real: False for rows that only fill a segment and never count. [client, row]
    """

    inputs: dict[str, Int[Tensor, "rows _"]]
    labels: Int[Tensor, " rows"] | Int[Tensor, "rows token"]
    real: Bool[Tensor, "client row"]

    def parts(self, count: int) -> "list[Batch]":
        """The same rows in at most this many batches, each with some rows of every client."""
        if count == 1:
            return [self]
        rows = torch.arange(self.real.shape[1], device=self.real.device)
        return [self._rows(chosen) for chosen in rows.chunk(count)]

    def _rows(self, chosen: Int[Tensor, " row"]) -> "Batch":
        def of_each_client(values: Tensor) -> Tensor:
            return values.view(*self.real.shape, *values.shape[1:])[:, chosen].flatten(0, 1)

        inputs = {name: of_each_client(values) for name, values in self.inputs.items()}
        return Batch(inputs, of_each_client(self.labels), self.real[:, chosen])


def draw_rows(
    rows: np.ndarray, steps: int, batch_size: int, seed: int, client: int, round_number: int
) -> list[np.ndarray]:
    """The rows of each local step: passes through freshly shuffled rows, one after another.

    The draw depends on (seed, client, round) and the client's own rows alone. A client with fewer
    rows than a batch takes all of them in every step.

    Returns:
        One array per step. [min(batch_size, rows)]
    """
    stream = numpy_stream(seed, "batches", client, round_number)
    size = min(batch_size, len(rows))
    passes = -(-steps * size // len(rows))
    order = np.concatenate([stream.permutation(rows) for _ in range(passes)])
    return [order[k * size : (k + 1) * size] for k in range(steps)]


def collate(
    rows: EncodedRows,
    segments: Sequence[np.ndarray],
    device: torch.device,
    fill: Sequence[int] | None = None,
) -> Batch:
    """Put the chosen rows of each client into one padded batch.

    A segment that is shorter than the longest is filled with a row of the client's own, marked as
    not real; never with another client's data.

    Args:
        rows: what the segments point into.
        segments: row numbers of each client. Each [row]
        device: where the batch goes.
        fill: a row of each client to fill with, where segments may be empty; else their first.
    """
    filling = [segment[0] for segment in segments] if fill is None else fill
    size = max(1, *(len(segment) for segment in segments))
    real = np.zeros((len(segments), size), dtype=bool)
    chosen = np.empty((len(segments), size), dtype=np.int64)
    for c, segment in enumerate(segments):
        real[c, : len(segment)] = True
        chosen[c] = filling[c]
        chosen[c, : len(segment)] = segment
    flat = chosen.reshape(-1)
    inputs = {
        name: torch.from_numpy(_padded(values, flat, rows.pad[name])).to(device)
        for name, values in rows.columns.items()
    }
    labels = inputs.pop("labels", None)
    if labels is None:
        labels = torch.from_numpy(rows.labels[flat]).to(device)
    return Batch(inputs, labels, torch.from_numpy(real).to(device))


def _padded(values: list[np.ndarray], chosen: np.ndarray, pad: int) -> np.ndarray:
    """Rows side by side, padded on the right."""
    longest = max(len(values[row]) for row in chosen)
    block = np.full((len(chosen), longest), pad, dtype=np.int64)
    for place, row in enumerate(chosen):
        block[place, : len(values[row])] = values[row]
    return block
