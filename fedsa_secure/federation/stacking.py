"""How many clients share one forward pass."""

import numpy as np
import torch

from fedsa_secure.config import TrainConfig
from fedsa_secure.data import FederatedData

# Tokens that one pass should hold. Measured (benchmarks/README.md): on a CPU a larger pass falls
# out of the cache and is slower than several small ones; a GPU wants to be filled.
_PASS_TOKENS = {"cpu": 2048, "cuda": 32768}


def clients_per_pass(config: TrainConfig, data: FederatedData, device: torch.device) -> int:
    """What the option asks for; ``auto`` bounds the tokens of a pass.

    A pass is counted with rows of the 90th percentile of the lengths, close to what the longest row
    of a batch needs.
    """
    wanted = config.clients_per_pass
    if wanted == "auto":
        length = float(np.quantile(data.rows.lengths(), 0.9))
        budget = _PASS_TOKENS.get(device.type, _PASS_TOKENS["cuda"])
        wanted = int(budget // (config.batch_size * length))
    return max(1, min(wanted, len(data.shards)))


def passes(clients: list[int], per_pass: int) -> list[list[int]]:
    """Clients in passes of nearly equal size, in order; none if there are no clients."""
    if not clients:
        return []
    count = -(-len(clients) // per_pass)
    return [[int(client) for client in part] for part in np.array_split(clients, count)]
