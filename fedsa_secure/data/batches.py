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
        labels: class of each row. [client·row]
        real: False for rows that only fill a segment and never count. [client, row]
    """

    inputs: dict[str, Int[Tensor, "rows token"]]
    labels: Int[Tensor, " rows"]
    real: Bool[Tensor, "client row"]

    def positions(self) -> Int[Tensor, "client row token"]:
        """Place of each token in its own sequence, counted without padding."""
        places = self.inputs["attention_mask"].cumsum(-1) - 1
        return places.view(*self.real.shape, -1)


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


def collate(rows: EncodedRows, segments: Sequence[np.ndarray], device: torch.device) -> Batch:
    """Put the chosen rows of each client into one padded batch.

    Segments shorter than the longest are filled with rows of padding, never with data.
    """
    size = max(len(segment) for segment in segments)
    real = np.zeros((len(segments), size), dtype=bool)
    chosen = np.full((len(segments), size), -1, dtype=np.int64)
    for c, segment in enumerate(segments):
        real[c, : len(segment)] = True
        chosen[c, : len(segment)] = segment
    flat = chosen.reshape(-1)
    inputs = {
        name: torch.from_numpy(_padded(values, flat, rows.pad[name])).to(device)
        for name, values in rows.columns.items()
    }
    # A row without any visible token would give a softmax over nothing.
    inputs["attention_mask"][torch.from_numpy(flat < 0), 0] = 1
    labels = np.where(flat >= 0, rows.labels[np.maximum(flat, 0)], 0)
    return Batch(inputs, torch.from_numpy(labels).to(device), torch.from_numpy(real).to(device))


def _padded(values: list[np.ndarray], chosen: np.ndarray, pad: int) -> np.ndarray:
    """Rows side by side, padded on the right; row -1 is padding only."""
    longest = max(len(values[row]) for row in chosen if row >= 0)
    block = np.full((len(chosen), longest), pad, dtype=np.int64)
    for place, row in enumerate(chosen):
        if row >= 0:
            block[place, : len(values[row])] = values[row]
    return block
