"""Flower's SecAgg+ on the same vectors, by its own functions. Needs the extra ``flower``.

Its masks come from numpy's Mersenne Twister, seeded by folding the text of a key: 32 bits for a
client's own mask and at most 28 for a mask shared with a neighbour, as the text is base64. So its
times are those of masks that can be guessed.
"""

import importlib
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsa_secure.bench.timing import Task
from fedsa_secure.errors import MissingExtraError

CLIPPING, LEVELS, MODULUS, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0
SEED_BITS = 28
_EXAMPLES = 100
_SHARE_HEAD, _CHUNK = 4, 16
"""A share is an index, and as many bytes for every chunk of the padded secret."""


class FlowerSecAgg:
    """Flower's modules, imported when this is made.

    Raises:
        MissingExtraError: if ``flwr`` is not installed.
    """

    def __init__(self) -> None:
        os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
        try:
            self._client = _load("flwr.client.mod.secure_aggregation.secaggplus_mod")
            self._app = _load("flwr.app")
            self._common = _load("flwr.common")
            self._names = _load("flwr.common.secure_aggregation.secaggplus_constants").Key
            self._utils = _load("flwr.common.secure_aggregation.secaggplus_utils")
            self._arithmetic = _load("flwr.common.secure_aggregation.ndarrays_arithmetic")
            self._quantization = _load("flwr.common.secure_aggregation.quantization")
            self._shamir = _load("flwr.common.secure_aggregation.crypto.shamir")
            self._keys = _load("flwr.common.secure_aggregation.crypto.symmetric_encryption")
            self._curve = _load("flwr.supercore.primitives.asymmetric")
        except ImportError:
            raise MissingExtraError("flwr", "flower") from None
        self.name = f"Flower SecAgg+ {importlib.metadata.version('flwr')}"

    def masking(self, neighbours: int, threshold: int, vector: NDArray[np.float32]) -> Task:
        """A client's stage 2, with shares from its neighbours of the lengths that it expects."""
        state = self._new_client(0, neighbours + 1, threshold)
        state.rd_seed = os.urandom(32)
        seed_share = bytes(_share_bytes(32))
        key_share = bytes(_share_bytes(len(state.sk1)))
        peers, sealed = range(1, neighbours + 1), []
        state.public_keys_dict = {}
        for peer in peers:
            other = self._new_client(peer, neighbours + 1, threshold)
            state.public_keys_dict[peer] = (other.pk1, other.pk2)
            state.ss2_dict[peer] = self._shared_key(state.sk2, other.pk2)
            content = self._utils.share_keys_plaintext_concat(peer, 0, seed_share, key_share)
            sealed.append(self._keys.encrypt(state.ss2_dict[peer], content))
        key = self._names
        message = self._app.ConfigRecord(
            {key.CIPHERTEXT_LIST: sealed, key.SOURCE_LIST: list(peers)}
        )
        parameters = self._common.ndarrays_to_parameters([vector])
        collect = self._client._collect_masked_vectors
        return Task(lambda _: collect(state, message, _EXAMPLES, parameters))

    def unmasking(self, clients: int, threshold: int, values: int) -> Task:
        """The server's unmasking on the complete graph, with the last client dropped.

        The arithmetic of ``SecAggPlusWorkflow.unmask_stage``, between its messages.
        """
        *alive, gone = [self._new_client(number, clients, threshold) for number in range(clients)]
        secrets = [*(os.urandom(32) for _ in alive), gone.sk1]
        shares = [self._shamir.create_shares(each, threshold, clients)[:-1] for each in secrets]

        def run(_: object) -> None:
            *seeds, key = [self._shamir.combine_shares(each) for each in shares]
            keys = [self._shared_key(key, each.pk1) for each in alive]
            self._take_away([*seeds, *keys], values)

        return Task(run)

    def streams(self, masks: int, values: int) -> Task:
        """The part of the server's unmasking that grows with the vector."""
        return Task(lambda _: self._take_away([os.urandom(32)] * masks, values))

    def combining(self, clients: int, threshold: int) -> Task:
        """Rebuilding one seed from the shares of all clients but one."""
        shares = self._shamir.create_shares(os.urandom(32), threshold, clients)[:-1]
        return Task(lambda _: self._shamir.combine_shares(shares))

    def chunks_of_a_key(self) -> float:
        """How much more there is to combine for a client's key than for a seed."""
        return _chunks(len(self._new_client(0, 3, 2).sk1)) / _chunks(32)

    def _take_away(self, seeds: Sequence[bytes], values: int) -> None:
        total = [np.zeros(1, np.int64), np.zeros(values, np.int64)]
        shape = self._arithmetic.get_parameters_shape(total)
        for seed in seeds:
            mask = self._utils.pseudo_rand_gen(seed, MODULUS, shape)
            total = self._arithmetic.parameters_subtraction(total, mask)
        total = self._arithmetic.parameters_mod(total, MODULUS)
        self._quantization.dequantize(total, CLIPPING, LEVELS)

    def _new_client(self, number: int, shares: int, threshold: int) -> Any:
        key = self._names
        settings = {
            key.SAMPLE_NUMBER: shares,
            key.SHARE_NUMBER: shares,
            key.THRESHOLD: threshold,
            key.CLIPPING_RANGE: CLIPPING,
            key.TARGET_RANGE: LEVELS,
            key.MOD_RANGE: MODULUS,
            key.MAX_WEIGHT: MAX_WEIGHT,
        }
        state = self._client.SecAggPlusState()
        state.nid = number
        self._client._setup(state, self._app.ConfigRecord(settings))
        return state

    def _shared_key(self, private: bytes, public: bytes) -> Any:
        return self._keys.generate_shared_key(
            self._curve.bytes_to_private_key(private), self._curve.bytes_to_public_key(public)
        )


def _load(name: str) -> Any:
    """A module by its full name; some packages hide modules behind functions of the same name."""
    return importlib.import_module(name)


def _chunks(secret: int) -> int:
    """Chunks of a secret of so many bytes, which is always padded."""
    return secret // _CHUNK + 1


def _share_bytes(secret: int) -> int:
    return _SHARE_HEAD + _CHUNK * _chunks(secret)
