"""The secret coins and noise of one turn: one client in one round. docs/privacy.md.

The server knows the run's seed, so nothing that privacy rests on may come from it. A turn has 32
bytes of the operating system; every block of coins or noise is the AES-256-CTR stream of a key that
HKDF derives from them for this one use. A turn that is done again gets new bytes: were the same
noise added to two different sums, their difference would show the data bare.

Assumption: the operating system's generator is good, and the block of a label cannot be told from
uniform bits (``fedsa_secure.csprng``). The guarantee that rests on it is therefore computational.
"""

import math
import os
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from fedsa_secure.csprng import BLOCK, Block, Keystream, derive_key
from fedsa_secure.errors import PrivacyError
from fedsa_secure.privacy.skellam import SkellamTable

_WORD = 2**32
_CONTEXT = b"fedsa_secure dp "

LARGEST_GAUSSIAN = float(-ndtri(2.0**-54))
"""No draw of ``TurnSecret.gaussian`` has a larger magnitude: about 8.29."""


class TurnSecret:
    """Secret coins and noise of one client's turn. Every block is drawn once.

    A label names one block of one kind; a second use of it is refused. The object can be neither
    pickled nor copied: a copy would not know which blocks are used.

    Args:
        secret: 32 bytes; use ``fresh`` to make them.
        private: whether nobody but the client can know the bytes.
    """

    __slots__ = ("_private", "_secret", "_used")

    def __init__(self, secret: bytes, private: bool) -> None:
        if len(secret) != 32:
            raise ValueError("the secret of a turn has 32 bytes")
        self._secret = secret
        self._private = private
        self._used: set[bytes] = set()

    @classmethod
    def fresh(cls) -> "TurnSecret":
        """A new secret from the operating system's generator."""
        return cls(os.urandom(32), private=True)

    @classmethod
    def for_tests(cls, seed: int, client: int, round_number: int) -> "TurnSecret":
        """A secret that can be made again, for tests only: whoever knows the seed can remove it.

        Args:
            seed: of the test, from 0 to 2⁶³ − 1.
            client: number of the client.
            round_number: number of the round.
        """
        turn = b"".join(number.to_bytes(8, "little") for number in (seed, client, round_number))
        return cls(derive_key(turn, b"", _CONTEXT + b"test secret"), private=False)

    @property
    def private(self) -> bool:
        """False if the secret came from a seed: a run with such a turn promises nothing."""
        return self._private

    @property
    def id(self) -> str:
        """The public name of this turn's noise in ledgers: 32 hex digits, no hint of the secret."""
        return derive_key(self._secret, b"", _CONTEXT + b"id")[:16].hex()

    def gaussian(self, label: str, count: int) -> NDArray[np.float64]:
        """Standard normal noise, from 53-bit uniforms through the inverse distribution function.

        A uniform is an odd multiple of 2⁻⁵⁴ in (0, ½), with a sign: no draw is infinite, and small
        probabilities are as fine on the right as on the left. The distance to the ideal normal
        law, in which a draw may have any real value, is not in the claimed ε.

        Args:
            label: names the block.
            count: how many values.

        Returns:
            Independent draws, none beyond ``LARGEST_GAUSSIAN``. [count]

        Raises:
            PrivacyError: if the label was used for noise before.
        """
        draws = np.empty(count)
        for part, words in self._pairs(b"gaussian", label, count):
            centred = (words.view("<i8") >> 11) + 0.5  # exact: 53 bits
            draws[part] = np.copysign(ndtri(np.abs(centred) * 2.0**-53), centred)
        return draws

    def coins(self, label: str, count: int, rate: float) -> NDArray[np.bool_]:
        """Independent coins.

        Args:
            label: names the block.
            count: how many coins.
            rate: probability of True; ``representable_rate(rate)`` is used.

        Returns:
            The coins. [count]

        Raises:
            PrivacyError: if the label was used for coins before.
            ValueError: if the rate is not in (0, 1].
        """
        last = _threshold(rate) - 1  # 2³² itself does not fit into a word
        return self._words(b"coins", label, count) <= np.uint32(last)

    def key(self, label: str) -> bytes:
        """A key of 32 bytes, for a stream of secret bits that is made elsewhere.

        Args:
            label: names the purpose.

        Raises:
            PrivacyError: if the label was used for a key before.
        """
        return self._key(b"key", label)

    def discrete(self, label: str, table: SkellamTable, count: int) -> NDArray[np.int64]:
        """Integer noise of the Skellam distribution.

        Args:
            label: names the block.
            table: of the noise's variance.
            count: how many values.

        Returns:
            Independent draws, none beyond ``table.largest``. [count]

        Raises:
            PrivacyError: if the label was used for integer noise before.
        """
        return table.draw(self._words(b"discrete", label, 4 * count))

    def _key(self, purpose: bytes, label: str) -> bytes:
        name = purpose + b" " + label.encode()
        if name in self._used:
            raise PrivacyError(
                f"noise {label!r}",
                "this block was drawn before, and noise may not be used twice",
                "give every draw its own label, and a repeated turn a fresh TurnSecret",
            )
        self._used.add(name)
        return derive_key(self._secret, b"", _CONTEXT + name)

    def _words(self, purpose: bytes, label: str, count: int) -> NDArray[np.uint32]:
        stream, block = Keystream(self._key(purpose, label)), Block()
        words = np.empty(count, dtype="<u4")
        for first in range(0, count, BLOCK):
            part = words[first : first + BLOCK]
            part[:] = stream.words(len(part), block)
        return words

    def _pairs(
        self, purpose: bytes, label: str, count: int
    ) -> Iterator[tuple[slice, NDArray[np.uint32]]]:
        """Two words for each of ``count`` values, a block at a time: (which values, words)."""
        stream, block = Keystream(self._key(purpose, label)), Block()
        for first in range(0, count, BLOCK // 2):
            end = min(first + BLOCK // 2, count)
            yield slice(first, end), stream.words(2 * (end - first), block)

    def __repr__(self) -> str:
        return f"TurnSecret(id={self.id}, private={self._private})"

    def __reduce__(self) -> NoReturn:
        raise PrivacyError(
            "a turn's secret",
            "it may be neither stored nor copied, or its noise could be used twice",
            "store the finished update instead; a turn that is done again takes TurnSecret.fresh()",
        )


def representable_rate(rate: float) -> float:
    """The probability that ``TurnSecret.coins`` uses: the next multiple of 2⁻³², never below.

    Args:
        rate: what was asked for, in (0, 1].

    Raises:
        ValueError: if the rate is not in (0, 1].
    """
    return _threshold(rate) / _WORD


def _threshold(rate: float) -> int:
    if not 0 < rate <= 1:
        raise ValueError(f"a coin's probability has to be above 0 and at most 1, not {rate}")
    return math.ceil(rate * _WORD)  # the product is exact
