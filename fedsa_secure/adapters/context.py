"""What the adapters have to know about the batch that is passing through the model."""

from dataclasses import dataclass

from jaxtyping import Int32
from torch import Tensor


@dataclass
class BatchContext:
    """Set by ``AdaptedModel`` before each forward pass and read by its adapter modules.

    Args:
        clients: C, the number of client segments.
        rows: C times the rows of a segment.
        keys: dropout keys of the rows, or None outside training. [row]
    """

    clients: int = 1
    rows: int = 0
    keys: Int32[Tensor, " row"] | None = None
