"""Writes the test vectors: ``python tests/secagg/make_vectors.py``, by hand, when the page changes.

The package computes them, with its random numbers taken from a tape that is a hash of a label. So
the same files come out every time.
"""

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsa_secure.csprng import Block, ChaCha20Keystream, Keystream
from fedsa_secure.errors import ProtocolError
from fedsa_secure.secagg import (
    ClientSession,
    FixedPoint,
    Identity,
    Party,
    ServerSession,
    Terms,
    Thresholds,
    Update,
)
from fedsa_secure.secagg.derivation import VERSION, digest, info, kdf
from fedsa_secure.secagg.fixed_point import bits_per_value
from fedsa_secure.secagg.graph import _circle, neighbours
from fedsa_secure.secagg.keys import (
    ShareBox,
    attempt_context,
    exchange,
    pairwise_mask_key,
    private_key,
    public_key,
    seed_commitment,
    self_mask_key,
)
from fedsa_secure.secagg.opening import nonce_commitment, session_id
from fedsa_secure.secagg.shamir import PRIME, rebuild_secret, share_secret
from fedsa_secure.secagg.wire import (
    Advertised,
    Agreement,
    Agreements,
    Commit,
    Commitments,
    Delivery,
    Invite,
    MaskedInput,
    Open,
    Opened,
    Survivors,
    VectorFrame,
    decode_client,
    decode_server,
    encode_server,
)

Json = dict[str, Any]
VECTORS = Path(__file__).parent / "vectors" / "v1"
AES = "aes-256-ctr"


# --- Random numbers from a tape -------------------------------------------------------------------


class Tape:
    """Random numbers of one client, in the order in which the package draws them."""

    def __init__(self, numbers: Iterator[bytes]) -> None:
        self._numbers = numbers
        self.drawn: list[bytes] = []

    def below(self, limit: int) -> int:
        """Stands in for ``secrets.randbelow``."""
        self.drawn.append(next(self._numbers))
        value = int.from_bytes(self.drawn[-1], "little")
        assert value < limit
        return value

    def take(self, count: int) -> bytes:
        """Stands in for ``os.urandom``."""
        self.drawn.append(next(self._numbers))
        assert len(self.drawn[-1]) >= count
        self.drawn[-1] = self.drawn[-1][:count]
        return self.drawn[-1]

    @contextmanager
    def playing(self) -> Iterator[None]:
        """The package draws from the tape."""
        with (
            mock.patch.object(secrets, "randbelow", self.below),
            mock.patch.object(os, "urandom", self.take),
        ):
            yield


def random_bytes(*label: object) -> bytes:
    """32 bytes below the prime that are a function of a label."""
    value = hashlib.sha256(" ".join(map(str, label)).encode()).digest()
    return (int.from_bytes(value, "little") % PRIME).to_bytes(32, "little")


def endless(*label: object) -> Iterator[bytes]:
    number = 0
    while True:
        yield random_bytes(*label, number)
        number += 1


def tape_of(given: Json, client: int, t_k: int) -> Tape:
    """The tape that makes a client draw the secrets of a document."""
    b, s = given["b_coefficients"], given["s_coefficients"]
    assert len(b) == len(s) == t_k - 1
    seals = [given["seal_nonces"][v] for v in sorted(given["seal_nonces"], key=int)]
    own = [given[name] for name in ("nonce", "c", "s", "b")]
    # The package draws the coefficient of the highest degree first.
    return Tape(iter(list(map(bytes.fromhex, [*own, *b[::-1], *s[::-1], *seals]))))


def secrets_of(drawn: list[bytes], client: int, cohort: Sequence[int], t_k: int) -> Json:
    """The other way round: what the document says of what was drawn."""
    numbers = [value.hex() for value in drawn]
    degree = t_k - 1
    others = [v for v in cohort if v != client]
    return {
        **dict(zip(("nonce", "c", "s", "b"), numbers, strict=False)),
        "b_coefficients": numbers[4 : 4 + degree][::-1],
        "s_coefficients": numbers[4 + degree : 4 + 2 * degree][::-1],
        "seal_nonces": {
            str(v): nonce for v, nonce in zip(others, numbers[4 + 2 * degree :], strict=True)
        },
    }


def identity(*label: object) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(random_bytes("identity", *label)))


def terms_json(terms: Terms) -> Json:
    """The first generator is not named, as in the hash."""
    floors = terms.thresholds
    named = {} if terms.mask_generator == AES else {"mask_generator": terms.mask_generator}
    return {
        "roster": {str(client): key.hex() for client, key in sorted(terms.roster.items())},
        "n": floors.clients,
        "c": floors.colluders,
        "t": floors.signatures,
        "m": floors.survivors,
        "k": floors.neighbours,
        "t_k": floors.shares,
        "size": terms.size,
        "rounds": terms.rounds,
        "consistency": terms.consistency,
        "application": terms.application.hex(),
        **named,
    }


def read_terms(given: Json) -> Terms:
    floors = Thresholds(*(given[name] for name in ("n", "c", "t", "m", "k", "t_k")))
    roster = {int(client): bytes.fromhex(key) for client, key in given["roster"].items()}
    application = bytes.fromhex(given["application"])
    return Terms(
        roster,
        floors,
        given["size"],
        application,
        given["consistency"],
        given["rounds"],
        given.get("mask_generator", AES),
    )


# --- A round of the package, message by message ---------------------------------------------------


class Replay:
    """The package's parties, fed with given messages instead of with each other's.

    Args:
        document: a round.
        changes: messages that take the place of the document's, by kind and client; None for one
            that never arrives.
        extra: messages that follow those of their kind.
        tapes: random numbers by client; by default those of the document.
    """

    def __init__(
        self,
        document: Json,
        changes: Json | None = None,
        extra: Sequence[Json] = (),
        tapes: dict[int, Tape] | None = None,
    ) -> None:
        self.document, self.changes, self.extra = document, changes or {}, extra
        self.terms, self.cohort = read_terms(document["terms"]), tuple(document["cohort"])
        t_k = self.terms.thresholds.shares
        self.clients, self.tapes = {}, tapes or {}
        for name, given in document["clients"].items():
            client = int(name)
            key = Identity(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(given["identity"])))
            party = Party(self.terms, client, key)
            self.clients[client] = ClientSession(party, lambda _: self.cohort)
            if client not in self.tapes:
                self.tapes[client] = tape_of(given, client, t_k)
        self.server = ServerSession(self.terms)
        self.said: dict[str, dict[int, bytes]] = {}
        """What the package's parties answered, by kind and receiver or sender."""

    def given(self, kind: str, client: int, answer: bytes | None) -> bytes | None:
        """The message that is fed, if it is not the answer of the package itself."""
        if str(client) in self.changes.get(kind, {}):
            changed = self.changes[kind][str(client)]
            return None if changed is None else self.written_out(changed)
        if "messages" not in self.document:
            silent = kind == "masked input" and client in self.document["silent"]
            return None if silent else answer
        found = self.document["messages"].get(kind, {})
        found = found if isinstance(found, str) else found.get(str(client))
        return None if found is None else bytes.fromhex(found)

    def written_out(self, message: str) -> bytes:
        """Hex in which ``kind/client`` stands for a good message, as bytes in MessagePack."""
        good = {}
        for part in message.split(" "):
            if "/" in part:
                kind, client = part.split("/")
                found = bytes.fromhex(self.document["messages"][kind][client])
                good[part] = msgspec.msgpack.encode(found).hex()
        return bytes.fromhex("".join(good.get(part, part) for part in message.split(" ")))

    def run(self) -> Json | None:
        """Who refused a message first, at which one, and why; None if nobody did."""
        try:
            return self._run()
        except ProtocolError as error:
            return {"by": self.at[0], "step": self.at[1], "error": type(error).__name__}

    def _run(self) -> None:
        answers = {}
        for client, session in self.clients.items():
            with self.tapes[client].playing():
                answers[client] = session.commit()
        step = "commit"
        while True:
            self._collect(step, answers)
            self.at = ("server", "sum" if step == "reveal" else step)
            exchange = self.server.close()
            if step == "reveal":
                return
            answers = self._distribute(exchange)
            if step == "open":
                number, model = self.document["round"], bytes.fromhex(self.document["model"])
                answers = self._distribute(self.server.begin(number, self.cohort, model))
            step = next(kind_of(answer) for answer in answers.values() if answer is not None)

    def _collect(self, step: str, answers: dict[int, bytes | None]) -> None:
        self.at = ("server", step)
        for client in self.clients:
            if client in answers:
                self.said.setdefault(step, {})[client] = bytes(answers[client])
            data = self.given(step, client, answers.get(client))
            if data is not None:
                self.server.receive(data)
        for each in self.extra:
            if each["kind"] == step:
                self.server.receive(self.written_out(each["message"]))

    def _distribute(self, exchange: dict[int, list[bytes]]) -> dict[int, bytes | None]:
        answers = {}
        for client, (message,) in sorted(exchange.items()):
            kind = kind_of_server(message)
            self.said.setdefault(kind, {})[client] = message
            data = self.given(kind, client, message)
            if data is None:
                continue
            self.at = (f"client {client}", kind)
            answers[client] = self._receive(client, data)
            for each in self.extra:
                if (each["kind"], each.get("client")) == (kind, client):
                    self._receive(client, self.written_out(each["message"]))
        return answers

    def _receive(self, client: int, data: bytes) -> bytes | None:
        given = self.document["clients"][str(client)]
        vector = np.array(given["vector"], dtype=np.uint32)

        def fill(place: np.ndarray) -> None:
            place[:] = vector

        with self.tapes[client].playing():
            update = Update(bytes.fromhex(given["model"]), fill)
            return self.clients[client].receive(data, update)


def kind_of(data: bytes) -> str:
    """The kind of a client's message, as the page calls it."""
    _, body = struct.unpack("<II", data[:8])
    names = ("commit", "open", "advertise", "shares", "masked input", "agreement", "reveal")
    return names[data[8 + body + 1] - 1]


def kind_of_server(data: bytes) -> str:
    names = ("commitments", "opened", "invite", "advertised", "delivery", "survivors", "agreements")
    return names[data[1] - 16]


def make_round(
    name: str, description: str, clients: int, silent: Sequence[int], size: int = 6, **more: Any
) -> Json:
    """A good round.

    Args:
        name: its random numbers are made from it.
        description: for the document.
        clients: n.
        silent: whose vectors never arrive.
        size: of the vectors.
        more: arguments of the terms.
    """
    cohort = range(clients)
    roster = {k: identity(name, k).public_key for k in cohort}
    application = hashlib.sha256(name.encode()).digest()
    terms = Terms(roster, Thresholds.of(clients), size, application, **more)
    document: Json = {
        "protocol": VERSION,
        "kind": "round",
        "description": description,
        "terms": terms_json(terms),
        "cohort": list(cohort),
        "round": 7,
        "attempt": 1,
        "model": random_bytes(name, "model").hex(),
    }
    tapes = {k: Tape(endless(name, "client", k)) for k in cohort}
    document["clients"] = {
        str(k): {
            "identity": random_bytes("identity", name, k).hex(),
            "model": document["model"],
            "vector": _vector(size, name, "vector", k),
        }
        for k in cohort
    }
    replay = Replay({**document, "silent": silent}, tapes=tapes)
    assert replay.run() is None
    for k in cohort:
        drawn = secrets_of(tapes[k].drawn, k, cohort, terms.thresholds.shares)
        document["clients"][str(k)] |= drawn
    members = list(cohort)
    step = replay.server.sid, document["round"], document["attempt"]
    assert replay.server.total is not None
    document |= {
        "terms_hash": terms.hash.hex(),
        "sid": replay.server.sid.hex(),
        "context": attempt_context(terms, step, bytes.fromhex(document["model"]), members).hex(),
        "members": members,
        "survivors": [k for k in cohort if k not in silent],
        "sum": replay.server.total.tolist(),
        "messages": {kind: _shown(kind, said, silent) for kind, said in replay.said.items()},
        "lost": {str(k): replay.said["masked input"][k].hex() for k in silent},
    }
    return document


def _vector(size: int, *label: object) -> list[int]:
    """Numbers made from a label, eight from each of as many hashes as are needed."""
    labels = [label, *((*label, more) for more in range(1, -(-size // 8)))]
    content = b"".join(random_bytes(*each) for each in labels)
    return list(struct.unpack(f"<{size}I", content[: 4 * size]))


def _shown(kind: str, said: dict[int, bytes], silent: Sequence[int]) -> Json | str:
    """Hex by client; what goes to all the same is written once."""
    if kind == "masked input":
        said = {client: data for client, data in said.items() if client not in silent}
    to_all = kind in ("commitments", "opened", "invite", "advertised", "survivors", "agreements")
    if to_all:
        assert len(set(said.values())) == 1
        return next(iter(said.values())).hex()
    return {str(client): data.hex() for client, data in said.items()}


# --- The package's functions, as the cases name them ----------------------------------------------


def _bytes(given: Json, *names: str) -> list[bytes]:
    return [bytes.fromhex(given[name]) for name in names]


def _parts(given: list[Any]) -> list[Any]:
    return [bytes.fromhex(part) if isinstance(part, str) else part for part in given]


def _step(given: Json) -> tuple[bytes, int, int]:
    return bytes.fromhex(given["sid"]), given["round"], given["attempt"]


def _terms_with_hash(given: Json) -> Terms:
    """Terms of which only the hash is used."""
    terms = Terms({}, Thresholds.of(3), 1, bytes(32))
    object.__setattr__(terms, "hash", bytes.fromhex(given["terms_hash"]))
    return terms


def _roster_hash(given: Json) -> str:
    roster = {int(client): bytes.fromhex(key) for client, key in given["roster"].items()}
    return digest("roster", *(part for k in sorted(roster) for part in (k, roster[k]))).hex()


def _sid(given: Json) -> str:
    """Signatures are left out: they are not part of the id."""
    terms = _terms_with_hash(given)
    nonces = {int(k): bytes.fromhex(nonce) for k, nonce in given["nonces"].items()}
    opens = [Open(terms.hash, k, nonce) for k, nonce in nonces.items()]
    commitments = {k: nonce_commitment(terms, k, nonce) for k, nonce in nonces.items()}
    with mock.patch("fedsa_secure.secagg.opening.checked_open", lambda each, _: each):
        return session_id(Opened(terms.hash, opens), terms, commitments).hex()


def _share_key(given: Json) -> str:
    """What ``ShareBox`` seals with: caught on its way into the cipher."""
    secret_u, secret_v = _bytes(given, "c_u", "c_v")
    with mock.patch("fedsa_secure.secagg.keys.ChaCha20Poly1305") as cipher:
        pair = (given["u"], given["v"])
        ShareBox(exchange(private_key(secret_u), public_key(secret_v)), _step(given), *pair)
        ShareBox(exchange(private_key(secret_v), public_key(secret_u)), _step(given), *pair)
    (of_u,), (of_v,) = (call.args for call in cipher.call_args_list)
    assert of_u == of_v
    return of_u.hex()


def _box(given: Json) -> ShareBox:
    """A box with a given key."""
    with mock.patch("fedsa_secure.secagg.keys.kdf", return_value=bytes.fromhex(given["key"])):
        other = public_key(random_bytes("any"))
        key = private_key(random_bytes("another"))
        return ShareBox(exchange(key, other), _step(given), given["u"], given["v"])


def _seal(given: Json) -> str:
    nonce, content = _bytes(given, "nonce", "content")
    with mock.patch.object(os, "urandom", lambda count: nonce[:count]):
        return _box(given).seal(content).hex()


def _pairwise(given: Json) -> str:
    secret_u, secret_v, sid, context = _bytes(given, "s_u", "s_v", "sid", "context")
    pair = (min(given["u"], given["v"]), max(given["u"], given["v"]))
    peer, generator = public_key(secret_v), given.get("mask_generator", AES)
    return pairwise_mask_key(private_key(secret_u), peer, sid, context, pair, generator).hex()


def _stream(given: Json) -> list[int]:
    keystream = Keystream(bytes.fromhex(given["key"]), given["offset"])
    return keystream.words(given["count"], Block()).tolist()


def _chacha20_stream(given: Json) -> list[int]:
    keystream = ChaCha20Keystream(bytes.fromhex(given["key"]), given["offset"])
    return keystream.words(given["count"], Block()).tolist()


def _thresholds(given: Json) -> Json:
    floors = Thresholds.of(given["n"], rounds=given.get("rounds", 1))
    return {
        "n": floors.clients,
        "c": floors.colluders,
        "t": floors.signatures,
        "m": floors.survivors,
        "k": floors.neighbours,
        "t_k": floors.shares,
    }


def _neighbours(given: Json) -> Json:
    circle = given["circle"]
    floors = Thresholds(len(circle), 1, 3, 3, given["k"], 2)
    with mock.patch("fedsa_secure.secagg.graph._circle", return_value=tuple(circle)):
        return {
            str(client): sorted(neighbours(client, circle, floors, bytes(32), 1))
            for client in circle
        }


def _share(given: Json) -> Json:
    numbers = iter([bytes.fromhex(value) for value in given["coefficients"][::-1]])
    with Tape(numbers).playing():
        threshold = len(given["coefficients"]) + 1
        shares = share_secret(bytes.fromhex(given["secret"]), threshold, given["holders"])
    return {str(holder): value.hex() for holder, value in shares.items()}


def _rebuild(given: Json) -> str:
    shares = {int(holder): bytes.fromhex(value) for holder, value in given["shares"].items()}
    return rebuild_secret(shares, given["t_k"]).hex()


def _grid(given: Json) -> FixedPoint:
    return FixedPoint(given["n"], float.fromhex(given["range"]))


def _grid_json(given: Json) -> Json:
    grid = _grid(given)
    exponent = int(np.log2(grid.step))
    assert grid.step == 2.0**exponent
    return {"q": bits_per_value(given["n"]), "L": grid.levels, "e": exponent}


def _encode(given: Json) -> Json:
    values = np.array([float.fromhex(value) for value in given["values"]])
    words = np.zeros(len(values), dtype=np.uint32)
    clipped = _grid(given).encode(values, Keystream(bytes.fromhex(given["key"])), words)
    return {"words": words.tolist(), "clipped": clipped}


def _decode(given: Json) -> list[str]:
    words = np.array(given["words"], dtype=np.uint32)
    return [float(value).hex() for value in _grid(given).decode(words, given["survivors"])]


def _sign(given: Json) -> Json:
    """A message of given header and payload, as ``VectorFrame`` and ``sign`` make them."""
    seed, header, payload = _bytes(given, "identity", "header", "payload")
    key = Identity(Ed25519PrivateKey.from_private_bytes(seed))
    return {"public_key": key.public_key.hex(), "message": sign_raw(header, key, payload).hex()}


def sign_raw(header: bytes, key: Identity, payload: bytes = b"") -> bytes:
    """Bytes that the package would not make itself, signed as it signs."""
    frame = struct.pack("<II", len(header), len(payload)) + payload + header
    return frame + key.sign(info("message", hashlib.sha256(frame).digest()))


def _header(given: Json) -> str:
    fields = _parts(given["fields"])
    kinds = {"commit": Commit, "masked input": MaskedInput, "survivors": Survivors}
    return msgspec.msgpack.encode(kinds[given["kind"]](*fields)).hex()


PACKAGE: dict[str, Callable[[Json], Any]] = {
    "hash": lambda g: digest(g["label"], *_parts(g["parts"])).hex(),
    "kdf": lambda g: kdf(*_bytes(g, "secret", "salt"), g["label"], *_parts(g["parts"])).hex(),
    "roster_hash": _roster_hash,
    "terms_hash": lambda g: read_terms(g).hash.hex(),
    "nonce_commitment": lambda g: nonce_commitment(
        _terms_with_hash(g), g["client"], bytes.fromhex(g["nonce"])
    ).hex(),
    "sid": _sid,
    "graph_seed": lambda g: kdf(bytes.fromhex(g["sid"]), b"", "graph", g["round"]).hex(),
    "seed_commitment": lambda g: seed_commitment(
        _step(g), g["client"], bytes.fromhex(g["b"])
    ).hex(),
    "context": lambda g: attempt_context(
        _terms_with_hash(g), _step(g), bytes.fromhex(g["model"]), g["members"]
    ).hex(),
    "public_key": lambda g: public_key(bytes.fromhex(g["secret"])).hex(),
    "share_key": _share_key,
    "pairwise_mask_key": _pairwise,
    "self_mask_key": lambda g: self_mask_key(
        *_bytes(g, "b", "sid", "context"), g["client"], g.get("mask_generator", AES)
    ).hex(),
    "exchange": lambda g: exchange(
        private_key(bytes.fromhex(g["secret"])), bytes.fromhex(g["peer"])
    ).hex(),
    "seal": _seal,
    "open": lambda g: _box(g).open(bytes.fromhex(g["sealed"])).hex(),
    "stream": _stream,
    "chacha20_stream": _chacha20_stream,
    "thresholds": _thresholds,
    "circle": lambda g: list(_circle(tuple(g["cohort"]), bytes.fromhex(g["graph_seed"]))),
    "neighbours": _neighbours,
    "share": _share,
    "rebuild": _rebuild,
    "grid": _grid_json,
    "coin_key": lambda g: kdf(
        bytes.fromhex(g["seed"]), b"", "rounding coins", g["client"], g["round"]
    ).hex(),
    "encode": _encode,
    "decode": _decode,
    "sign": _sign,
    "header": _header,
}


def outcome(case: Json) -> Json:
    """What the package makes of a case."""
    try:
        return {"returns": PACKAGE[case["function"]](case["given"])}
    except (ProtocolError, ValueError) as error:
        return {"error": type(error).__name__}


def refusal(case: Json, terms: Terms) -> str | None:
    """How the package refuses a single message."""
    data = filled(case["message"])
    try:
        if case["from"] == "server":
            decode_server(data, terms)
        else:
            signed = decode_client(data, terms)
            signed.check(terms.roster[signed.message.client])
    except ProtocolError as error:
        return type(error).__name__
    return None


def filled(message: str | Json) -> bytes:
    """Hex, or for long messages some hex that is repeated."""
    if isinstance(message, str):
        return bytes.fromhex(message)
    return bytes.fromhex(message["begin"]) + bytes.fromhex(message["repeat"]) * message["times"]


# --- Documents ------------------------------------------------------------------------------------


def functions(description: str, cases: list[tuple[str, str, Json]], bad: bool = False) -> Json:
    """A document of cases: description, function, what it is given."""
    done = []
    for text, function, given in cases:
        case: Json = {"description": text, "function": function, "given": given}
        found = outcome(case)
        assert ("error" in found) == bad, (text, found)
        done.append(case | found)
    document = {"protocol": VERSION, "kind": "functions", "description": description}
    return {**document, "cases": done}


def a(*label: object) -> str:
    """32 made-up bytes, as hex."""
    return random_bytes("case", *label).hex()


def _some_terms(**changes: Any) -> Json:
    roster = {str(k): identity("derivation", k).public_key.hex() for k in (0, 1, 5, 300)}
    floors = {"n": 4, "c": 1, "t": 3, "m": 3, "k": 3, "t_k": 3}
    rest = {"size": 8, "rounds": 30, "consistency": True, "application": a("application")}
    return {"roster": roster, **floors, **rest, **changes}


def derivation() -> Json:
    step = {"sid": a("sid"), "round": 7, "attempt": 1}
    terms = _some_terms()
    nonces = {str(k): a("nonce", k) for k in (0, 5, 300)}
    pair = {"u": 2, "v": 7}
    two = {"c_u": a("c", 2), "c_v": a("c", 7)}
    masks = {"sid": step["sid"], "context": a("context")}
    return functions(
        "Hashes, keys and seals of sections 3 and 6.",
        [
            ("H of a label alone", "hash", {"label": "test", "parts": []}),
            (
                "H of bytes, an integer, a list of clients and nothing",
                "hash",
                {"label": "test", "parts": ["00ff", 258, [0, 1, 65536], [], ""]},
            ),
            (
                "the same bytes, split elsewhere, hash to something else",
                "hash",
                {"label": "test", "parts": ["00", "ff", 258, [0, 1, 65536], [], ""]},
            ),
            (
                "KDF without salt",
                "kdf",
                {"secret": a("secret"), "salt": "", "label": "test", "parts": [1, "02"]},
            ),
            (
                "KDF with salt",
                "kdf",
                {"secret": a("secret"), "salt": a("salt"), "label": "test", "parts": [1, "02"]},
            ),
            ("roster hash, in order of number", "roster_hash", {"roster": terms["roster"]}),
            ("terms hash", "terms_hash", terms),
            ("terms hash without step 4", "terms_hash", _some_terms(consistency=False)),
            (
                "nonce commitment",
                "nonce_commitment",
                {"terms_hash": a("terms"), "client": 300, "nonce": a("nonce")},
            ),
            (
                "session id of three participants",
                "sid",
                {"terms_hash": a("terms"), "nonces": nonces},
            ),
            ("graph seed", "graph_seed", {"sid": step["sid"], "round": 7}),
            ("seed commitment", "seed_commitment", {**step, "client": 300, "b": a("b")}),
            (
                "context",
                "context",
                {**step, "terms_hash": a("terms"), "model": a("model"), "members": [0, 5, 300]},
            ),
            ("X25519 public key", "public_key", {"secret": a("c", 2)}),
            ("share key of 2 for 7", "share_key", {**step, **pair, **two}),
            (
                "share key of 7 for 2 is another one",
                "share_key",
                {**step, "u": 7, "v": 2, "c_u": two["c_v"], "c_v": two["c_u"]},
            ),
            (
                "a sealed share",
                "seal",
                {
                    **step,
                    **pair,
                    "key": a("key"),
                    "nonce": a("nonce")[:24],
                    "content": a("share of b") + a("share of s"),
                },
            ),
            (
                "pairwise mask key, from both sides",
                "pairwise_mask_key",
                {**masks, **pair, "s_u": a("s", 2), "s_v": a("s", 7)},
            ),
            ("self mask key", "self_mask_key", {**masks, "client": 7, "b": a("b")}),
            ("key of rounding coins", "coin_key", {"seed": a("seed"), "client": 7, "round": 3}),
        ],
    )


def streams() -> Json:
    key = a("stream")
    return functions(
        "Words of the AES-256-CTR stream of section 3.",
        [
            ("the first words", "stream", {"key": key, "offset": 0, "count": 8}),
            ("words of the second block on", "stream", {"key": key, "offset": 4, "count": 8}),
            (
                "a counter that needs five bytes",
                "stream",
                {"key": key, "offset": 2**34 - 4, "count": 8},
            ),
            ("a last block that is not used up", "stream", {"key": key, "offset": 0, "count": 5}),
        ],
    )


def chacha20() -> Json:
    key, name = a("chacha20"), {"mask_generator": "chacha20"}
    masks = {"sid": a("sid"), "context": a("context"), **name}
    return functions(
        "Terms, keys and streams of masks from ChaCha20, section 3.",
        [
            ("terms hash", "terms_hash", _some_terms(**name)),
            (
                "pairwise mask key, from both sides",
                "pairwise_mask_key",
                {**masks, "u": 2, "v": 7, "s_u": a("s", 2), "s_v": a("s", 7)},
            ),
            ("self mask key", "self_mask_key", {**masks, "client": 7, "b": a("b")}),
            ("the first words", "chacha20_stream", {"key": key, "offset": 0, "count": 20}),
            ("words of the second block on", "chacha20_stream", {"key": key, "offset": 16,
             "count": 4}),
            ("a counter above 2³¹", "chacha20_stream", {"key": key, "offset": 16 * (2**31 - 1),
             "count": 20}),
            ("the last block that there is", "chacha20_stream", {"key": key, "offset": 2**36 - 16,
             "count": 16}),
        ],
    )  # fmt: skip


def graphs() -> Json:
    small = [3 * k for k in range(12)]
    seed = a("graph")
    circle = PACKAGE["circle"]({"cohort": small, "graph_seed": seed})
    return functions(
        "Thresholds of sections 2 and 5, the circle, and neighbours on it.",
        [
            *((f"defaults of {n} clients", "thresholds", {"n": n}) for n in (3, 4, 5, 10, 100)),
            *((f"defaults of {n} clients, one round", "thresholds", {"n": n, "rounds": 1})
              for n in (137, 250)),
            (
                "defaults of 250 clients and more rounds",
                "thresholds",
                {"n": 250, "rounds": 4_643},  # the last before k grows again
            ),
            ("a circle of 12", "circle", {"cohort": small, "graph_seed": seed}),
            (
                "a circle of 130",
                "circle",
                {"cohort": list(range(130)), "graph_seed": a("graph", 130)},
            ),
            ("everybody's neighbours on it", "neighbours", {"circle": circle, "k": 6}),
        ],
    )  # fmt: skip


def shamir() -> Json:
    coefficients = [a("coefficient", k) for k in range(3)]
    holders = [0, 1, 5, 300, 2**32 - 1]
    given = {"secret": a("secret"), "coefficients": coefficients, "holders": holders}
    shares = _share(given)
    zero, top = bytes(32).hex(), (PRIME - 1).to_bytes(32, "little").hex()
    rest = {k: shares[k] for k in ("1", "5", "300", "4294967295")}
    return functions(
        "Secret sharing of section 4; coefficients from degree 1 up.",
        [
            ("any four of five rebuild", "share", given),
            ("the smallest element", "share", {**given, "secret": zero, "holders": [0, 1]}),
            ("the largest element", "share", {**given, "secret": top, "holders": [0, 1]}),
            (
                "a highest coefficient of zero is one like any other",
                "share",
                {**given, "coefficients": [coefficients[0], zero], "holders": [0, 1, 2]},
            ),
            ("four shares", "rebuild", {"shares": rest, "t_k": 4}),
            ("of five shares the last is not used", "rebuild", {"shares": shares, "t_k": 4}),
            (
                "a wrong share beyond the smallest numbers does no harm",
                "rebuild",
                {"shares": shares | {"4294967295": zero}, "t_k": 4},
            ),
            (
                "a wrong share gives another secret",
                "rebuild",
                {"shares": shares | {"5": zero}, "t_k": 4},
            ),
        ],
    )


def quantiser() -> Json:
    def values(*numbers: float) -> list[str]:
        return [float(number).hex() for number in numbers]

    one, key = (1.0).hex(), a("coins", 4)
    edge = FixedPoint(10, 1.0)
    most = edge.levels * edge.step
    widest, between = FixedPoint(5, 2.0**-10), (2.0**-10 / 3, -(2.0**-10) / 7, 1e-4)
    return functions(
        "Fixed point of section 10. Numbers are C99 hexadecimal floats, the step is 2 to the e.",
        [
            *((f"grid of {n} clients", "grid", {"n": n, "range": one}) for n in (3, 10, 64, 256)),
            (
                "a range of exactly L steps",
                "grid",
                {"n": 10, "range": most.hex()},
            ),
            (
                "one float more takes steps of twice the size",
                "grid",
                {"n": 10, "range": float(np.nextafter(most, 2)).hex()},
            ),
            ("a small range", "grid", {"n": 3, "range": (1e-5).hex()}),
            (
                "coins decide",
                "encode",
                {
                    "n": 10,
                    "range": one,
                    "key": key,
                    "values": values(0.0, 0.1, -0.1, 0.3, -0.3, 1 / 3, 0.9999, -0.9999),
                },
            ),
            (
                "values on the grid take no coin, and 0 is L; the last three lie between",
                "encode",
                {
                    "n": 5,
                    "range": (2.0**-10).hex(),
                    "key": key,
                    "values": values(0, -0.0, widest.step, -widest.step, -(2.0**-10), *between),
                },
            ),
            (
                "what lies beyond L steps is clipped and counted; the grid reaches past the range",
                "encode",
                {
                    "n": 10,
                    "range": one,
                    "key": key,
                    "values": values(1.0, -1.0, most, most * 1.01, -1e300, *between),
                },
            ),
            (
                "the sum of three",
                "decode",
                {"n": 10, "range": one, "survivors": 3, "words": [0, 3 * edge.levels, 2**32 - 1]},
            ),
        ],
    )


def signatures() -> Json:
    key = random_bytes("identity", "signatures", 0).hex()
    commit = [a("terms"), 3, a("commitment")]
    masked = [a("sid"), 128, 65536, 256, a("context")]
    payload = struct.pack("<4I", 0, 1, 2**31, 2**32 - 1).hex()
    long = [a("sid"), 1, 0, list(range(20)), []]
    return functions(
        "Headers and signed messages of section 6.",
        [
            ("header of a commit", "header", {"kind": "commit", "fields": commit}),
            (
                "integers of one, two and four bytes",
                "header",
                {"kind": "masked input", "fields": masked},
            ),
            ("arrays of none and of twenty", "header", {"kind": "survivors", "fields": long}),
            (
                "a message without payload",
                "sign",
                {
                    "identity": key,
                    "header": _header({"kind": "commit", "fields": commit}),
                    "payload": "",
                },
            ),
            (
                "a message with payload",
                "sign",
                {
                    "identity": key,
                    "header": _header({"kind": "masked input", "fields": masked}),
                    "payload": payload,
                },
            ),
        ],
    )


def refused_values() -> Json:
    good = {"1": a("x", 1), "2": a("x", 2), "3": a("x", 3)}
    field, most = PRIME.to_bytes(32, "little").hex(), bytes([255] * 32).hex()
    step = {"sid": a("sid"), "round": 7, "attempt": 1}
    box = {**step, "u": 2, "v": 7, "key": a("key")}
    sealed = _seal({**box, "nonce": a("nonce")[:24], "content": a("b") + a("s")})
    small = [0, 1, PRIME - 1, PRIME, PRIME + 1]
    order_8 = "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"
    points = [value.to_bytes(32, "little").hex() for value in small] + [order_8]
    encode = {"n": 10, "range": (1.0).hex(), "key": a("coins")}
    return functions(
        "Values that a function has to refuse.",
        [
            ("a share of p", "rebuild", {"shares": good | {"2": field}, "t_k": 3}),
            ("a share of 2²⁵⁶ − 1", "rebuild", {"shares": good | {"1": most}, "t_k": 3}),
            ("a share of 31 bytes", "rebuild", {"shares": good | {"1": a("x")[2:]}, "t_k": 3}),
            *((f"X25519 with a point of small order: {point}", "exchange",
               {"secret": a("c"), "peer": point}) for point in points),
            ("sealed for another holder", "open", {**box, "sealed": sealed, "v": 8}),
            ("sealed by another owner", "open", {**box, "sealed": sealed, "u": 3}),
            ("sealed in another attempt", "open", {**box, "sealed": sealed, "attempt": 2}),
            ("sealed under another key", "open", {**box, "sealed": sealed, "key": a("other")}),
            ("a changed byte in a seal", "open", {**box, "sealed": sealed[:-2] + "00"}),
            ("NaN", "encode", {**encode, "values": ["nan"]}),
            ("infinity", "encode", {**encode, "values": ["0x1p0", "-inf"]}),
            ("a range of zero", "grid", {"n": 10, "range": 0.0.hex()}),
            ("no range at all", "grid", {"n": 10, "range": "inf"}),
            ("more clients than 32 bits have room for", "grid", {"n": 2**31, "range": 1.0.hex()}),
        ],
        bad=True,
    )  # fmt: skip


def refused_messages() -> Json:
    """Single messages that their reader has to refuse."""
    keys = {k: identity("messages", k) for k in range(3)}
    roster = {k: key.public_key for k, key in keys.items()}
    terms = Terms(roster, Thresholds.of(3), 4, random_bytes("messages"))
    key, step = keys[0], (random_bytes("case", "sid"), 7, 1)
    commit = msgspec.msgpack.encode(Commit(terms.hash, 0, random_bytes("commitment")))
    good = sign_raw(commit, key)
    context = random_bytes("case", "context")
    masked = msgspec.msgpack.encode(MaskedInput(*step, 0, context))
    vector = struct.pack("<4I", 1, 2, 3, 4)
    frame = VectorFrame(MaskedInput(*step, 0, context), 4)
    frame.values[:] = (1, 2, 3, 4)
    assert frame.sign(key) == sign_raw(masked, key, vector)  # `sign_raw` signs as the package does
    number_at = 2 + 34  # array and kind, then the terms hash as bin 8
    client = slice(number_at, number_at + 1)

    def header(change: bytes, at: slice = client) -> bytes:
        return sign_raw(commit[: at.start] + change + commit[at.stop :], key)

    def signature(message: bytes, to_sign: bytes) -> bytes:
        return message[:-64] + key.sign(to_sign)

    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(good[-32:], "little") + order
    survivors = encode_server(Survivors(*step, [0, 1, 2], []))
    cases: list[tuple[str, str, bytes | Json, str]] = [
        ("nothing at all", "client", b"", "MalformedMessage"),
        ("two lengths and a signature without a header", "client", sign_raw(b"", key), ""),
        ("a message that stops in its header", "client", good[:40], ""),
        ("a message without its last byte", "client", good[:-1], ""),
        ("a byte after the signature", "client", good + b"\0", ""),
        ("a header length one too small", "client", _with_lengths(good, -1, 0), ""),
        ("a header length one too large", "client", _with_lengths(good, 1, 0), ""),
        (
            "a byte of the header counted as payload",
            "client",
            _with_lengths(good, -1, 1),
            "MalformedMessage",
        ),
        (
            "a header length beyond every message",
            "client",
            b"\xff\xff\xff\xff" + good[4:],
            "OversizedMessage",
        ),
        ("a payload length beyond the message", "client", good[:4] + b"\xff" * 4 + good[8:], ""),
        (
            "more bytes than any message has",
            "client",
            {"begin": good.hex(), "repeat": "00", "times": 2000},
            "OversizedMessage",
        ),
        ("a client number in two bytes instead of one", "client", header(b"\xcc\0"), ""),
        ("a client number in nine bytes", "client", header(b"\xcf" + bytes(8)), ""),
        ("a negative client number", "client", header(b"\xff"), ""),
        ("a client number of 2³²", "client", header(b"\xcf\0\0\0\1\0\0\0\0"), ""),
        ("a client number that is a float", "client", header(b"\xcb" + bytes(8)), ""),
        ("a client number that is nil", "client", header(b"\xc0"), ""),
        ("a client number that is false", "client", header(b"\xc2"), ""),
        ("a length of bin in two bytes", "client", header(b"\xc5\0\x20", slice(2, 4)), ""),
        ("a hash as text", "client", header(b"\xd9\x20" + b"a" * 32, slice(2, 36)), ""),
        ("a hash of 31 bytes", "client", header(b"\xc4\x1f", slice(2, 5)), ""),
        ("a hash of 33 bytes", "client", header(b"\xc4\x21\0", slice(2, 4)), ""),
        ("an array length in two bytes", "client", header(b"\xdc\0\4", slice(0, 1)), ""),
        ("an array that says three and has four", "client", header(b"\x93", slice(0, 1)), ""),
        ("a field too many", "client", sign_raw(b"\x95" + commit[1:] + b"\0", key), ""),
        ("a field too few", "client", sign_raw(b"\x93" + commit[1:-34], key), ""),
        ("bytes behind the array", "client", sign_raw(commit + b"\0", key), ""),
        ("a map instead of an array", "client", header(b"\x82", slice(0, 1)), ""),
        ("a kind that does not exist", "client", header(b"\x08", slice(1, 2)), ""),
        ("a kind of the server's", "client", sign_raw(survivors, key), ""),
        ("a payload where none belongs", "client", sign_raw(commit, key, vector), ""),
        ("a masked input without payload", "client", sign_raw(masked, key), ""),
        ("a payload of too few values", "client", sign_raw(masked, key, vector[:-4]), ""),
        ("a payload that is no whole number of values", "client",
         sign_raw(masked, key, vector[:-1]), ""),
        ("a signature of another client", "client", sign_raw(commit, keys[1]), "BadSignature"),
        ("a signature with a changed byte", "client",
         good[:-40] + bytes([good[-40] ^ 1]) + good[-39:], "BadSignature"),
        ("a payload with a changed byte", "client",
         _flipped(sign_raw(masked, key, vector), 8), "BadSignature"),
        ("the same signature with the order of the group added", "client",
         good[:-32] + s.to_bytes(32, "little"), "BadSignature"),
        ("a signature over the bytes themselves", "client",
         signature(good, good[:-64]), "BadSignature"),
        ("a signature over their hash without a label", "client",
         signature(good, hashlib.sha256(good[:-64]).digest()), "BadSignature"),
        ("a signature under the label of another version", "client",
         signature(good, info("message", hashlib.sha256(good[:-64]).digest())
                      .replace(b"/1 ", b"/2 ")), "BadSignature"),
        ("nothing from the server", "server", b"", "MalformedMessage"),
        ("a message of the server's that is cut off", "server", survivors[:-1], ""),
        ("a byte behind a message of the server's", "server", survivors + b"\0", ""),
        ("a message of a client's from the server", "server", commit, ""),
        ("a round in five bytes instead of one", "server",
         survivors[:36] + b"\xce\0\0\0\7" + survivors[37:], ""),
        ("an array of 2³² − 1 clients in a few bytes", "server",
         survivors[:38] + b"\xdd\xff\xff\xff\xff" + survivors[39:], ""),
        ("arrays in arrays", "server",
         {"begin": "9515", "repeat": "91", "times": 1000}, ""),
        ("more bytes than any message of the server's has", "server",
         {"begin": survivors.hex(), "repeat": "00", "times": 2048}, "OversizedMessage"),
    ]  # fmt: skip
    document = {
        "protocol": VERSION,
        "kind": "refused messages",
        "description": "Messages that are refused by whoever reads them, and how.",
        "terms": terms_json(terms),
    }
    done = []
    for text, sender, data, error in cases:
        message = data.hex() if isinstance(data, bytes) else data
        case = {"description": text, "from": sender, "message": message}
        error = error or "MalformedMessage"
        assert refusal(case, terms) == error, (text, refusal(case, terms))
        done.append(case | {"error": error})
    return document | {"cases": done}


def _with_lengths(message: bytes, header: int, payload: int) -> bytes:
    first, second = struct.unpack("<II", message[:8])
    return struct.pack("<II", first + header, second + payload) + message[8:]


def _flipped(message: bytes, at: int) -> bytes:
    at %= len(message)
    return message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]


class Forge:
    """Messages that a faulty party sends in a round: signed well, and wrong in one thing."""

    def __init__(self, name: str, document: Json, tried: bool) -> None:
        self.document, self.tried, self.cases = document, tried, []
        self.name, self.terms = name, read_terms(document["terms"])
        self.step = _step(document)
        self.context = bytes.fromhex(document["context"])
        self.survivors = digest("survivors", document["survivors"])

    def add(
        self,
        description: str,
        by: str,
        step: str,
        error: str,
        replace: dict[str, dict[int, bytes | None]] | None = None,
        extra: Sequence[Json] = (),
    ) -> None:
        """A case, which the package has to refuse as expected before it is written."""
        changes = {
            kind: {str(k): None if data is None else self.short(data) for k, data in by_k.items()}
            for kind, by_k in (replace or {}).items()
        }
        refused = {"by": by, "step": step, "error": error}
        if self.tried:
            found = Replay(self.document, changes, extra).run()
            assert found == refused, (description, found)
        case = {"description": description, "replace": changes, "extra": list(extra)}
        self.cases.append(case | {"refused": refused})

    def short(self, message: bytes) -> str:
        """Hex, with names for the good messages in it."""
        text = bytes(message).hex()
        for kind in ("commit", "open", "advertise", "agreement"):
            for client, good in self.document["messages"][kind].items():
                inner = msgspec.msgpack.encode(bytes.fromhex(good)).hex()
                text = text.replace(inner, f" {kind}/{client} ")
        return " ".join(text.split())

    def raw(self, kind: str, client: int = 0) -> bytes:
        found = self.document["messages"][kind]
        return bytes.fromhex(found if isinstance(found, str) else found[str(client)])

    def old(self, kind: str, client: int = 0) -> Any:
        """The good message, decoded."""
        if kind in ("commitments", "opened", "invite", "advertised", "delivery", "survivors"):
            return decode_server(self.raw(kind, client), self.terms)
        return decode_client(self.raw(kind, client), self.terms).message

    def key(self, client: int) -> Identity:
        seed = bytes.fromhex(self.document["clients"][str(client)]["identity"])
        return Identity(Ed25519PrivateKey.from_private_bytes(seed))

    def changed(self, kind: str, client: int, /, **fields: Any) -> bytes:
        """A client's message with other fields, signed by that client."""
        old = self.old(kind, client)
        new = type(old)(**{name: getattr(old, name) for name in old.__struct_fields__} | fields)
        payload = b""
        if kind == "masked input":
            payload = decode_client(self.raw(kind, client), self.terms).payload.tobytes()
        return sign_raw(msgspec.msgpack.encode(new), self.key(client), payload)

    def list_of(self, kind: str, clients: Sequence[int]) -> list[bytes]:
        return [self.raw(kind, k) for k in clients]

    def written(self, description: str) -> Json:
        return {
            "protocol": VERSION,
            "kind": "refused rounds",
            "description": description,
            "base": self.name,
            "cases": self.cases,
        }


def _repeated(kind: str, message: bytes, client: int | None = None) -> list[Json]:
    case = {"kind": kind, "message": bytes(message).hex()}
    return [case if client is None else case | {"client": client}]


# fmt: off
# The formatter would give every argument of a case a line of its own.
def refused_openings(f: Forge) -> None:
    """Cases of section 7; three clients."""
    terms, other = f.terms.hash, random_bytes("other")
    stranger = identity("nobody")
    commits, opens = f.list_of("commit", range(3)), f.list_of("open", range(3))
    forged = f.changed("open", 1, nonce=other)

    def commitments(*raw: bytes, terms: bytes = terms) -> dict[str, dict[int, bytes]]:
        return {"commitments": {0: encode_server(Commitments(terms, list(raw)))}}

    def opened(*raw: bytes) -> dict[str, dict[int, bytes]]:
        return {"opened": {0: encode_server(Opened(terms, list(raw)))}}

    at = ("server", "commit")
    f.add("a commitment under other terms", *at, "WrongTerms", {"commit": {1: f.changed("commit", 1,
          terms=other)}})
    f.add("a commitment that another client signed", *at, "BadSignature", {"commit": {1:
          sign_raw(f.raw("commit", 1)[8:-64], f.key(2))}})
    f.add("a commitment of a client that is not on the roster", *at, "UnknownClient", {"commit": {1:
          sign_raw(msgspec.msgpack.encode(Commit(terms, 9, other)), stranger)}})
    f.add("a commitment with a payload", *at, "MalformedMessage", {"commit": {1:
          sign_raw(f.raw("commit", 1)[8:-64], f.key(1), bytes(24))}})
    f.add("two commitments of one client", *at, "DuplicateMessage", extra=_repeated("commit",
          f.changed("commit", 1, commitment=other)))
    f.add("too few commitments", *at, "TooFewClients", {"commit": {2: None}})
    f.add("a nonce before all commitments are in", *at, "OutOfOrder", {"commit": {1: opens[1]}})
    at = ("client 0", "commitments")
    f.add("commitments under other terms", *at, "WrongTerms", commitments(*commits, terms=other))
    f.add("commitments without one's own", *at, "WrongOpening", commitments(*commits[1:]))
    f.add("another commitment as one's own", *at, "WrongOpening", commitments(f.changed("commit", 0,
          commitment=other), *commits[1:]))
    f.add("commitments out of order", *at, "MalformedMessage", commitments(*commits[::-1]))
    f.add("a commitment twice", *at, "MalformedMessage", commitments(commits[0], *commits))
    f.add("a commitment with a changed byte", *at, "BadSignature", commitments(*commits[:2],
          _flipped(commits[2], -70)))
    f.add("a nonce among commitments", *at, "MalformedMessage", commitments(*commits[:2], opens[2]))
    f.add("a commitment under other terms among commitments", *at, "WrongTerms",
          commitments(*commits[:2], f.changed("commit", 2, terms=other)))
    f.add("nonces where commitments are awaited", *at, "OutOfOrder", {"commitments": {0:
          f.raw("opened")}})
    f.add("a message of an attempt before the session is open", *at, "WrongTerms", {"commitments":
          {0: f.raw("invite")}})
    at = ("server", "open")
    f.add("a nonce that does not fit its commitment", *at, "WrongOpening", {"open": {1: forged}})
    f.add("a nonce that stayed away", *at, "WrongOpening", {"open": {2: None}})
    at = ("client 0", "opened")
    f.add("an opened nonce that does not fit", *at, "WrongOpening", opened(opens[0], forged,
          opens[2]) )
    f.add("nonces without one", *at, "WrongOpening", opened(*opens[:2]))
    f.add("nonces out of order", *at, "WrongOpening", opened(*opens[::-1]))
    f.add("other commitments once they were shown", *at, "OutOfOrder", {"opened": {0:
          encode_server(Commitments(terms, commits[:2]))}})


def refused_setups(f: Forge) -> None:
    """Cases of steps 1 and 2; three clients."""
    sid, number, attempt = f.step
    other = random_bytes("other")
    shown = f.list_of("advertise", range(3))

    def invite(*step: Any) -> dict[str, dict[int, bytes]]:
        return {"invite": {0: encode_server(Invite(*step))}}

    def advertised(*raw: bytes) -> dict[str, dict[int, bytes]]:
        return {"advertised": {0: encode_server(Advertised(*f.step, list(raw)))}}

    at = ("client 0", "invite")
    f.add("an invitation of another session", *at, "WrongTerms", invite(other, number, attempt))
    f.add("an invitation to round 0", *at, "ReplayedRound", invite(sid, 0, attempt))
    last = f.terms.rounds
    f.add("an invitation to a round after the last", *at, "ReplayedRound", invite(
          sid, last + 1, attempt))
    f.add("an invitation to attempt 16", *at, "ReplayedRound", invite(sid, number, 16))
    f.add("an earlier attempt after a later one", *at, "ReplayedRound", extra=_repeated("invite",
          encode_server(Invite(sid, number, 0)), 0))
    f.add("shares delivered to a client that waits for keys", *at, "OutOfOrder", {"invite": {0:
          f.raw("delivery")}})
    at = ("server", "advertise")
    f.add("keys under other terms", *at, "WrongTerms", {"advertise": {1: f.changed("advertise", 1,
          terms=other)}})
    f.add("keys of another attempt", *at, "WrongTerms", {"advertise": {1: f.changed("advertise", 1,
          attempt=2)}})
    f.add("keys of another session", *at, "WrongTerms", {"advertise": {1: f.changed("advertise", 1,
          sid=other)}})
    f.add("two pairs of keys of one client", *at, "DuplicateMessage", extra=_repeated("advertise",
          f.changed("advertise", 1, mask_key=other)))
    f.add("too few keys", *at, "TooFewClients", {"advertise": {2: None}})
    at = ("client 0", "advertised")
    own, first = f.old("advertise", 0), f.old("advertise", 1)
    f.add("a sealing key that is another client's", *at, "KeySubstitution", advertised(*shown[:2],
          f.changed("advertise", 2, sealing_key=first.sealing_key)))
    f.add("a mask key that is another client's sealing key", *at, "KeySubstitution",
          advertised(*shown[:2], f.changed("advertise", 2, mask_key=own.sealing_key)))
    f.add("one key for both purposes", *at, "KeySubstitution", advertised(*shown[:2],
          f.changed("advertise", 2, mask_key=other, sealing_key=other)))
    f.add("one's own keys, signed, and not as they were sent", *at, "KeySubstitution",
          advertised(f.changed("advertise", 0, mask_key=other), *shown[1:]))
    f.add("one's own keys with another seed commitment", *at, "KeySubstitution",
          advertised(f.changed("advertise", 0, seed_commitment=other), *shown[1:]))
    f.add("a sealing key of small order", *at, "KeySubstitution", advertised(*shown[:2],
          f.changed("advertise", 2, sealing_key=bytes(32))))
    f.add("keys out of order", *at, "MalformedMessage", advertised(*shown[::-1]))
    f.add("too few keys in the neighbourhood", *at, "TooFewClients", advertised(*shown[:2]))
    f.add("keys with a signature of another client", *at, "BadSignature", advertised(*shown[:2],
          sign_raw(shown[2][8:-64], f.key(1))))
    f.add("keys of another attempt among those shown", *at, "WrongTerms", advertised(*shown[:2],
          f.changed("advertise", 2, attempt=0)))
    f.add("keys under other terms among those shown", *at, "WrongTerms", advertised(*shown[:2],
          f.changed("advertise", 2, terms=other)))
    f.add("a commitment among keys", *at, "MalformedMessage", advertised(*shown[:2], f.raw("commit",
          2)))
    f.add("keys shown in another attempt", *at, "ReplayedRound", {"advertised": {0:
          encode_server(Advertised(sid, number, 2, shown))}})
    f.add("keys shown in another round", *at, "OutOfOrder", {"advertised": {0:
          encode_server(Advertised(sid, number + 1, 1, shown))}})
    f.add("a second, other list of keys", *at, "OutOfOrder", extra=_repeated("advertised",
          encode_server(Advertised(*f.step, shown[::-1])), 0))
    sealed = f.old("shares", 1).sealed
    at = ("server", "shares")
    f.add("no share for one neighbour", *at, "BadShare", {"shares": {1: f.changed("shares", 1,
          sealed=sealed[:1])}})
    f.add("a share for oneself", *at, "BadShare", {"shares": {1: f.changed("shares", 1,
          sealed=[sealed[0], (1, sealed[0][1]), sealed[1]])}})
    f.add("a sealed share of 91 bytes", *at, "MalformedMessage", {"shares": {1: f.changed("shares",
          1, sealed=[sealed[0], (2, sealed[1][1][1:])])}})
    f.add("shares before all keys are in", "server", "advertise", "OutOfOrder",
          {"advertise": {1: f.raw("shares", 1)}})
    f.add("keys once more after they were shown", *at, "LateMessage", {"shares": {1:
          f.raw("advertise", 1)}})


def refused_vectors(f: Forge) -> None:
    """Cases of step 3; three clients."""
    other = random_bytes("other")
    (one, two), members = f.old("delivery", 0).sealed, [0, 1, 2]

    def delivery(sealed: Any, members: Any = members) -> dict[str, dict[int, bytes]]:
        return {"delivery": {0: encode_server(Delivery(*f.step, list(members), list(sealed)))}}

    at = ("client 0", "delivery")
    f.add("a sealed share with a changed byte", *at, "BadShare", delivery([one, (2, _flipped(two[1],
          -1))]))
    f.add("a sealed share with another nonce", *at, "BadShare", delivery([one, (2, _flipped(two[1],
          0))]))
    f.add("sealed shares under each other's owners", *at, "BadShare", delivery([(1, two[1]), (2,
          one[1])]))
    f.add("a share that was sealed for another client", *at, "BadShare", delivery([one, (2,
          dict(f.old("delivery", 1).sealed)[2])]))
    f.add("no share of a member", *at, "BadShare", delivery([one]))
    f.add("a share of oneself", *at, "BadShare", delivery([(0, one[1]), one, two]))
    f.add("shares out of order", *at, "BadShare", delivery([two, one]))
    f.add("members out of order", *at, "MalformedMessage", delivery([one, two], [0, 2, 1]))
    f.add("a member twice", *at, "MalformedMessage", delivery([one, two], [0, 1, 1, 2]))
    f.add("a member that was not invited", *at, "UnknownClient", delivery([one, two], [0, 1, 2, 3]))
    f.add("members without oneself", *at, "UnknownClient", delivery([one, two], [1, 2]))
    f.add("too few members", *at, "TooFewClients", delivery([one], [0, 1]))
    small = f.changed("advertise", 2, mask_key=(1).to_bytes(32, "little"))
    shown = encode_server(Advertised(*f.step, [*f.list_of("advertise", (0, 1)), small]))
    f.add("a mask key of small order, at the step that uses it", *at, "KeySubstitution",
          {"advertised": {0: shown}})
    at = ("server", "masked input")
    raw = f.raw("masked input", 1)
    f.add("a vector with a wrong context", *at, "ModelMismatch", {"masked input": {1:
          f.changed("masked input", 1, context=other)}})
    f.add("a vector with a changed byte", *at, "BadSignature", {"masked input": {1: _flipped(raw,
          8)}} )
    f.add("a vector of another attempt", *at, "WrongTerms", {"masked input": {1:
          f.changed("masked input", 1, attempt=0)}})
    f.add("a vector that another client signed", *at, "BadSignature", {"masked input": {1:
          sign_raw(raw[32:-64], f.key(2), raw[8:32])}})
    f.add("a vector with one value too few", *at, "MalformedMessage", {"masked input": {1:
          sign_raw(raw[32:-64], f.key(1), raw[8:28])}})
    f.add("two vectors of one client", *at, "DuplicateMessage", extra=_repeated("masked input",
          sign_raw(raw[32:-64], f.key(1), bytes(24))))
    f.add("too few vectors", *at, "TooFewClients", {"masked input": {1: None}})
    f.add("shares once more after the members are fixed", *at, "LateMessage", {"masked input": {1:
          f.raw("shares", 1)}})


def refused_survivors(f: Forge) -> None:
    """Cases of steps 3 to 5 in which a client dropped out: client 2 of five."""
    other = random_bytes("other")
    sealed = f.old("delivery", 0).sealed

    def survivors(alive: Sequence[int], gone: Sequence[int]) -> dict[str, dict[int, bytes]]:
        return {"survivors": {0: encode_server(Survivors(*f.step, list(alive), list(gone)))}}

    def agreements(*raw: bytes) -> dict[str, dict[int, bytes]]:
        return {"agreements": {0: encode_server(Agreements(*f.step, list(raw)))}}

    shown = f.list_of("advertise", range(1, 5))
    f.add("keys without one's own", "client 0", "advertised", "KeySubstitution", {"advertised": {0:
          encode_server(Advertised(*f.step, shown))}})
    f.add("a share of a client that is no member", "client 0", "delivery", "BadShare", {"delivery":
          {0: encode_server(Delivery(*f.step, [0, 1, 2, 3], sealed))}})
    f.add("members without oneself", "client 0", "delivery", "UnknownClient", {"delivery": {0:
          encode_server(Delivery(*f.step, [1, 2, 3, 4], sealed))}})
    at = ("client 0", "survivors")
    f.add("a client that survived and dropped out", *at, "InvalidSurvivors", survivors([0, 1, 2, 3,
          4], [2]))
    f.add("a member that did neither", *at, "InvalidSurvivors", survivors([0, 1, 3, 4], []))
    f.add("a survivor that is no member", *at, "InvalidSurvivors", survivors([0, 1, 3, 4, 5], [2]))
    f.add("oneself among the dropped", *at, "InvalidSurvivors", survivors([1, 2, 3, 4], [0]))
    f.add("survivors out of order", *at, "MalformedMessage", survivors([0, 3, 1, 4], [2]))
    f.add("a survivor twice", *at, "MalformedMessage", survivors([0, 1, 3, 4, 4], [2]))
    f.add("too few survivors", *at, "TooFewClients", survivors([0, 1, 3], [2, 4]))
    f.add("signatures before survivors", *at, "OutOfOrder", {"survivors": {0: f.raw("agreements")}})
    f.add("a second set of survivors", *at, "OutOfOrder", extra=_repeated("survivors",
          encode_server(Survivors(*f.step, [0, 1, 2, 3, 4], [])), 0))
    at = ("server", "agreement")
    f.add("a signature on other survivors", *at, "InvalidSurvivors", {"agreement": {1:
          f.changed("agreement", 1, survivors=other)}})
    f.add("a signature on another context", *at, "ModelMismatch", {"agreement": {1:
          f.changed("agreement", 1, context=other)}})
    f.add("a signature of a client that dropped out", *at, "UnknownClient", {"agreement": {1:
          f.changed("agreement", 1, client=2)}})
    f.add("a vector after the step was closed", *at, "LateMessage", extra=_repeated("agreement",
          bytes.fromhex(f.document["lost"]["2"])))
    f.add("too few signatures", *at, "TooFewSignatures", {"agreement": {1: None}})
    at = ("client 0", "agreements")
    good = f.list_of("agreement", (0, 1, 3, 4))
    everyone = digest("survivors", [0, 1, 2, 3, 4])
    f.add("one signature fewer than t", *at, "TooFewSignatures", agreements(*good[:3]))
    of_2 = sign_raw(msgspec.msgpack.encode(Agreement(*f.step, 2, f.context, f.survivors)), f.key(2))
    f.add("signatures without one's own", *at, "TooFewSignatures", agreements(good[1], of_2,
          *good[2:]))
    f.add("a client that was told other survivors", *at, "Equivocation", agreements(*good[:3],
          f.changed("agreement", 4, survivors=everyone)))
    f.add("a client with another model", *at, "ModelMismatch", agreements(*good[:3],
          f.changed("agreement", 4, context=other)))
    f.add("a signature of another attempt", *at, "WrongTerms", agreements(*good[:3],
          f.changed("agreement", 4, attempt=0)))
    f.add("a signature that another client made", *at, "BadSignature", agreements(*good[:3],
          sign_raw(good[3][8:-64], f.key(3))))
    f.add("a signature twice in place of another", *at, "MalformedMessage", agreements(*good[:3],
          good[2]))
    of_5 = msgspec.msgpack.encode(Agreement(*f.step, 5, f.context, f.survivors))
    of_5 = sign_raw(of_5, f.key(4))
    f.add("a signature of a client that is no member", *at, "UnknownClient",
          agreements(*good, of_5))
    f.add("keys among signatures", *at, "MalformedMessage", agreements(*good[:3], f.raw("advertise",
          4)))
    refused_reveals(f)


def refused_reveals(f: Forge) -> None:
    """Cases of what the server makes of revealed shares."""
    seeds, keys = f.old("reveal", 1).seeds, f.old("reveal", 1).mask_keys
    field = PRIME.to_bytes(32, "little")

    def reveal(client: int = 1, **fields: Any) -> dict[str, dict[int, bytes]]:
        return {"reveal": {client: f.changed("reveal", client, **fields)}}

    at = ("server", "reveal")
    f.add("a survivor's seed that is kept back", *at, "BadShare", reveal(seeds=seeds[:-1]))
    f.add("the mask key of a survivor", *at, "BadShare", reveal(mask_keys=[*keys, seeds[-1]]))
    f.add("the mask key that was asked for, kept back", *at, "BadShare", reveal(mask_keys=[]))
    f.add("a reveal of another attempt", *at, "WrongTerms", reveal(attempt=0))
    f.add("a reveal that another client signed", *at, "BadSignature", {"reveal": {1:
          sign_raw(f.raw("reveal", 1)[8:-64], f.key(3))}})
    f.add("two reveals of one client", *at, "DuplicateMessage", extra=_repeated("reveal",
          f.changed("reveal", 1, seeds=[(k, field) for k, _ in seeds])))
    at = ("server", "sum")
    f.add("too few reveals", *at, "TooFewClients", {"reveal": {1: None}})
    f.add("a share of a seed that is p", *at, "BadShare", reveal(seeds=[(seeds[0][0], field),
          *seeds[1:]]))
    f.add("a share of a mask key that is 2²⁵⁶ − 1", *at, "BadShare", reveal(mask_keys=[(keys[0][0],
          b"\xff" * 32)]))
    f.add("a wrong share of a seed", *at, "WrongRebuiltKey", reveal(seeds=[*seeds[:-1],
          (seeds[-1][0], _flipped(seeds[-1][1], 0))]))
    f.add("a wrong share of a mask key", *at, "WrongRebuiltKey", reveal(mask_keys=[(keys[0][0],
          _flipped(keys[0][1], 0))]))
    f.add("shares of seeds under each other's owners", *at, "WrongRebuiltKey",
          reveal(seeds=[(seeds[0][0], seeds[1][1]), (seeds[1][0], seeds[0][1]), *seeds[2:]]))



def refused_generators(f: Forge) -> None:
    """Cases of section 2: a client that would make its masks in another way; four clients."""
    other = replace(f.terms, mask_generator=AES).hash
    changed = {kind: f.changed(kind, 1, terms=other) for kind in ("commit", "open", "advertise")}
    commits, opens, shown = (
        [data if k == 1 else f.raw(kind, k) for k in range(4)] for kind, data in changed.items()
    )
    terms = f.terms.hash
    for kind, data in changed.items():
        f.add(f"{kind} of a client with another generator", "server", kind, "WrongTerms",
              {kind: {1: data}})
    f.add("a commitment of a client with another generator, shown", "client 0", "commitments",
          "WrongTerms", {"commitments": {0: encode_server(Commitments(terms, commits))}})
    f.add("commitments under terms with another generator", "client 0", "commitments",
          "WrongTerms", {"commitments": {0: encode_server(Commitments(other, commits))}})
    f.add("a nonce of a client with another generator, shown", "client 0", "opened", "WrongTerms",
          {"opened": {0: encode_server(Opened(terms, opens))}})
    f.add("keys of a client with another generator, shown", "client 0", "advertised", "WrongTerms",
          {"advertised": {0: encode_server(Advertised(*f.step, shown))}})

# fmt: on


def documents(tried: bool) -> dict[str, Json]:
    """All vectors by file name."""
    three = make_round("round-3", "Three clients, all of whom survive.", 3, [])
    five = make_round("round-5", "Five clients; the vector of client 2 is lost.", 5, [2])
    without = make_round(
        "round-3-without-step-4",
        "Three clients whose terms leave the signatures on the survivors out.",
        3,
        [],
        consistency=False,
    )
    four = make_round(
        "round-4-chacha20",
        "Four clients with masks from ChaCha20; the vector of client 2 is lost.",
        4,
        [2],
        size=18,
        mask_generator="chacha20",
    )
    of_four = Forge("round-4-chacha20.json", four, tried)
    of_three, of_five = Forge("round-3.json", three, tried), Forge("round-5.json", five, tried)
    refused_openings(of_three)
    refused_setups(of_three)
    refused_vectors(of_three)
    refused_survivors(of_five)
    refused_generators(of_four)
    found = {
        "chacha20": chacha20(),
        "derivation": derivation(),
        "graph": graphs(),
        "quantiser": quantiser(),
        "refused-messages": refused_messages(),
        "refused-round-3": of_three.written("Wrong messages in round-3.json, one a case."),
        "refused-round-5": of_five.written("Wrong messages in round-5.json, one a case."),
        "refused-round-4-chacha20": of_four.written(
            "Clients with another generator in round-4-chacha20.json, one a case."
        ),
        "refused-values": refused_values(),
        "round-3": three,
        "round-3-without-step-4": without,
        "round-4-chacha20": four,
        "round-5": five,
        "shamir": shamir(),
        "signatures": signatures(),
        "stream": streams(),
    }
    return {f"{name}.json": document for name, document in found.items()}


def write(folder: Path, tried: bool = True) -> None:
    """Write all files; ``tried``: after the package has refused each of the bad rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in documents(tried).items():
        (folder / name).write_text(_text(document), encoding="utf-8")


def _text(document: Json) -> str:
    """JSON with one line per case."""
    if "cases" not in document:
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    head = json.dumps({**document, "cases": []}, indent=1, ensure_ascii=False)
    cases = [json.dumps(case, ensure_ascii=False) for case in document["cases"]]
    return head.removesuffix("[]\n}") + "[\n  " + ",\n  ".join(cases) + "\n ]\n}\n"


if __name__ == "__main__":
    write(VECTORS)
