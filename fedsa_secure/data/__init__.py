"""Data sets, their partition over clients, and batches. Knows nothing of methods or adapters."""

from fedsa_secure.data.answers import exact_match
from fedsa_secure.data.batches import Batch, collate, draw_rows
from fedsa_secure.data.dialogue import PromptForm, pad_prompts
from fedsa_secure.data.encoding import IGNORED, EncodedRows, encode, encode_texts, pad_token
from fedsa_secure.data.federated import Division, FederatedData, divide, encode_division
from fedsa_secure.data.pool import Pool, load_pool
from fedsa_secure.data.shards import Shard

__all__ = [
    "IGNORED",
    "Batch",
    "Division",
    "EncodedRows",
    "FederatedData",
    "Pool",
    "PromptForm",
    "Shard",
    "collate",
    "divide",
    "draw_rows",
    "encode",
    "encode_division",
    "encode_texts",
    "exact_match",
    "load_pool",
    "pad_prompts",
    "pad_token",
]
