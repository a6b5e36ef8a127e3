"""Public random streams, each derived from (seed, purpose, keys…).

A stream depends on nothing but its key, so draws are the same whatever the order of the clients,
the number of clients in one pass, or the round at which a run was resumed.

These streams are reproducible by anyone who knows the seed. Nothing that has to stay secret may
come from here.
"""

import hashlib

import numpy as np
import torch


def derive(seed: int, purpose: str, *keys: int | str) -> int:
    """Derive a 63-bit seed for one purpose.

    Args:
        seed: the root seed of the run.
        purpose: what the stream is for; separates streams that share their keys.
        keys: what the stream is indexed by, such as client and round.
    """
    label = "\x1f".join([str(seed), purpose, *(f"{type(k).__name__}:{k}" for k in keys)])
    digest = hashlib.blake2b(label.encode(), digest_size=8, person=b"fedsa-stream").digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_stream(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """A NumPy generator for one purpose (see ``derive``)."""
    return np.random.Generator(np.random.Philox(derive(seed, purpose, *keys)))


def torch_stream(seed: int, purpose: str, *keys: int | str) -> torch.Generator:
    """A CPU torch generator for one purpose (see ``derive``)."""
    return torch.Generator().manual_seed(derive(seed, purpose, *keys))
