"""Broken messages for the decoders and for whole sessions.

Law: whatever arrives, nothing but a ``ProtocolError`` comes out, what the server refuses changes
nothing, and no call allocates more than ``allowance`` says, whatever lengths a message declares.

By hand, for as long as one likes: ``python tests/secagg/fuzz_wire.py --seconds 600``.
"""

import argparse
import copy
import dataclasses
import random
import resource
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from faulty_network import MODEL, Fault, Listed, Network, Place

from fedsa_secure.errors import ProtocolError
from fedsa_secure.secagg import ClientSession, Identity, Party, ServerSession, Terms, Update
from fedsa_secure.secagg.client_session import SessionState
from fedsa_secure.secagg.identity import verify
from fedsa_secure.secagg.wire import (
    _LENGTHS,
    _SIGNATURE_BYTES,
    _to_sign,
    client_header_limit,
    decode_client,
    decode_server,
)

_WORKING_MEMORY = 2**18
"""Bytes that masking and hashing take, whatever the message: a block of a stream above all."""
_PER_BYTE = 64
"""Bytes of Python objects that one byte of a message becomes at most: a list of small numbers."""


class ToClient(NamedTuple):
    """A message from the server and the client that it came to, as it was then."""

    client: int
    state: SessionState
    answers: dict[int, bytes]
    data: bytes


class ToServer(NamedTuple):
    """A message from a client and the server as it was when the message came."""

    server: ServerSession
    client: int
    data: bytes


class _Recorded(Network):
    """Keeps every message with its receiver."""

    def __init__(self, clients: int, folder: Path, size: int) -> None:
        self.to_clients: list[ToClient] = []
        self.to_server: list[ToServer] = []
        super().__init__(clients, folder, size)

    def _receive(self, client: int, data: bytes, kill: Fault | None) -> bytes | None:
        session = self.clients[client]
        answers = {number: bytes(each) for number, each in session._answers.items()}
        self.to_clients.append(ToClient(client, session.state, answers, bytes(data)))
        return super()._receive(client, data, kill)

    def _to_server(self, answers: Any) -> None:
        for client, data in answers:
            self.to_server.append(ToServer(frozen(self.server), client, data))
            super()._to_server([(client, data)])


def frozen(server: ServerSession) -> ServerSession:
    """The server as it stands: what the original does later does not show in it."""
    other = copy.copy(server)
    phase = other._phase
    if phase is not None and hasattr(phase, "total"):
        other._phase = dataclasses.replace(phase, total=phase.total.copy())
    return other


class FoundError(AssertionError):
    """A message that broke the law."""


@dataclasses.dataclass
class Findings:
    """What was tried, and what came of it."""

    executions: int = 0
    outcomes: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    kinds: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    """Messages that were decoded, by target and kind."""
    taken: Counter[str] = dataclasses.field(default_factory=Counter)
    """Messages that the server did not refuse, by kind."""
    worst: dict[str, int] = dataclasses.field(default_factory=dict)
    """Most bytes allocated by one call, by target."""

    def __str__(self) -> str:
        lines = [f"{self.executions} executions"]
        for title, counts in (("outcomes", self.outcomes), ("kinds decoded", self.kinds)):
            lines.append(title + ":")
            lines += [f"  {a:8} {b:20} {count}" for (a, b), count in sorted(counts.items())]
        lines.append(f"taken by the server: {dict(sorted(self.taken.items()))}")
        lines += [f"most bytes allocated by {a}: {count}" for a, count in self.worst.items()]
        return "\n".join(lines)


def allowance(terms: Terms, target: str) -> int:
    """Most bytes that one call may allocate."""
    longest = 512 + 512 * terms.thresholds.clients
    if target in ("decode of client", "server"):  # which read what clients send
        longest = _LENGTHS.size + 4 * terms.size + client_header_limit(terms) + _SIGNATURE_BYTES
    return _WORKING_MEMORY + _PER_BYTE * longest


# Mutations

_HUGE = [
    head + length
    for head in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")  # array, map, bin, str, ext
    for length in (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\xff\xff\xff", b"\0\0\0\0")
] + [
    head + length
    for head in (b"\xdc", b"\xde", b"\xc5", b"\xda", b"\xc8")
    for length in (b"\xff\xff", b"\0\0", b"\0\x01")
]
_RAW = [
    *_HUGE,
    b"\xc1",
    b"\xd6\xff\0\0\0\0",  # a timestamp
    b"\xd7\xff" + b"\xff" * 8,
    b"\xa4\xff\xfe\xfd\xfc",  # no UTF-8
    b"\xc7\x0c\xff" + b"\xff" * 12,
    b"\x91" * 400,
    b"\x81\x01" * 400,
    b"\x91" * 400 + b"\xc0",
    b"\xcd\0\x01",  # 1 in three bytes
    b"\xd3\0\0\0\0\0\0\0\x01",
    b"\xcb\x3f\xf0\0\0\0\0\0\0",  # 1.0
    b"\xca\x7f\xc0\0\0",
]
_VALUES: list[object] = [
    *(-1, -(2**63), 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0, 1, 127, 128, 10**6),
    *(1.0, 0.5, float("nan"), float("inf"), -0.0, None, True, False, "", "client", "\0" * 32),
    *(b"", bytes(31), bytes(32), bytes(33), b"\xff" * 32, bytes(92), bytes(64), b"\xff" * 92),
    *([], {}, [[]], {0: 0}, [0] * 300, [[0, bytes(32)]], [[0, bytes(92)]] * 2, {"kind": 3}),
]


def mutated_tree(tree: Any, draw: random.Random) -> Any:
    """A MessagePack value with one place changed."""
    if not isinstance(tree, list) or not tree or draw.random() < 0.1:
        return mutated_leaf(tree, draw)
    at, other = draw.randrange(len(tree)), list(tree)
    how = draw.random()
    if how < 0.70:
        other[at] = mutated_tree(tree[at], draw)
    elif how < 0.78:
        del other[at]
    elif how < 0.86:
        other.insert(draw.randrange(len(tree) + 1), tree[at])
    elif how < 0.90:
        other += [tree[at]] * draw.choice((1, 3, 50))
    elif how < 0.95:
        with_whom = draw.randrange(len(tree))
        other[at], other[with_whom] = other[with_whom], other[at]
    else:
        other.insert(at, mutated_leaf(0, draw))
    return other


def mutated_leaf(value: Any, draw: random.Random) -> Any:
    how = draw.random()
    if isinstance(value, bytes) and value and how < 0.5:
        return mutated_bytes(value, draw)
    if isinstance(value, int) and how < 0.5:
        return min(2**64 - 1, max(0, value + draw.choice((-1, 1, 2, 256, 2**32))))
    if how < 0.75:
        return draw.choice(_VALUES)
    return msgspec.Raw(draw.choice(_RAW))


def mutated_bytes(data: bytes, draw: random.Random, other: bytes = b"") -> bytes:
    """Bytes with bits turned, parts moved, taken out, put in, or lengths changed."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(out) + 1)
        how = draw.randrange(7)
        if how == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif how == 1 and at < len(out):
            out[at] = draw.choice((0, 0x7F, 0x80, 0x90, 0x9F, 0xC0, 0xC4, 0xDD, 0xFF))
        elif how == 2:
            del out[at : at + draw.choice((1, 4, 32, len(out)))]
        elif how == 3:
            out[at:at] = draw.randbytes(draw.choice((1, 4, 33)))
        elif how == 4:
            out[at : at + draw.choice((0, 1, 5))] = draw.choice(_RAW)
        elif how == 5 and other:
            start = draw.randrange(len(other))
            out[at : at + draw.choice((0, 64))] = other[start : start + draw.choice((8, 64, 400))]
        elif how == 6 and len(out) >= 8:  # the two lengths of a client's message
            place = draw.choice((0, 4))
            lengths = (0, 1, 2**31, 2**32 - 1, len(out), max(0, len(out) - 72), 4, 16, 20)
            out[place : place + 4] = draw.choice(lengths).to_bytes(8, "little")[:4]
    return bytes(out)


class Fuzzer:
    """Real messages of a few rounds, to be broken.

    Args:
        folder: for the clients' disks while the messages are made.
        seed: of everything that is broken.
        clients: n.
        size: values in a vector.
    """

    def __init__(self, folder: Path, seed: int, clients: int = 4, size: int = 4) -> None:
        network = _Recorded(clients, folder, size)
        network.open()
        network.run_round()
        network.run_round(Listed({Place(2, 0, 1, 1, True, 0): Fault("drop")}))  # keys are revealed
        network.run_round()
        self._terms, self._cohort = network.terms, network.cohort
        self._identities: dict[int, Identity] = network.identities
        self._to_clients, self._to_server = network.to_clients, network.to_server
        self._messages = [each.data for each in (*self._to_clients, *self._to_server)]
        self._draw = random.Random(seed)
        self.findings = Findings()

    def step(self) -> None:
        """One broken message for one receiver.

        Raises:
            FoundError: if the law does not hold; it carries the message.
        """
        draw = self._draw
        verify.cache_clear()  # its table grows by hundreds of kB at once, over thousands of calls
        if draw.random() < 0.5:
            case = draw.choice(self._to_clients)
            data = self._from_server(case.data)
            self._run("decode of server", data, lambda: decode_server(data, self._terms))
            self._run("client", data, lambda: self._client(case, data))
        else:
            case = draw.choice(self._to_server)
            data = self._from_client(case)
            self._run("decode of client", data, lambda: self._decode_client(data))
            self._run("server", data, lambda: self._server(case, data))

    def _from_server(self, data: bytes) -> bytes:
        draw = self._draw
        how = draw.random()
        if how < 0.05:
            return draw.randbytes(draw.choice((0, 1, 7, 100, 2000, 5000)))
        if how < 0.35:
            return mutated_bytes(data, draw, draw.choice(self._messages))
        if how < 0.38:
            return data
        tree = msgspec.msgpack.decode(data)
        if how < 0.55 and isinstance(tree[-1], list) and tree[-1]:
            at = draw.randrange(len(tree[-1]))
            if isinstance(tree[-1][at], bytes):  # a client's message inside, signed again
                tree[-1][at] = self._signed_again(tree[-1][at])
                return msgspec.msgpack.encode(tree)
        for _ in range(draw.choice((1, 1, 2))):
            tree = mutated_tree(tree, draw)
        return msgspec.msgpack.encode(tree)

    def _from_client(self, case: ToServer) -> bytes:
        draw = self._draw
        how = draw.random()
        if how < 0.05:
            return draw.randbytes(draw.choice((0, 1, 71, 72, 100, 1000, 5000)))
        if how < 0.4:
            return mutated_bytes(case.data, draw, draw.choice(self._messages))
        if how < 0.43:
            return case.data
        return self._signed_again(case.data)

    def _signed_again(self, data: bytes) -> bytes:
        """A client's message with another header or payload and a signature that holds."""
        draw = self._draw
        header_length, payload_length = _LENGTHS.unpack_from(data)
        start = _LENGTHS.size + payload_length
        payload, header = data[_LENGTHS.size : start], data[start : start + header_length]
        tree = msgspec.msgpack.decode(header)
        sender = tree[4] if tree[0] > 2 else tree[2]
        if payload and draw.random() < 0.3:
            payload = draw.choice((b"", payload[:-4], payload[:-1], payload * 2, bytes(16)))
        elif draw.random() < 0.1:
            payload = bytes(4 * self._terms.size)
        if draw.random() < 0.9:
            header = msgspec.msgpack.encode(mutated_tree(tree, draw))
        frame = _LENGTHS.pack(len(header), len(payload)) + payload + header
        return frame + self._identities[sender].sign(_to_sign(memoryview(frame)))

    def _decode_client(self, data: bytes) -> object:
        signed = decode_client(data, self._terms)
        message = signed.message
        if message.client in self._terms.roster:
            signed.check(self._terms.roster[message.client])
        return message

    def _client(self, case: ToClient, data: bytes) -> object:
        def fill(values: np.ndarray) -> None:
            values[:] = 7

        party = Party(self._terms, case.client, self._identities[case.client])
        session = ClientSession(party, lambda _: self._cohort, None, case.state, case.answers)
        return session.receive(data, Update(MODEL, fill))

    def _server(self, case: ToServer, data: bytes) -> None:
        """What is refused changes nothing; what is not may end the attempt, by name."""
        server = frozen(case.server)
        before = vars(server).copy()
        total = getattr(server._phase, "total", np.empty(0)).copy()
        try:
            server.receive(data)
        except ProtocolError:
            same = all(vars(server)[name] is value for name, value in before.items())
            if not same or not np.array_equal(getattr(server._phase, "total", np.empty(0)), total):
                raise FoundError(f"a refused message changed the server: {data.hex()}") from None
            raise
        self.findings.taken[type(decode_client(data, self._terms).message).__name__] += 1
        server.close()

    def _run(self, target: str, data: bytes, call: Callable[[], object]) -> None:
        findings = self.findings
        findings.executions += 1
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        try:
            result = call()
            outcome = "accepted"
            if target.startswith("decode"):
                findings.kinds[target, type(result).__name__] += 1
        except ProtocolError as error:
            outcome = type(error).__name__
        except FoundError:
            raise
        except BaseException as error:
            raise FoundError(f"{target} raised {error!r} for {data.hex()}") from error
        _, peak = tracemalloc.get_traced_memory()
        findings.outcomes[target, outcome] += 1
        findings.worst[target] = max(findings.worst.get(target, 0), peak - before)
        if peak - before > allowance(self._terms, target):
            raise FoundError(f"{target} allocated {peak - before} bytes for {data.hex()}")


def fuzz(folder: Path, seed: int, seconds: float, executions: int, clients: int = 4) -> Findings:
    """Break messages until the time or the executions are used up.

    Raises:
        FoundError: at the first message that breaks the law.
    """
    fuzzer = Fuzzer(folder, seed, clients)
    tracemalloc.start()
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end and fuzzer.findings.executions < executions:
            fuzzer.step()
    finally:
        tracemalloc.stop()
    return fuzzer.findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(fuzz(Path(folder), options.seed, options.seconds, 10**12, options.clients))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"largest size of the process: {kilobytes // 1024} MiB")


if __name__ == "__main__":
    main()
