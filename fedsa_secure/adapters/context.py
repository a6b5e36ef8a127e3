"""What the adapters have to know about the batch that is passing through the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from jaxtyping import Int32
from torch import Tensor

from fedsa_secure.errors import AdapterError


@dataclass
class BatchContext:
    """Set by ``AdaptedModel`` before each forward pass and read by its adapter modules.

    Args:
        clients: C, the number of client segments.
        rows: C times the rows of a segment.
        keys: dropout keys of the rows, or None outside training. [row]
        loads: how often clients were taken in.
    """

    clients: int = 1
    rows: int = 0
    keys: Int32[Tensor, " row"] | None = None
    loads: int = 0

    @contextmanager
    def as_it_was(self, then: "BatchContext") -> Iterator[None]:
        """Be for a while what an earlier pass found, some of whose layers are run again.

        Raises:
            AdapterError: if clients were taken in since: their parameters are in the layers now.
        """
        if then.loads != self.loads:
            raise AdapterError(
                "clients were loaded between a forward pass and its backward pass, which runs "
                "checkpointed layers again; make the backward pass first"
            )
        now = replace(self)
        vars(self).update(vars(then))
        try:
            yield
        finally:
            vars(self).update(vars(now))
