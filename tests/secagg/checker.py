"""An independent checker of the test vectors: docs/protocol.md in plain Python integers.

It shares no code with the package and uses no library of cryptography, so that what both agree on
is what the page says. It is slow, and not constant in time: for vectors only.

Run ``python tests/secagg/checker.py``: one line per file, exit status 1 if one does not hold.
"""

import functools
import hashlib
import hmac
import itertools
import json
import math
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

PROTOCOL = "fedsa-secagg/1"
VECTORS = Path(__file__).parent / "vectors" / "v1"

Json = dict[str, Any]


class MismatchError(Exception):
    """A vector is not what the page says."""


class RefusedError(Exception):
    """A party refuses what it was given; ``error`` names why, as the package's errors do."""

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


def require(condition: object, error: str) -> None:
    if not condition:
        raise RefusedError(error)


def same(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise MismatchError(f"{what}: {found!r} and not {expected!r}"[:300])


# --- RFC 5869, FIPS 197, RFC 7748, RFC 8032, RFC 8439 ---------------------------------------------


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    key = hmac.digest(salt or bytes(32), secret, "sha256")
    block, output = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        output += block
    return output[:length]


def _double(a: int) -> int:
    """Times x in the field of 2⁸ elements of AES."""
    return (a << 1) ^ (0x11B if a & 0x80 else 0)


def _sbox() -> bytes:
    table, p, q = [0x63] * 256, 1, 1
    while True:
        p ^= _double(p)  # p runs through the powers of 3, q through those of its inverse
        for shift in (1, 2, 4):
            q ^= q << shift & 0xFF
        q ^= 0x09 if q & 0x80 else 0
        turned = q * 0x0101
        mixed = q ^ turned >> 7 ^ turned >> 6 ^ turned >> 5 ^ turned >> 4
        table[p] = (mixed & 0xFF) ^ 0x63
        if p == 1:
            return bytes(table)


SBOX = _sbox()
_SHIFTED = [(index + 4 * (index % 4)) % 16 for index in range(16)]


@functools.lru_cache(maxsize=4096)
def aes_round_keys(key: bytes) -> tuple[bytes, ...]:
    words = [key[i : i + 4] for i in range(0, 32, 4)]
    constant = 1
    for i in range(8, 60):
        word = words[-1]
        if i % 8 == 0:
            word = bytes(SBOX[b] for b in word[1:] + word[:1])
            word = bytes([word[0] ^ constant]) + word[1:]
            constant = _double(constant)
        elif i % 8 == 4:
            word = bytes(SBOX[b] for b in word)
        words.append(_xor(word, words[-8]))
    return tuple(b"".join(words[i : i + 4]) for i in range(0, 60, 4))


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


@functools.lru_cache(maxsize=65536)
def aes256(key: bytes, block: bytes) -> bytes:
    first, *middle, last = aes_round_keys(key)
    state = _xor(block, first)
    for round_key in middle:
        s = [SBOX[state[i]] for i in _SHIFTED]
        mixed = []
        for column in range(0, 16, 4):
            a = s[column : column + 4]
            everything = a[0] ^ a[1] ^ a[2] ^ a[3]
            mixed += [a[i] ^ everything ^ _double(a[i] ^ a[(i + 1) % 4]) for i in range(4)]
        state = _xor(bytes(mixed), round_key)
    return _xor(bytes(SBOX[state[i]] for i in _SHIFTED), last)


def ctr_words(key: bytes, first_block: int = 0) -> Iterable[int]:
    """The words of a stream from a block on, without an end."""
    if len(key) != 32:
        raise ValueError("a key of another length")
    for counter in itertools.count(first_block):
        yield from struct.unpack("<4I", aes256(key, counter.to_bytes(16, "big")))


def stream(key: bytes, count: int, first_block: int = 0) -> list[int]:
    return list(itertools.islice(ctr_words(key, first_block), count))


P = 2**255 - 19


@functools.lru_cache(maxsize=65536)
def x25519(scalar: bytes, point: bytes) -> bytes:
    k = int.from_bytes(scalar, "little") & ~7 & ((1 << 254) - 1) | 1 << 254
    x1 = int.from_bytes(point, "little") & ((1 << 255) - 1)
    x2, z2, x3, z3, swapped = 1, 0, x1, 1, 0
    for t in range(254, -1, -1):
        bit = k >> t & 1
        if swapped != bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swapped = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % P, b * b % P, d * a % P, c * b % P
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % P, x1 * (da - cb) ** 2 % P
        x2, z2 = aa * bb % P, e * (aa + 121665 * e) % P
    if swapped:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P - 2, P) % P).to_bytes(32, "little")


def public(secret: bytes) -> bytes:
    return x25519(secret, (9).to_bytes(32, "little"))


def exchange(secret: bytes, peer: bytes) -> bytes:
    shared = x25519(secret, peer)
    require(any(shared), "KeySubstitution")  # RFC 7748 §6.1: a point of small order
    return shared


Q = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
Point = tuple[int, int, int, int]


def _add(a: Point, b: Point) -> Point:
    e, f = (a[1] - a[0]) * (b[1] - b[0]) % P, (a[1] + a[0]) * (b[1] + b[0]) % P
    g, h = 2 * a[3] * b[3] * D % P, 2 * a[2] * b[2] % P
    e, i, j, k = f - e, h - g, h + g, f + e
    return e * i % P, j * k % P, i * j % P, e * k % P


def _times(scalar: int, point: Point) -> Point:
    result = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            result = _add(result, point)
        point, scalar = _add(point, point), scalar >> 1
    return result


def _compress(point: Point) -> bytes:
    inverse = pow(point[2], P - 2, P)
    x, y = point[0] * inverse % P, point[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _decompress(data: bytes) -> Point | None:
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & ((1 << 255) - 1)
    if y >= P:
        return None
    xx = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(xx, (P + 3) // 8, P)
    if (x * x - xx) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    if (x * x - xx) % P or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = P - x
    return x, y, 1, x * y % P


_BASE = _decompress((4 * pow(5, P - 2, P) % P).to_bytes(32, "little"))
assert _BASE is not None
_BASE_DOUBLED = list(
    itertools.accumulate(range(255), lambda point, _: _add(point, point), initial=_BASE)
)


def _times_base(scalar: int) -> Point:
    result = (0, 1, 1, 0)
    for bit in range(scalar.bit_length()):
        if scalar >> bit & 1:
            result = _add(result, _BASE_DOUBLED[bit])
    return result


def _sha512(*parts: bytes) -> int:
    return int.from_bytes(hashlib.sha512(b"".join(parts)).digest(), "little")


@functools.lru_cache(maxsize=4096)
def _ed25519_key(seed: bytes) -> tuple[int, bytes, bytes]:
    digest = hashlib.sha512(seed).digest()
    scalar = int.from_bytes(digest[:32], "little") & ~7 & ((1 << 254) - 1) | 1 << 254
    return scalar, digest[32:], _compress(_times_base(scalar))


def ed25519_public(seed: bytes) -> bytes:
    return _ed25519_key(seed)[2]


@functools.lru_cache(maxsize=65536)
def ed25519_sign(seed: bytes, message: bytes) -> bytes:
    scalar, prefix, key = _ed25519_key(seed)
    r = _sha512(prefix, message) % Q
    point = _compress(_times_base(r))
    s = (r + _sha512(point, key, message) * scalar) % Q
    return point + s.to_bytes(32, "little")


@functools.lru_cache(maxsize=65536)
def ed25519_verify(key: bytes, signature: bytes, message: bytes) -> bool:
    """[S]B = R + [k]A, without a cofactor, R compared as bytes, and S below the order."""
    point, s = _decompress(key), int.from_bytes(signature[32:], "little")
    if point is None or len(signature) != 64 or s >= Q:
        return False
    x, y, z, t = point
    k = _sha512(signature[:32], key, message) % Q
    return _compress(_add(_times_base(s), _times(k, (-x, y, z, -t)))) == signature[:32]


def _quarter(s: list[int], a: int, b: int, c: int, d: int) -> None:
    for into, other, third, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        s[into] = (s[into] + s[other]) & 0xFFFFFFFF
        value = s[third] ^ s[into]
        s[third] = (value << turn | value >> 32 - turn) & 0xFFFFFFFF


@functools.lru_cache(maxsize=65536)
def chacha20_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter]
    start += struct.unpack("<3I", nonce)
    state = list(start)
    for _ in range(10):
        for i in range(4):
            _quarter(state, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            _quarter(state, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return struct.pack("<16I", *((a + b) & 0xFFFFFFFF for a, b in zip(start, state, strict=True)))


def chacha20_words(key: bytes, first_block: int = 0) -> Iterable[int]:
    """The words of a stream of masks: the nonce is zero, and after the last counter none follow."""
    if len(key) != 32:
        raise ValueError("a key of another length")
    for counter in range(first_block, 2**32):
        yield from struct.unpack("<16I", chacha20_block(key, counter, bytes(12)))
    raise ValueError("a stream of 2³² blocks was used up")


def poly1305(key: bytes, message: bytes) -> bytes:
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    value = 0
    for i in range(0, len(message), 16):
        value = (value + int.from_bytes(message[i : i + 16] + b"\x01", "little")) * r
        value %= 2**130 - 5
    return ((value + int.from_bytes(key[16:], "little")) % 2**128).to_bytes(16, "little")


def _chacha20(key: bytes, nonce: bytes, content: bytes) -> bytes:
    blocks = [chacha20_block(key, 1 + i, nonce) for i in range(-(-len(content) // 64))]
    return _xor(content, b"".join(blocks)[: len(content)])


def _tag(key: bytes, nonce: bytes, ciphertext: bytes, data: bytes) -> bytes:
    padded = b"".join(part + bytes(-len(part) % 16) for part in (data, ciphertext))
    lengths = struct.pack("<QQ", len(data), len(ciphertext))
    return poly1305(chacha20_block(key, 0, nonce)[:32], padded + lengths)


@functools.lru_cache(maxsize=65536)
def aead_seal(key: bytes, nonce: bytes, content: bytes, data: bytes) -> bytes:
    ciphertext = _chacha20(key, nonce, content)
    return ciphertext + _tag(key, nonce, ciphertext, data)


@functools.lru_cache(maxsize=65536)
def aead_open(key: bytes, nonce: bytes, sealed: bytes, data: bytes) -> bytes:
    ciphertext, tag = sealed[:-16], sealed[-16:]
    require(_tag(key, nonce, ciphertext, data) == tag, "BadShare")
    return _chacha20(key, nonce, ciphertext)


# --- §3 Hashes, keys ------------------------------------------------------------------------------

Part = bytes | int | Sequence[int]


def frame(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _part(part: Part) -> bytes:
    if isinstance(part, bytes):
        return frame(part)
    numbers = [part] if isinstance(part, int) else part
    return frame(b"".join(struct.pack("<Q", number) for number in numbers))


def labelled(label: str, *parts: Part) -> bytes:
    return frame(f"{PROTOCOL} {label}".encode()) + b"".join(map(_part, parts))


def h(label: str, *parts: Part) -> bytes:
    return hashlib.sha256(labelled(label, *parts)).digest()


def kdf(secret: bytes, salt: bytes, label: str, *parts: Part) -> bytes:
    return hkdf(secret, salt, labelled(label, *parts))


def read_roster(given: Json) -> dict[int, bytes]:
    return {int(client): bytes.fromhex(key) for client, key in given["roster"].items()}


def roster_hash(roster: dict[int, bytes]) -> bytes:
    return h("roster", *(part for client in sorted(roster) for part in (client, roster[client])))


AES, CHACHA20 = "aes-256-ctr", "chacha20"
LABELS = {AES: "", CHACHA20: " chacha20"}


@dataclass(frozen=True)
class Terms:
    """§2."""

    roster: dict[int, bytes]
    n: int
    c: int
    t: int
    m: int
    k: int
    t_k: int
    size: int
    rounds: int
    consistency: bool
    application: bytes
    mask_generator: str

    @classmethod
    def read(cls, given: Json) -> "Terms":
        names = ("n", "c", "t", "m", "k", "t_k", "size", "rounds")
        values = {name: given[name] for name in names}
        if type(given["consistency"]) is not bool:
            raise MismatchError("consistency is true or false")
        terms = cls(
            roster=read_roster(given),
            consistency=given["consistency"],
            application=bytes.fromhex(given["application"]),
            mask_generator=given.get("mask_generator", AES),
            **values,
        )
        if terms.mask_generator not in (AES, CHACHA20) or given.get("mask_generator") == AES:
            raise MismatchError("AES-256-CTR is not named, and ChaCha20 is the only other one")
        sound = 2 * terms.t > terms.n + terms.c and terms.t <= terms.n and terms.n >= 3
        if not sound or terms.m < max(terms.t, terms.c + 2, 3):
            raise MismatchError("thresholds that §2 does not allow")
        return terms

    @functools.cached_property
    def hash(self) -> bytes:
        numbers = (self.n, self.c, self.t, self.m, self.k, self.t_k, self.size, self.rounds)
        parts = [roster_hash(self.roster), *numbers, int(self.consistency), self.application]
        if self.mask_generator != AES:
            parts.append(self.mask_generator.encode())
        return h("terms", *parts)


Step = tuple[bytes, int, int]
"""sid, round, attempt."""


def nonce_commitment(terms_hash: bytes, client: int, nonce: bytes) -> bytes:
    return h("nonce", terms_hash, client, nonce)


def session_id(terms_hash: bytes, nonces: dict[int, bytes]) -> bytes:
    parts = (part for client in sorted(nonces) for part in (client, nonces[client]))
    return h("session", terms_hash, *parts)


def seed_commitment(step: Step, client: int, b: bytes) -> bytes:
    return h("seed", *step, client, b)


def attempt_context(step: Step, terms_hash: bytes, model: bytes, members: Sequence[int]) -> bytes:
    return h("context", *step, terms_hash, model, members)


def share_key(secret: bytes, peer: bytes, step: Step, u: int, v: int) -> bytes:
    sid, number, attempt = step
    return kdf(exchange(secret, peer), sid, "share", number, attempt, u, v)


def pairwise_key(
    secret: bytes, peer: bytes, sid: bytes, context: bytes, a: int, b: int, generator: str
) -> bytes:
    label = "pairwise mask" + LABELS[generator]
    return kdf(exchange(secret, peer), sid, label, context, min(a, b), max(a, b))


def self_key(b: bytes, sid: bytes, context: bytes, client: int, generator: str) -> bytes:
    return kdf(b, sid, "self mask" + LABELS[generator], context, client)


def seal(key: bytes, nonce: bytes, content: bytes, step: Step, u: int, v: int) -> bytes:
    return nonce + aead_seal(key, nonce, content, h("sealed", *step, u, v))


def open_sealed(key: bytes, sealed: bytes, step: Step, u: int, v: int) -> bytes:
    return aead_open(key, sealed[:12], sealed[12:], h("sealed", *step, u, v))


# --- §4 Secret sharing ----------------------------------------------------------------------------


def element(value: bytes) -> int:
    number = int.from_bytes(value, "little")
    require(len(value) == 32 and number < P, "BadShare")
    return number


def share(secret: bytes, coefficients: Sequence[bytes], holder: int) -> bytes:
    """The value at holder + 1 of the polynomial; coefficients from degree 1 up."""
    polynomial = [element(secret), *map(element, coefficients)]
    value = sum(a * pow(holder + 1, degree, P) for degree, a in enumerate(polynomial)) % P
    return value.to_bytes(32, "little")


def rebuild(shares: dict[int, bytes], needed: int) -> bytes:
    require(len(shares) >= needed, "TooFewClients")
    chosen = sorted(shares)[:needed]
    total = 0
    for holder in chosen:
        weight = Fraction(1)
        for other in chosen:
            if other != holder:
                weight *= Fraction(other + 1, other - holder)
        inverse = pow(weight.denominator, P - 2, P)
        total += element(shares[holder]) * weight.numerator * inverse
    return (total % P).to_bytes(32, "little")


# --- §2, §5 Thresholds and neighbours -------------------------------------------------------------


def thresholds(n: int, rounds: int) -> Json:
    c = max(1, (n - 1) // 3)
    t = (n + c) // 2 + 1
    k, t_k = sparse(n, c, rounds) if n > 100 else (n - 1, t)
    if k == n - 1:
        t_k = t
    return {"n": n, "c": c, "t": t, "m": max(t, c + 2, 3), "k": k, "t_k": t_k}


def _tail(population: int, marked: int, drawn: int, least: int) -> Fraction:
    """The probability of at least ``least`` marked ones among those drawn."""
    ways = sum(
        math.comb(marked, hits) * math.comb(population - marked, drawn - hits)
        for hits in range(max(least, 0), min(drawn, marked) + 1)
    )
    return Fraction(ways, math.comb(population, drawn))


@functools.lru_cache(maxsize=1024)
def sparse(n: int, c: int, rounds: int) -> tuple[int, int]:
    limit = Fraction(1, 2**40 * rounds * 64)
    for k in range(2, n - 1, 2):
        for t_k in range(k // 2 + 1, k + 2):
            if n * _tail(n, c, k // 2, t_k - 1 - k // 2) > limit:
                continue
            # The smallest private t_k is also the most correct one. A survivor holds a share of its
            # own, one that dropped out does not.
            d = n // 10
            lost = (n - d) * _tail(n - 1, d, k, k + 2 - t_k) + d * _tail(
                n - 1, d - 1, k, k + 1 - t_k
            )
            if lost <= Fraction(1, 2**20):
                return k, t_k
            break
    return n - 1, 0


def circle(cohort: Sequence[int], seed: bytes) -> list[int]:
    words, order = ctr_words(seed), list(cohort)
    for i in range(len(order) - 1, 0, -1):
        bound = 2**32 // (i + 1) * (i + 1)
        word = next(word for word in words if word < bound)
        order[i], order[word % (i + 1)] = order[word % (i + 1)], order[i]
    return order


def neighbours(client: int, cohort: Sequence[int], terms: Terms, step: Step) -> set[int]:
    if terms.k == terms.n - 1:
        return set(cohort) - {client}
    order = circle(cohort, kdf(step[0], b"", "graph", step[1]))
    return around(client, order, terms.k)


def around(client: int, order: Sequence[int], k: int) -> set[int]:
    place = order.index(client)
    return {order[(place + d) % len(order)] for d in range(-(k // 2), k // 2 + 1)} - {client}


# --- §6 Messages ----------------------------------------------------------------------------------


def pack(value: object) -> bytes:
    """MessagePack with the shortest form of everything."""
    if isinstance(value, int):
        if value < 0x80:
            return bytes([value])
        for code, limit, form in ((0xCC, 2**8, ">B"), (0xCD, 2**16, ">H"), (0xCE, 2**32, ">I")):
            if value < limit:
                return bytes([code]) + struct.pack(form, value)
        return b"\xcf" + struct.pack(">Q", value)
    if isinstance(value, bytes):
        for code, limit, form in ((0xC4, 2**8, ">B"), (0xC5, 2**16, ">H"), (0xC6, 2**32, ">I")):
            if len(value) < limit:
                return bytes([code]) + struct.pack(form, len(value)) + value
    assert isinstance(value, list | tuple)
    count = len(value)
    head = bytes([0x90 | count]) if count < 16 else b"\xdc" + struct.pack(">H", count)
    return head + b"".join(map(pack, value))


_LENGTHS_OF = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xC4: 1, 0xC5: 2, 0xC6: 4, 0xDC: 2, 0xDD: 4}


def unpack(data: bytes) -> object:
    value, end = _unpack(data, 0, 4)
    require(end == len(data) and pack(value) == data, "MalformedMessage")
    return value


def _unpack(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    require(at < len(data) and depth, "MalformedMessage")
    code, at = data[at], at + 1
    if code < 0x80:
        return code, at
    if code & 0xF0 == 0x90:
        return _unpack_array(data, at, code & 0x0F, depth)
    require(code in _LENGTHS_OF, "MalformedMessage")
    width = _LENGTHS_OF[code]
    require(at + width <= len(data), "MalformedMessage")
    number, at = int.from_bytes(data[at : at + width], "big"), at + width
    if code in (0xCC, 0xCD, 0xCE, 0xCF):
        return number, at
    require(at + number <= len(data), "MalformedMessage")  # an item takes a byte at least
    if code in (0xDC, 0xDD):
        return _unpack_array(data, at, number, depth)
    return data[at : at + number], at + number


def _unpack_array(data: bytes, at: int, count: int, depth: int) -> tuple[list[Any], int]:
    values = []
    for _ in range(count):
        value, at = _unpack(data, at, depth - 1)
        values.append(value)
    return values, at


Test = Callable[[Any], bool]


def _number(value: object) -> bool:
    return isinstance(value, int) and value < 2**32


def _bytes_of(length: int) -> Test:
    return lambda value: isinstance(value, bytes) and len(value) == length


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _pairs_of(length: int) -> Test:
    test = _bytes_of(length)
    return _list_of(lambda v: isinstance(v, list) and len(v) == 2 and _number(v[0]) and test(v[1]))


_HASH = _bytes_of(32)
_MESSAGES = _list_of(lambda value: isinstance(value, bytes))
_STEP = {"sid": _HASH, "round": _number, "attempt": _number}
_CLIENT = {"client": _number}

FIELDS: dict[int, tuple[str, dict[str, Test]]] = {
    1: ("commit", {"terms": _HASH, **_CLIENT, "commitment": _HASH}),
    2: ("open", {"terms": _HASH, **_CLIENT, "nonce": _HASH}),
    3: (
        "advertise",
        {**_STEP, **_CLIENT, "terms": _HASH, "c": _HASH, "s": _HASH, "commitment": _HASH},
    ),
    4: ("shares", {**_STEP, **_CLIENT, "sealed": _pairs_of(92)}),
    5: ("masked input", {**_STEP, **_CLIENT, "context": _HASH}),
    6: ("agreement", {**_STEP, **_CLIENT, "context": _HASH, "survivors": _HASH}),
    7: ("reveal", {**_STEP, **_CLIENT, "b": _pairs_of(32), "s": _pairs_of(32)}),
    16: ("commitments", {"terms": _HASH, "messages": _MESSAGES}),
    17: ("opened", {"terms": _HASH, "messages": _MESSAGES}),
    18: ("invite", _STEP),
    19: ("advertised", {**_STEP, "messages": _MESSAGES}),
    20: ("delivery", {**_STEP, "members": _list_of(_number), "sealed": _pairs_of(92)}),
    21: ("survivors", {**_STEP, "survivors": _list_of(_number), "dropped": _list_of(_number)}),
    22: ("agreements", {**_STEP, "messages": _MESSAGES}),
}
KINDS = {name: kind for kind, (name, _) in FIELDS.items()}


def header(kind: str, *values: object) -> bytes:
    return pack([KINDS[kind], *values])


def read_header(data: bytes, kinds: range) -> Json:
    values = unpack(data)
    require(isinstance(values, list) and values, "MalformedMessage")
    assert isinstance(values, list)
    kind, *rest = values
    require(isinstance(kind, int) and kind in kinds and kind in FIELDS, "MalformedMessage")
    name, fields = FIELDS[kind]
    require(len(rest) == len(fields), "MalformedMessage")
    for value, test in zip(rest, fields.values(), strict=True):
        require(test(value), "MalformedMessage")
    return {"kind": name, **dict(zip(fields, rest, strict=True))}


def to_sign(before: bytes) -> bytes:
    return labelled("message", hashlib.sha256(before).digest())


def signed(head: bytes, seed: bytes, payload: bytes = b"") -> bytes:
    before = struct.pack("<II", len(head), len(payload)) + payload + head
    return before + ed25519_sign(seed, to_sign(before))


def read_client(data: bytes, terms: Terms) -> tuple[Json, bytes]:
    """A client's message and its payload; the signature is checked by ``check_signature``."""
    longest = 512 + 128 * (terms.k + 1)
    require(len(data) <= 8 + 4 * terms.size + longest + 64, "OversizedMessage")
    require(len(data) >= 8 + 64, "MalformedMessage")
    head, body = struct.unpack("<II", data[:8])
    require(head <= longest, "OversizedMessage")
    require(8 + body + head + 64 == len(data), "MalformedMessage")
    message = read_header(data[8 + body : 8 + body + head], range(1, 8))
    expected = 4 * terms.size if message["kind"] == "masked input" else 0
    require(body == expected, "MalformedMessage")
    return message, data[8 : 8 + body]


def read_server(data: bytes, terms: Terms) -> Json:
    longest = 512 + 512 * max(terms.n, len(terms.roster))
    require(len(data) <= longest, "OversizedMessage")
    return read_header(data, range(16, 23))


def check_signature(data: bytes, client: int, terms: Terms) -> None:
    require(client in terms.roster, "UnknownClient")
    require(ed25519_verify(terms.roster[client], data[-64:], to_sign(data[:-64])), "BadSignature")


def ascending(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


def read_all(kind: str, raw: Sequence[bytes], terms: Terms, fixed: Json) -> list[Json]:
    """Signed messages inside one of the server; what they have to agree with is ``fixed``."""
    found = []
    for data in raw:
        message, _ = read_client(data, terms)
        require(message["kind"] == kind, "MalformedMessage")
        require(all(message[name] == value for name, value in fixed.items()), "WrongTerms")
        check_signature(data, message["client"], terms)
        found.append(message)
    return found


# --- §10 Numbers ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def grid(n: int, bound: Fraction) -> tuple[int, int, int]:
    """q, L, and the exponent of the step."""
    q = max(bits for bits in range(33) if n * (2**bits - 1) < 2**32)
    if q < 2 or bound <= 0:
        raise ValueError("no grid")
    levels, exponent = 2 ** (q - 1) - 1, -1200
    while levels * Fraction(2) ** exponent < bound:
        exponent += 1
    return q, levels, exponent


def encode(
    values: Sequence[Fraction], n: int, bound: Fraction, key: bytes
) -> tuple[list[int], int]:
    """The values on the grid, and how many were clipped."""
    _, levels, exponent = grid(n, bound)
    encoded, clipped = [], 0
    for value, coin in zip(values, ctr_words(key), strict=False):
        scaled = value / Fraction(2) ** exponent
        clipped += abs(scaled) > levels
        scaled = max(-levels, min(levels, scaled))
        floor = math.floor(scaled)
        encoded.append(levels + floor + (coin < (scaled - floor) * 2**32))
    return encoded, clipped


def decode(total: Sequence[int], n: int, bound: Fraction, survivors: int) -> list[Fraction]:
    """The sum of the values, exactly."""
    _, levels, exponent = grid(n, bound)
    return [(word - survivors * levels) * Fraction(2) ** exponent for word in total]


# --- §7, §8 A client ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Secrets:
    """What a client drew at random, and its vector."""

    identity: bytes
    nonce: bytes
    c: bytes
    s: bytes
    b: bytes
    b_coefficients: list[bytes]
    s_coefficients: list[bytes]
    seal_nonces: dict[int, bytes]
    model: bytes
    vector: list[int]

    @classmethod
    def read(cls, given: Json) -> "Secrets":
        names = ("identity", "nonce", "c", "s", "b", "model")
        return cls(
            **{name: bytes.fromhex(given[name]) for name in names},
            b_coefficients=list(map(bytes.fromhex, given["b_coefficients"])),
            s_coefficients=list(map(bytes.fromhex, given["s_coefficients"])),
            seal_nonces={int(v): bytes.fromhex(x) for v, x in given["seal_nonces"].items()},
            vector=given["vector"],
        )


class Client:
    """Answers messages as §7 and §8 say, or refuses them."""

    def __init__(self, number: int, secrets: Secrets, terms: Terms, cohort: list[int]) -> None:
        self.number, self.secrets, self.terms, self.cohort = number, secrets, terms, cohort
        self.waits_for = "commitments"
        self.sid = b""
        self.step: Step = (b"", 0, 0)
        self.last: tuple[bytes, bytes | None] = (b"", None)

    def sign(self, kind: str, *values: object, payload: bytes = b"") -> bytes:
        return signed(header(kind, *values), self.secrets.identity, payload)

    def commit(self) -> bytes:
        commitment = nonce_commitment(self.terms.hash, self.number, self.secrets.nonce)
        return self.sign("commit", self.terms.hash, self.number, commitment)

    def receive(self, data: bytes) -> bytes | None:
        message = read_server(data, self.terms)
        if data == self.last[0]:
            return self.last[1]
        kind = message["kind"]
        if "terms" in message:
            require(kind == self.waits_for, "OutOfOrder")
            require(message["terms"] == self.terms.hash, "WrongTerms")
        else:
            self._check_attempt(message)
        handler = getattr(self, f"_{kind}")
        answer: bytes | None = handler(message)
        self.last = (data, answer)
        return answer

    def _check_attempt(self, message: Json) -> None:
        require(message["sid"] == self.sid, "WrongTerms")
        if message["kind"] == "invite":
            number, attempt = message["round"], message["attempt"]
            require(1 <= number <= self.terms.rounds and attempt < 16, "ReplayedRound")
            if number == self.step[1]:
                require(attempt > self.step[2], "ReplayedRound")
            return
        require(message["round"] == self.step[1], "OutOfOrder")
        require(message["attempt"] == self.step[2], "ReplayedRound")
        require(message["kind"] == self.waits_for, "OutOfOrder")

    def _commitments(self, message: Json) -> bytes:
        found = read_all("commit", message["messages"], self.terms, {"terms": self.terms.hash})
        require(ascending([each["client"] for each in found]), "MalformedMessage")
        self.commitments = {each["client"]: each["commitment"] for each in found}
        own = nonce_commitment(self.terms.hash, self.number, self.secrets.nonce)
        require(self.commitments.get(self.number) == own, "WrongOpening")
        self.waits_for = "opened"
        return self.sign("open", self.terms.hash, self.number, self.secrets.nonce)

    def _opened(self, message: Json) -> None:
        found = read_all("open", message["messages"], self.terms, {"terms": self.terms.hash})
        require([each["client"] for each in found] == sorted(self.commitments), "WrongOpening")
        for each in found:
            fits = nonce_commitment(self.terms.hash, each["client"], each["nonce"])
            require(fits == self.commitments[each["client"]], "WrongOpening")
        self.sid = session_id(self.terms.hash, {each["client"]: each["nonce"] for each in found})
        self.waits_for = "invite"

    def _invite(self, message: Json) -> bytes:
        require(self.number in self.cohort and len(self.cohort) == self.terms.n, "UnknownClient")
        self.step = (self.sid, message["round"], message["attempt"])
        self.near = neighbours(self.number, self.cohort, self.terms, self.step) | {self.number}
        self.waits_for = "advertised"
        return self.sign("advertise", *self._own_keys())

    def _own_keys(self) -> tuple[object, ...]:
        keys = public(self.secrets.c), public(self.secrets.s)
        commitment = seed_commitment(self.step, self.number, self.secrets.b)
        return (*self.step, self.number, self.terms.hash, *keys, commitment)

    def _fixed(self) -> Json:
        return dict(zip(("sid", "round", "attempt"), self.step, strict=True))

    def _advertised(self, message: Json) -> bytes:
        fixed = {**self._fixed(), "terms": self.terms.hash}
        found = read_all("advertise", message["messages"], self.terms, fixed)
        clients = [each["client"] for each in found]
        require(ascending(clients), "MalformedMessage")
        require(self.near.issuperset(clients), "UnknownClient")
        require(len(found) >= self.terms.t_k, "TooFewClients")
        keys = [key for each in found for key in (each["c"], each["s"])]
        require(len(set(keys)) == len(keys), "KeySubstitution")
        own = dict(zip(FIELDS[KINDS["advertise"]][1], self._own_keys(), strict=True))
        require({"kind": "advertise", **own} in found, "KeySubstitution")
        self.peers = {each["client"]: each for each in found}
        self.waits_for = "delivery"
        sealed = []
        for holder in sorted(self.peers.keys() - {self.number}):
            key = share_key(self.secrets.c, self.peers[holder]["c"], self.step, self.number, holder)
            nonce = self.secrets.seal_nonces[holder]
            content = self._share_for(holder)
            sealed.append((holder, seal(key, nonce, content, self.step, self.number, holder)))
        return self.sign("shares", *self.step, self.number, sealed)

    def _share_for(self, holder: int) -> bytes:
        own = self.secrets
        for coefficients in (own.b_coefficients, own.s_coefficients):
            same(len(coefficients), self.terms.t_k - 1, "the degree of a polynomial")
        of_b = share(own.b, own.b_coefficients, holder)
        return of_b + share(own.s, own.s_coefficients, holder)

    def _delivery(self, message: Json) -> bytes:
        members, own = message["members"], self.number
        require(ascending(members), "MalformedMessage")
        require(set(members) <= set(self.cohort) and own in members, "UnknownClient")
        require(len(members) >= self.terms.m, "TooFewClients")
        near = self.near & set(members)
        require(len(near) >= self.terms.t_k, "TooFewClients")
        require(near <= self.peers.keys(), "KeySubstitution")
        require([owner for owner, _ in message["sealed"]] == sorted(near - {own}), "BadShare")
        self.members, self.held = members, {own: self._share_for(own)}
        for owner, sealed in message["sealed"]:
            key = share_key(self.secrets.c, self.peers[owner]["c"], self.step, owner, own)
            self.held[owner] = open_sealed(key, sealed, self.step, owner, own)
        self.context = attempt_context(self.step, self.terms.hash, self.secrets.model, members)
        values = list(self.secrets.vector)
        same(len(values), self.terms.size, "the size of a vector")
        generator = self.terms.mask_generator
        add(values, self_key(self.secrets.b, self.sid, self.context, own, generator), 1, generator)
        for peer in near - {own}:
            key = pairwise_key(
                self.secrets.s, self.peers[peer]["s"], self.sid, self.context, own, peer, generator
            )
            add(values, key, 1 if peer > own else -1, generator)
        self.waits_for = "survivors"
        payload = struct.pack(f"<{len(values)}I", *values)
        return self.sign("masked input", *self.step, own, self.context, payload=payload)

    def _survivors(self, message: Json) -> bytes:
        survivors, dropped = message["survivors"], message["dropped"]
        require(ascending(survivors) and ascending(dropped), "MalformedMessage")
        require(not set(survivors) & set(dropped), "InvalidSurvivors")
        require(sorted(survivors + dropped) == self.members, "InvalidSurvivors")
        require(self.number in survivors, "InvalidSurvivors")
        require(len(survivors) >= self.terms.m, "TooFewClients")
        require(len(self.near & set(survivors)) >= self.terms.t_k, "TooFewClients")
        self.survivors = survivors
        if not self.terms.consistency:
            return self._reveal()
        self.waits_for = "agreements"
        signed_set = h("survivors", survivors)
        return self.sign("agreement", *self.step, self.number, self.context, signed_set)

    def _agreements(self, message: Json) -> bytes:
        found = read_all("agreement", message["messages"], self.terms, self._fixed())
        signers = [each["client"] for each in found]
        require(set(signers) <= set(self.members), "UnknownClient")
        for each in found:
            require(each["context"] == self.context, "ModelMismatch")
            require(each["survivors"] == h("survivors", self.survivors), "Equivocation")
        require(ascending(signers), "MalformedMessage")
        require(self.number in signers, "TooFewSignatures")
        require(len(signers) >= self.terms.t, "TooFewSignatures")
        return self._reveal()

    def _reveal(self) -> bytes:
        self.waits_for = "nothing"
        b, s = [], []
        for peer in sorted(self.near & set(self.members)):
            if peer in self.survivors:
                b.append((peer, self.held[peer][:32]))
            else:
                s.append((peer, self.held[peer][32:]))
        return self.sign("reveal", *self.step, self.number, b, s)


def add(values: list[int], key: bytes, sign: int, generator: str) -> None:
    """A stream onto a vector, modulo 2³²."""
    words = {AES: ctr_words, CHACHA20: chacha20_words}[generator](key)
    for place, word in enumerate(itertools.islice(words, len(values))):
        values[place] = (values[place] + sign * word) % 2**32


# --- §7, §8 The server ----------------------------------------------------------------------------

ORDER = ("commit", "open", "advertise", "shares", "masked input", "agreement", "reveal")


class Server:
    """Takes messages step by step; ``close`` gives what it sends to every client that took part."""

    def __init__(self, terms: Terms, cohort: list[int], document: Json) -> None:
        self.terms, self.cohort = terms, cohort
        self.number, self.attempt = document["round"], document["attempt"]
        self.model = bytes.fromhex(document["model"])
        self.collects, self.may_send = "commit", list(terms.roster)
        self.took: dict[int, Json] = {}
        self.raw: dict[int, bytes] = {}
        self.step: Step | None = None

    def take(self, data: bytes) -> None:
        message, payload = read_client(data, self.terms)
        kind, client = message["kind"], message["client"]
        if "terms" in message:
            require(message["terms"] == self.terms.hash, "WrongTerms")
        if "sid" in message:
            step = (message["sid"], message["round"], message["attempt"])
            require(step == self.step, "WrongTerms")
        if kind != self.collects and "sid" not in message:
            raise RefusedError("OutOfOrder")
        late = ORDER.index(kind) < ORDER.index(self.collects)
        require(kind == self.collects, "LateMessage" if late else "OutOfOrder")
        require(client in self.may_send, "UnknownClient")
        require(client not in self.took, "DuplicateMessage")
        check_signature(data, client, self.terms)
        check = getattr(self, f"_take_{kind}".replace(" ", "_"), None)
        if check:
            check(client, message)
        if payload:
            words = struct.unpack(f"<{self.terms.size}I", payload)
            self.total = [(a + b) % 2**32 for a, b in zip(self.total, words, strict=True)]
        self.took[client], self.raw[client] = message, data

    def _take_open(self, client: int, message: Json) -> None:
        fits = nonce_commitment(self.terms.hash, client, message["nonce"])
        require(self.commits[client]["commitment"] == fits, "WrongOpening")

    def _take_shares(self, client: int, message: Json) -> None:
        near = self._near(client) & self.keys.keys() - {client}
        require([holder for holder, _ in message["sealed"]] == sorted(near), "BadShare")

    def _take_masked_input(self, client: int, message: Json) -> None:
        require(message["context"] == self.context, "ModelMismatch")

    def _take_agreement(self, client: int, message: Json) -> None:
        require(message["context"] == self.context, "ModelMismatch")
        require(message["survivors"] == h("survivors", self.survivors), "InvalidSurvivors")

    def _take_reveal(self, client: int, message: Json) -> None:
        near, alive = self._near(client) & set(self.members), set(self.survivors)
        require([peer for peer, _ in message["b"]] == sorted(near & alive), "BadShare")
        require([peer for peer, _ in message["s"]] == sorted(near - alive), "BadShare")

    def _near(self, client: int) -> set[int]:
        assert self.step is not None
        return neighbours(client, self.cohort, self.terms, self.step) | {client}

    def close(self) -> dict[int, bytes]:
        """What goes to each client; nothing after the last step."""
        messages: dict[int, bytes] = getattr(self, f"_close_{self.collects}".replace(" ", "_"))()
        self.took, self.raw = {}, {}
        return messages

    def invite(self) -> dict[int, bytes]:
        assert self.step is not None
        self.collects, self.may_send = "advertise", self.cohort
        return dict.fromkeys(self.cohort, header("invite", *self.step))

    def _all(self, kind: str, fixed: Sequence[object], *more: object) -> dict[int, bytes]:
        return dict.fromkeys(sorted(self.took), header(kind, *fixed, *more))

    def _messages(self) -> list[bytes]:
        return [self.raw[client] for client in sorted(self.raw)]

    def _close_commit(self) -> dict[int, bytes]:
        require(len(self.took) >= self.terms.m, "TooFewClients")
        self.collects, self.may_send, self.commits = "open", sorted(self.took), self.took
        return self._all("commitments", [self.terms.hash], self._messages())

    def _close_open(self) -> dict[int, bytes]:
        require(self.took.keys() == self.commits.keys(), "WrongOpening")
        nonces = {client: message["nonce"] for client, message in self.took.items()}
        sid = session_id(self.terms.hash, nonces)
        self.step = (sid, self.number, self.attempt)
        return self._all("opened", [self.terms.hash], self._messages())

    def _close_advertise(self) -> dict[int, bytes]:
        require(len(self.took) >= self.terms.m, "TooFewClients")
        self.keys, messages = self.took, {}
        for client in sorted(self.keys):
            near = sorted(self._near(client) & self.keys.keys())
            shown = [self.raw[peer] for peer in near]
            messages[client] = header("advertised", *self._step(), shown)
        self.collects, self.may_send = "shares", sorted(self.keys)
        return messages

    def _step(self) -> Step:
        assert self.step is not None
        return self.step

    def _close_shares(self) -> dict[int, bytes]:
        require(len(self.took) >= self.terms.m, "TooFewClients")
        self.members, messages = sorted(self.took), {}
        sealed = {owner: dict(message["sealed"]) for owner, message in self.took.items()}
        for client in self.members:
            near = sorted(self._near(client) & set(self.members) - {client})
            held = [(owner, sealed[owner][client]) for owner in near]
            messages[client] = header("delivery", *self._step(), self.members, held)
        self.context = attempt_context(self._step(), self.terms.hash, self.model, self.members)
        self.total = [0] * self.terms.size
        self.collects, self.may_send = "masked input", self.members
        return messages

    def _close_masked_input(self) -> dict[int, bytes]:
        require(len(self.took) >= self.terms.m, "TooFewClients")
        self.survivors = sorted(self.took)
        dropped = sorted(set(self.members) - set(self.survivors))
        self.collects = "agreement" if self.terms.consistency else "reveal"
        self.may_send = self.survivors
        return self._all("survivors", self._step(), self.survivors, dropped)

    def _close_agreement(self) -> dict[int, bytes]:
        require(len(self.took) >= self.terms.t, "TooFewSignatures")
        self.collects = "reveal"
        return self._all("agreements", self._step(), self._messages())

    def _close_reveal(self) -> dict[int, bytes]:
        sid, generator = self._step()[0], self.terms.mask_generator
        for client in self.survivors:
            b = self._rebuild(client, "b")
            fits = seed_commitment(self._step(), client, b) == self.keys[client]["commitment"]
            require(fits, "WrongRebuiltKey")
            key = self_key(b, sid, self.context, client, generator)
            add(self.total, key, -1, generator)
        for client in sorted(set(self.members) - set(self.survivors)):
            peers = self._near(client) & set(self.survivors)
            if not peers:
                continue
            s = self._rebuild(client, "s")
            require(public(s) == self.keys[client]["s"], "WrongRebuiltKey")
            for peer in peers:
                theirs = self.keys[peer]["s"]
                key = pairwise_key(s, theirs, sid, self.context, client, peer, generator)
                add(self.total, key, -1 if client > peer else 1, generator)
        return {}

    def _rebuild(self, owner: int, secret: str) -> bytes:
        shares = {
            holder: dict(message[secret])[owner]
            for holder, message in self.took.items()
            if owner in dict(message[secret])
        }
        return rebuild(shares, self.terms.t_k)


# --- Whole rounds ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Who refused, at which message, and why. The server's last step is called ``sum``."""

    by: str
    step: str
    error: str


class Walk:
    """All messages of a round, in order, past every party that receives one.

    Args:
        document: a good round.
        changes: messages by kind and client that take the place of the good ones; null for one that
            never arrives. ``extra`` messages follow those of their kind.
        compare: whether what the parties answer has to be what the document holds.
    """

    def __init__(self, document: Json, changes: Json, extra: list[Json], compare: bool) -> None:
        self.messages, self.changes, self.extra = document["messages"], changes, extra
        self.compare, self.lost = compare, document["lost"]
        self.terms, self.cohort = Terms.read(document["terms"]), document["cohort"]
        self.clients = {}
        for name, given in document["clients"].items():
            secrets = Secrets.read(given)
            self.clients[int(name)] = Client(int(name), secrets, self.terms, self.cohort)
        self.server = Server(self.terms, self.cohort, document)

    def sent(self, kind: str, client: int) -> bytes | None:
        changed = self.changes.get(kind, {})
        found = self.messages.get(kind, {})
        if str(client) in changed:
            data = changed[str(client)]
        else:
            data = found if isinstance(found, str) else found.get(str(client))
        return None if data is None else self.written_out(data)

    def written_out(self, message: str) -> bytes:
        """Hex in which ``kind/client`` stands for a good message, as bytes in MessagePack."""
        parts = message.split(" ")
        return b"".join(self._good(part) if "/" in part else bytes.fromhex(part) for part in parts)

    def _good(self, name: str) -> bytes:
        kind, client = name.split("/")
        return pack(bytes.fromhex(self.messages[kind][client]))

    def run(self) -> Refusal | None:
        """The first refusal, if there is one."""
        answers: dict[int, bytes | None] = {k: c.commit() for k, c in self.clients.items()}
        try:
            while True:
                kind, self.at = self.server.collects, ("server", self.server.collects)
                self.collect(kind, answers)
                if kind == "reveal":
                    self.at = ("server", "sum")
                messages = self.server.close()
                if not messages:
                    return None
                answers = self.distribute(messages)
                if kind == "open":
                    answers = self.distribute(self.server.invite())
        except RefusedError as refused:
            return Refusal(*self.at, refused.error)

    def collect(self, kind: str, answers: dict[int, bytes | None]) -> None:
        if self.compare:
            given = set(map(int, self.messages.get(kind, {})))
            if not given <= answers.keys():
                raise MismatchError(f"{kind} of {given}, and {set(answers)} were asked")
            for client in answers.keys() - given:
                lost = self.lost.get(str(client), "") if kind == "masked input" else ""
                same(lost, bytes(answers[client] or b"").hex(), f"{kind} that was lost")
        for client in self.clients:
            data = self.sent(kind, client)
            if data is None:
                continue
            if self.compare:
                same(data, answers[client], f"{kind} of client {client}")
            self.server.take(data)
        for each in self.extra:
            if each["kind"] == kind:
                self.server.take(self.written_out(each["message"]))

    def distribute(self, messages: dict[int, bytes]) -> dict[int, bytes | None]:
        kind = FIELDS[_kind_of(next(iter(messages.values())))][0]
        answers = {}
        for client in sorted(messages):
            data = self.sent(kind, client)
            if self.compare:
                same(data, messages[client], f"{kind} for client {client}")
            if data is None:
                continue
            self.at = (f"client {client}", kind)
            answers[client] = self.clients[client].receive(data)
            for each in self.extra:
                if (each["kind"], each.get("client")) == (kind, client):
                    self.clients[client].receive(self.written_out(each["message"]))
        return answers


def _kind_of(data: bytes) -> int:
    """The second byte of a server's message: no kind is above 127."""
    return data[1]


def check_round(document: Json) -> int:
    walk = Walk(document, {}, [], compare=True)
    same({str(client) for client in walk.cohort}, set(document["clients"]), "the cohort")
    for name, given in document["clients"].items():
        key = ed25519_public(bytes.fromhex(given["identity"]))
        same(key, walk.terms.roster[int(name)], f"the identity of client {name}")
        same(given["model"], document["model"], f"the model of client {name}")
        near = set(map(int, given["seal_nonces"]))
        same(near, set(walk.cohort) - {int(name)}, f"who client {name} seals for")
    if refusal := walk.run():
        raise MismatchError(f"refused: {refusal}")
    server = walk.server
    same(document["messages"].keys(), set(_kinds(walk.terms)), "the kinds of messages")
    same(walk.terms.hash.hex(), document["terms_hash"], "terms hash")
    same(set(map(int, walk.lost)), set(walk.cohort) - set(document["survivors"]), "who was lost")
    same(server._step()[0].hex(), document["sid"], "sid")
    same(server.context.hex(), document["context"], "context")
    same(server.members, document["members"], "members")
    same(server.survivors, document["survivors"], "survivors")
    same(server.total, document["sum"], "sum")
    vectors = [walk.clients[client].secrets.vector for client in server.survivors]
    same(server.total, [sum(values) % 2**32 for values in zip(*vectors, strict=True)], "plain sum")
    return len(walk.cohort)


def _kinds(terms: Terms) -> list[str]:
    agreeing = {"agreement", "agreements"}
    return [name for name in KINDS if terms.consistency or name not in agreeing]


def check_refused_rounds(document: Json) -> int:
    base = json.loads((VECTORS / document["base"]).read_bytes())
    for case in document["cases"]:
        found = Walk(base, case["replace"], case["extra"], compare=False).run()
        same(found, Refusal(**case["refused"]), case["description"])
    return len(document["cases"])


def check_refused_messages(document: Json) -> int:
    """A client's message is read and its signature checked; a server's is read."""
    terms = Terms.read(document["terms"])
    for case in document["cases"]:
        data = _filled(case["message"])
        same(_refusal(case["from"], data, terms), case["error"], case["description"])
    return len(document["cases"])


def _filled(message: str | Json) -> bytes:
    """Hex, or for long messages some hex that is repeated."""
    if isinstance(message, str):
        return bytes.fromhex(message)
    return bytes.fromhex(message["begin"]) + bytes.fromhex(message["repeat"]) * message["times"]


def _refusal(sender: str, data: bytes, terms: Terms) -> str | None:
    try:
        if sender == "server":
            read_server(data, terms)
        else:
            message, _ = read_client(data, terms)
            check_signature(data, message["client"], terms)
    except RefusedError as refused:
        return refused.error
    return None


# --- Functions ------------------------------------------------------------------------------------


def _parts(given: list[Any]) -> list[Part]:
    return [bytes.fromhex(part) if isinstance(part, str) else part for part in given]


def _step_of(given: Json) -> Step:
    return bytes.fromhex(given["sid"]), given["round"], given["attempt"]


def _hex(given: Json, *names: str) -> list[bytes]:
    return [bytes.fromhex(given[name]) for name in names]


def f_hash(given: Json) -> Any:
    return h(given["label"], *_parts(given["parts"])).hex()


def f_kdf(given: Json) -> Any:
    return kdf(*_hex(given, "secret", "salt"), given["label"], *_parts(given["parts"])).hex()


def f_roster_hash(given: Json) -> Any:
    return roster_hash(read_roster(given)).hex()


def f_terms_hash(given: Json) -> Any:
    return Terms.read(given).hash.hex()


def f_nonce_commitment(given: Json) -> Any:
    terms, nonce = _hex(given, "terms_hash", "nonce")
    return nonce_commitment(terms, given["client"], nonce).hex()


def f_sid(given: Json) -> Any:
    nonces = {int(client): bytes.fromhex(nonce) for client, nonce in given["nonces"].items()}
    return session_id(bytes.fromhex(given["terms_hash"]), nonces).hex()


def f_graph_seed(given: Json) -> Any:
    return kdf(bytes.fromhex(given["sid"]), b"", "graph", given["round"]).hex()


def f_seed_commitment(given: Json) -> Any:
    return seed_commitment(_step_of(given), given["client"], bytes.fromhex(given["b"])).hex()


def f_context(given: Json) -> Any:
    terms, model = _hex(given, "terms_hash", "model")
    return attempt_context(_step_of(given), terms, model, given["members"]).hex()


def f_public_key(given: Json) -> Any:
    return public(bytes.fromhex(given["secret"])).hex()


def f_share_key(given: Json) -> Any:
    """As its two owners find it."""
    u, v, step = given["u"], given["v"], _step_of(given)
    secret_u, secret_v = _hex(given, "c_u", "c_v")
    found = share_key(secret_u, public(secret_v), step, u, v)
    same(share_key(secret_v, public(secret_u), step, u, v), found, "the other's share key")
    return found.hex()


def f_pairwise_mask_key(given: Json) -> Any:
    """As its two owners find it."""
    u, v = given["u"], given["v"]
    secret_u, secret_v, sid, context = _hex(given, "s_u", "s_v", "sid", "context")
    name = given.get("mask_generator", AES)
    found = pairwise_key(secret_u, public(secret_v), sid, context, u, v, name)
    theirs = pairwise_key(secret_v, public(secret_u), sid, context, v, u, name)
    same(theirs, found, "the other's key")
    return found.hex()


def f_self_mask_key(given: Json) -> Any:
    b, sid, context = _hex(given, "b", "sid", "context")
    return self_key(b, sid, context, given["client"], given.get("mask_generator", AES)).hex()


def f_exchange(given: Json) -> Any:
    return exchange(*_hex(given, "secret", "peer")).hex()


def f_seal(given: Json) -> Any:
    key, nonce, content = _hex(given, "key", "nonce", "content")
    return seal(key, nonce, content, _step_of(given), given["u"], given["v"]).hex()


def f_open(given: Json) -> Any:
    key, sealed = _hex(given, "key", "sealed")
    return open_sealed(key, sealed, _step_of(given), given["u"], given["v"]).hex()


def f_stream(given: Json) -> Any:
    if given["offset"] % 4:
        raise ValueError("an offset within a block")
    return stream(bytes.fromhex(given["key"]), given["count"], given["offset"] // 4)


def f_chacha20_stream(given: Json) -> Any:
    if given["offset"] % 16:
        raise ValueError("an offset within a block")
    words = chacha20_words(bytes.fromhex(given["key"]), given["offset"] // 16)
    return list(itertools.islice(words, given["count"]))


def f_thresholds(given: Json) -> Any:
    return thresholds(given["n"], given.get("rounds", 1))


def f_circle(given: Json) -> Any:
    return circle(given["cohort"], bytes.fromhex(given["graph_seed"]))


def f_neighbours(given: Json) -> Any:
    order = given["circle"]
    return {str(client): sorted(around(client, order, given["k"])) for client in order}


def f_share(given: Json) -> Any:
    coefficients = list(map(bytes.fromhex, given["coefficients"]))
    secret = bytes.fromhex(given["secret"])
    return {str(v): share(secret, coefficients, v).hex() for v in given["holders"]}


def f_rebuild(given: Json) -> Any:
    shares = {int(holder): bytes.fromhex(value) for holder, value in given["shares"].items()}
    return rebuild(shares, given["t_k"]).hex()


def _range(given: Json) -> Fraction:
    return Fraction(float.fromhex(given["range"]))


def f_grid(given: Json) -> Any:
    q, levels, exponent = grid(given["n"], _range(given))
    return {"q": q, "L": levels, "e": exponent}


def f_coin_key(given: Json) -> Any:
    seed = bytes.fromhex(given["seed"])
    return kdf(seed, b"", "rounding coins", given["client"], given["round"]).hex()


def f_encode(given: Json) -> Any:
    values = [Fraction(float.fromhex(value)) for value in given["values"]]
    encoded, clipped = encode(values, given["n"], _range(given), bytes.fromhex(given["key"]))
    return {"words": encoded, "clipped": clipped}


def f_decode(given: Json) -> Any:
    exact = decode(given["words"], given["n"], _range(given), given["survivors"])
    return [float(value).hex() for value in exact]


def f_sign(given: Json) -> Any:
    identity, head, payload = _hex(given, "identity", "header", "payload")
    message = signed(head, identity, payload)
    key = ed25519_public(identity)
    if not ed25519_verify(key, message[-64:], to_sign(message[:-64])):
        raise MismatchError("a signature that does not hold")
    return {"public_key": key.hex(), "message": message.hex()}


def f_header(given: Json) -> Any:
    return header(given["kind"], *_parts(given["fields"])).hex()


def check_functions(document: Json) -> int:
    """Cases with what a function is given, and what it returns or how it fails."""
    for case in document["cases"]:
        function = globals()[f"f_{case['function']}"]
        try:
            found = {"returns": function(case["given"])}
        except RefusedError as refused:
            found = {"error": refused.error}
        except (ValueError, OverflowError):  # NaN and infinity are no fractions
            found = {"error": "ValueError"}
        expected = {name: case[name] for name in ("returns", "error") if name in case}
        same(found, expected, case["description"])
    return len(document["cases"])


CHECKS: dict[str, Callable[[Json], int]] = {
    "functions": check_functions,
    "round": check_round,
    "refused messages": check_refused_messages,
    "refused rounds": check_refused_rounds,
}


def check(document: Json) -> int:
    """How many cases hold.

    Raises:
        MismatchError: naming the first thing that does not.
    """
    try:
        same(document["protocol"], PROTOCOL, "protocol")
        return CHECKS[document["kind"]](document)
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        struct.error,
        RefusedError,
    ) as error:
        raise MismatchError(f"{type(error).__name__}: {error}") from error


def main() -> int:
    """Check all files."""
    failed = 0
    for path in sorted(VECTORS.glob("*.json")):
        try:
            print(f"ok    {path.name}: {check(json.loads(path.read_bytes()))}")
        except MismatchError as error:
            failed = 1
            print(f"FAIL  {path.name}: {error}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
