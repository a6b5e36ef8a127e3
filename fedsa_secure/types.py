"""The vocabulary shared by all layers."""

from enum import StrEnum

from torch import Tensor

NamedTensors = dict[str, Tensor]
"""Tensors by parameter name. The order of the names is the order on the wire."""


class Role(StrEnum):
    """What a trainable tensor is for; methods speak of roles and never of parameter names."""

    A = "A"
    """The general factor: LoRA A [client, r, d_in], VeRA d [client, r]."""
    B = "B"
    """The personal factor: LoRA B [client, d_out, r], VeRA b [client, d_out]."""
    PRIVATE_A = "private A"
    """The general factor of a second adapter that never leaves the client (FedDPA)."""
    PRIVATE_B = "private B"
    """The personal factor of that adapter."""
    HEAD = "head"
    """Every linear layer that the task class puts on top of the base model."""
