"""The table of methods. A new method is a new row."""

from typing import Literal

from fedsa_secure.errors import ConfigError, did_you_mean
from fedsa_secure.methods.method import Method, listed
from fedsa_secure.types import Role

_ALL = frozenset({Role.A, Role.B, Role.HEAD})
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
            name="ffa",
            trained=frozenset({Role.B, Role.HEAD}),
            shared=frozenset({Role.B}),
            summary="A stays at its public random start; B is averaged, the head is personal",
            source="Sun et al., Improving LoRA in Privacy-preserving Federated Learning "
            "(FFA-LoRA), ICLR 2024 (arXiv 2403.12313)",
        ),
        Method(
            name="feddpa",
            trained=_ALL | {Role.PRIVATE_A, Role.PRIVATE_B},
            shared=frozenset({Role.A, Role.B}),
            summary="two adapters trained together: one is averaged, one is private",
            source="Yang et al., Dual-Personalizing Adapter for Federated Foundation Models, "
            "NeurIPS 2024; as in FedSA-LoRA's comparison both are trained in every step and added "
            "with equal weight",
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


def methods_table() -> str:
    """All methods with what they train, send and keep, as a Markdown table."""
    lines = ["| method | trained | leaves the client | stays at the client | |", "|" + "---|" * 5]
    for row in METHODS.values():
        cells = (
            f"`{row.name}`",
            listed(row.trained),
            listed(row.shared) or "nothing",
            listed(row.personal) or "nothing",
            row.summary,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
