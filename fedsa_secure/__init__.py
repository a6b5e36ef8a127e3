"""Federated LoRA in which only the A matrices leave a client."""

import importlib
from typing import TYPE_CHECKING, Any

from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import (
    AdapterError,
    BudgetExceededError,
    CheckpointError,
    ConfigError,
    DivergedError,
    FedSAError,
    MissingExtraError,
    PrivacyError,
)

if TYPE_CHECKING:
    from fedsa_secure.federation.run import Client, Run
    from fedsa_secure.runtimes.api import evaluate, load, resume, train

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "BudgetExceededError",
    "CheckpointError",
    "Client",
    "ConfigError",
    "DivergedError",
    "FedSAError",
    "MissingExtraError",
    "PrivacyError",
    "Run",
    "TrainConfig",
    "evaluate",
    "load",
    "resume",
    "train",
]

# These pull in torch and transformers, which take seconds: they are imported when first asked for.
_HEAVY = {
    "Client": "fedsa_secure.federation.run",
    "Run": "fedsa_secure.federation.run",
    "evaluate": "fedsa_secure.runtimes.api",
    "load": "fedsa_secure.runtimes.api",
    "resume": "fedsa_secure.runtimes.api",
    "train": "fedsa_secure.runtimes.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HEAVY[name]), name)
    globals()[name] = value
    return value
