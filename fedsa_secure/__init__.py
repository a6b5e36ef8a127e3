"""Federated LoRA in which only the A matrices leave a client."""

from fedsa_secure.config import TrainConfig
from fedsa_secure.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    FedSAError,
    MissingExtraError,
)
from fedsa_secure.federation.run import Client, Run
from fedsa_secure.runtimes.api import evaluate, load, resume, train

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "CheckpointError",
    "Client",
    "ConfigError",
    "FedSAError",
    "MissingExtraError",
    "Run",
    "TrainConfig",
    "evaluate",
    "load",
    "resume",
    "train",
]
