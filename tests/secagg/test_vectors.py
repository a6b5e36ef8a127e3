"""The vectors of the protocol's page: package and independent checker find the same.

The checker shares nothing with the package, so a vector that both accept is what the page says.
"""

import ast
import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checker
import make_vectors
import pytest
from hypothesis import given
from hypothesis import strategies as st

FILES = sorted(path.name for path in make_vectors.VECTORS.glob("*.json"))
GOOD = [name for name in FILES if not name.startswith("refused")]
ROUNDS = [name for name in GOOD if name.startswith("round")]
LARGE = ["round-4-chacha20.json", "round-5.json"]


def load(name: str) -> Any:
    return json.loads((make_vectors.VECTORS / name).read_bytes())


def cases(kind: str) -> list[Any]:
    """All cases of one kind of file, named after what they say."""
    return [
        pytest.param(document, case, id=f"{name[:-5]}: {case['description']}")
        for name in FILES
        if (document := load(name))["kind"] == kind
        for case in document["cases"]
    ]


def test_generator_gives_the_committed_bytes(tmp_path: Path) -> None:
    make_vectors.write(tmp_path, tried=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (make_vectors.VECTORS / name).read_bytes(), name


# --- The checker ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_checker_accepts_the_file(name: str) -> None:
    """Good vectors hold, and of bad ones exactly the named step fails with the named error."""
    assert checker.check(load(name)) > 0


def test_checker_runs_as_a_script_and_fails_on_a_changed_file(tmp_path: Path) -> None:
    """Away from this folder, without the package, and without anything outside Python itself."""
    (tmp_path / "vectors" / "v1").mkdir(parents=True)
    script = tmp_path / "checker.py"
    script.write_bytes(Path(checker.__file__).read_bytes())
    for name in ("stream.json", "shamir.json"):
        content = (make_vectors.VECTORS / name).read_bytes()
        (tmp_path / "vectors" / "v1" / name).write_bytes(content)

    def run() -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(script)], capture_output=True, text=True, check=False
        )
        return done.returncode, [line.split(":")[0] for line in done.stdout.splitlines()]

    assert run() == (0, ["ok    shamir.json", "ok    stream.json"])
    changed = load("stream.json")
    changed["cases"][0]["returns"][0] ^= 1
    (tmp_path / "vectors" / "v1" / "stream.json").write_text(json.dumps(changed))
    assert run() == (1, ["ok    shamir.json", "FAIL  stream.json"])


def test_checker_imports_the_standard_library_alone() -> None:
    """And of that nothing with a cipher or a curve in it."""
    allowed = {
        *("collections.abc", "dataclasses", "fractions", "functools", "hashlib", "hmac"),
        *("itertools", "json", "math", "pathlib", "struct", "sys", "typing"),
    }
    tree = ast.parse(Path(checker.__file__).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module)
        elif isinstance(node, ast.Name):
            assert node.id not in ("__import__", "eval", "exec", "compile")
    assert found <= allowed


Place = tuple[str | int, ...]


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value of a document and where it stands."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, (*place, key))
    else:
        yield place, value


def flip(value: Any) -> Any:
    """Another value in its place; in hex one bit in the middle."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value ^ 0xFF
    if "0x" in value:  # a number with a fraction
        return (0.0).hex() if float.fromhex(value) else (1.0).hex()
    try:
        data = bytearray(bytes.fromhex(value))
    except ValueError:
        return value + "x"
    if not data:
        return "ff"
    data[len(data) // 2] ^= 0x10
    return data.hex()


def means_nothing(document: Any, place: Place) -> bool:
    """Texts, and the share that a rebuilding has to leave out."""
    if place[-1] == "description":
        return True
    return place[-1] == "4294967295" and document["cases"][place[1]]["function"] == "rebuild"


def undetected(document: Any, part: int = 0, parts: int = 1) -> list[Place]:
    """Values of which the checker does not notice that they were changed."""
    checker.check(document)
    missed = []
    for number, (place, value) in enumerate(list(leaves(document))):
        if number % parts != part or means_nothing(document, place):
            continue
        *way, last = place
        changed = document
        for key in way:
            changed = changed[key]
        changed[last] = flip(value)
        try:
            checker.check(document)
        except checker.MismatchError:
            pass
        else:
            missed.append(place)
        changed[last] = value
    checker.check(document)
    return missed


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ROUNDS])
def test_any_changed_value_of_a_function_is_found(name: str) -> None:
    document = load(name)
    for case in document["cases"]:
        assert undetected({**document, "cases": [case]}) == [], case["description"]


@pytest.mark.parametrize("name", ROUNDS)
def test_any_changed_value_of_a_round_is_found(name: str) -> None:
    """Of the largest rounds, every third value here and the others by hand."""
    assert undetected(load(name), 0, 3 if name in LARGE else 1) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("part", [1, 2])
def test_any_other_changed_value_of_a_round_is_found(name: str, part: int) -> None:
    assert undetected(load(name), part, 3) == []


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("refused-round")])
def test_a_good_message_in_place_of_the_bad_one_is_found(name: str) -> None:
    """No case fails for another reason than the message that it names."""
    document = load(name)
    for case in document["cases"]:
        innocent = copy.deepcopy(document)
        innocent["cases"] = [{**case, "replace": {}, "extra": []}]
        with pytest.raises(checker.MismatchError):
            checker.check(innocent)


# --- The package ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("document", "case"), cases("functions"))
def test_package_computes_the_vector(document: Any, case: Any) -> None:
    expected = {name: case[name] for name in ("returns", "error") if name in case}
    assert make_vectors.outcome(case) == expected


@pytest.mark.parametrize("name", ROUNDS)
def test_package_says_every_message_of_the_round(name: str) -> None:
    document = load(name)
    replay = make_vectors.Replay(document)
    assert replay.run() is None
    assert replay.server.total is not None
    assert replay.server.total.tolist() == document["sum"]
    messages = document["messages"]
    assert replay.said.keys() == messages.keys()
    for kind, said in replay.said.items():
        for client, data in said.items():
            expected = messages[kind]
            if not isinstance(expected, str):
                lost = document["lost"] if kind == "masked input" else {}
                expected = {**expected, **lost}[str(client)]
            assert data.hex() == expected, (kind, client)


@pytest.mark.parametrize(("document", "case"), cases("refused messages"))
def test_package_refuses_the_message(document: Any, case: Any) -> None:
    terms = make_vectors.read_terms(document["terms"])
    assert make_vectors.refusal(case, terms) == case["error"]


@pytest.mark.parametrize(("document", "case"), cases("refused rounds"))
def test_package_refuses_at_the_named_step(document: Any, case: Any) -> None:
    replay = make_vectors.Replay(load(document["base"]), case["replace"], case["extra"])
    assert replay.run() == case["refused"]


@given(
    numbers=st.lists(st.floats(-3.0, 3.0, width=32), min_size=1, max_size=8),
    clients=st.integers(2, 2000),
    bound=st.floats(1e-6, 10.0),
    key=st.binary(min_size=32, max_size=32),
)
def test_package_rounds_any_values_as_the_checker_does(
    numbers: list[float], clients: int, bound: float, key: bytes
) -> None:
    """The checker rounds with fractions, the package with floats."""
    case = {
        "function": "encode",
        "given": {
            "n": clients,
            "range": bound.hex(),
            "key": key.hex(),
            "values": [number.hex() for number in numbers],
        },
    }
    assert make_vectors.outcome(case) == {"returns": checker.f_encode(case["given"])}


# --- The checker's own primitives, against the RFCs -----------------------------------------------


def test_hkdf_of_rfc_5869() -> None:
    """Appendix A.1 and A.3."""
    secret = b"\x0b" * 22
    found = checker.hkdf(secret, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert found.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    assert checker.hkdf(secret, b"", b"", 42).hex() == (
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )


def test_aes_256_of_fips_197() -> None:
    """Appendix C.3."""
    block = bytes.fromhex("00112233445566778899aabbccddeeff")
    found = checker.aes256(bytes(range(32)), block)
    assert found.hex() == "8ea2b7ca516745bfeafc49904b496089"


def test_counter_mode_of_sp_800_38a() -> None:
    """F.5.5: the stream that is added to the four blocks, here from its counter on."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    stream = b"".join(word.to_bytes(4, "little") for word in checker.stream(key, 16, counter))
    assert bytes(a ^ b for a, b in zip(plain, stream, strict=True)).hex() == (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )


def test_x25519_of_rfc_7748() -> None:
    """Sections 5.2 and 6.1."""
    found = checker.x25519(
        bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"),
        bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"),
    )
    assert found.hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    found = checker.x25519(  # the highest bit of the point does not count
        bytes.fromhex("4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d"),
        bytes.fromhex("e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493"),
    )
    assert found.hex() == "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957"
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert checker.exchange(bob, alice).hex() == (
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )
    nine = (9).to_bytes(32, "little")
    assert checker.x25519(nine, nine).hex() == (
        "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    )


@pytest.mark.parametrize(
    ("seed", "public", "message", "signature"),
    [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
    ],
)
def test_ed25519_of_rfc_8032(seed: str, public: str, message: str, signature: str) -> None:
    """Section 7.1, tests 1 and 2."""
    key, data, signed = map(bytes.fromhex, (public, message, signature))
    assert checker.ed25519_public(bytes.fromhex(seed)) == key
    assert checker.ed25519_sign(bytes.fromhex(seed), data) == signed
    assert checker.ed25519_verify(key, signed, data)
    assert not checker.ed25519_verify(key, signed, data + b"\0")


def test_chacha20_block_of_rfc_8439() -> None:
    """Section 2.3.2."""
    nonce = bytes.fromhex("000000090000004a00000000")
    assert checker.chacha20_block(bytes(range(32)), 1, nonce).hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def test_chacha20_poly1305_of_rfc_8439() -> None:
    """Section 2.8.2."""
    key, nonce = bytes(range(0x80, 0xA0)), bytes.fromhex("070000004041424344454647")
    data = bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    content = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    )
    sealed = checker.aead_seal(key, nonce, content, data)
    assert sealed[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"
    assert sealed[:32].hex() == "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d6"
    assert checker.aead_open(key, nonce, sealed, data) == content
    with pytest.raises(checker.RefusedError, match="BadShare"):
        checker.aead_open(key, nonce, sealed, data + b"\0")
