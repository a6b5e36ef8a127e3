"""The table of methods. A new method is a new row."""

from typing import Literal

from fedsa_secure.errors import ConfigError, did_you_mean
from fedsa_secure.methods.method import Method
from fedsa_secure.types import Role

_ALL = frozenset(Role)
_NONE: frozenset[Role] = frozenset()

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            name="fedsa",
            trained=_ALL,
            shared=frozenset({Role.A}),
            summary="A is averaged; B and the head are personal",
            source="Guo et al., Selective Aggregation for Low-Rank Adaptation in FL, "
            "ICLR 2025 (arXiv 2410.01463)",
        ),
        Method(
            name="fedavg",
            trained=_ALL,
            shared=frozenset({Role.A, Role.B}),
            summary="A and B are averaged, each by itself (FedIT); the head is personal",
            source="Zhang et al., Towards Building the Federated GPT (FedIT), ICASSP 2024",
        ),
        Method(
            name="local",
            trained=_ALL,
            shared=_NONE,
            summary="every client on its own: nothing is sent",
            source="control",
        ),
        Method(
            name="random-a",
            trained=frozenset({Role.B, Role.HEAD}),
            shared=_NONE,
            summary="A stays at its random start; B and the head are personal, nothing is sent",
            source="control: what is a trained A worth over a random one?",
        ),
        Method(
            name="head-only",
            trained=frozenset({Role.HEAD}),
            shared=_NONE,
            summary="only the personal head is trained, nothing is sent",
            source="control: what is an adapter worth over a linear probe?",
        ),
    )
}


def find_method(name: str, head: Literal["local", "frozen", "shared"] = "local") -> Method:
    """The row of a method, with the head treated as asked.

    Raises:
        ConfigError: if there is no such method, or the head cannot be treated so.
    """
    if name not in METHODS:
        raise ConfigError("method", f"no method {name!r}", did_you_mean(name, METHODS))
    return METHODS[name].with_head(head)
