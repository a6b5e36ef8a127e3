"""Identity files and rosters: what is readable by others, damaged or taken is refused by name."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsa_secure.errors import BadSignature, IdentityError
from fedsa_secure.secagg import Identity, load_roster, register
from fedsa_secure.secagg.identity import verify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "client.pem"


def test_an_identity_comes_back_from_its_file(path: Path) -> None:
    identity = Identity.new()
    identity.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = Identity.load(path)
    assert loaded.public_key == identity.public_key
    verify(identity.public_key, loaded.sign(b"message"), b"message")


def test_an_identity_is_never_overwritten(path: Path) -> None:
    Identity.new().save(path)
    before = path.read_bytes()
    with pytest.raises(IdentityError, match="never overwritten"):
        Identity.new().save(path)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_or_read(path: Path) -> None:
    with pytest.raises(IdentityError, match="cannot write"):
        Identity.new().save(path / "below" / "a.pem")
    with pytest.raises(IdentityError, match="keys new"):
        Identity.load(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o610])
def test_a_key_that_others_may_read_is_refused(path: Path, mode: int) -> None:
    Identity.new().save(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"mode {mode:04o}.*chmod 600"):
        Identity.load(path)


def other_key() -> bytes:
    return X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def locked_key() -> bytes:
    return Identity.new()._key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )


@pytest.mark.parametrize("content", [b"", b"nonsense", other_key(), locked_key()])
def test_a_file_without_an_ed25519_key_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="no Ed25519 private key"):
        Identity.load(path)


def test_a_signature_holds_for_its_key_and_message_only() -> None:
    identity = Identity.new()
    signature = identity.sign(b"message")
    verify(identity.public_key, signature, b"message")
    for arguments in (
        (Identity.new().public_key, signature, b"message"),
        (identity.public_key, signature, b"massage"),
        (identity.public_key, bytes(64), b"message"),
        (identity.public_key[:31], signature, b"message"),
    ):
        for _ in range(2):  # what failed is not remembered as good
            with pytest.raises(BadSignature):
                verify(*arguments)


def test_registered_clients_are_on_the_roster_in_order(tmp_path: Path) -> None:
    path, keys = tmp_path / "roster.json", {k: Identity.new().public_key for k in (2, 0, 1)}
    for client, key in keys.items():
        roster = register(path, client, key.hex())
    assert load_roster(path) == roster == keys
    assert list(load_roster(path)) == [0, 1, 2]


def test_what_cannot_be_registered_leaves_the_roster_alone(tmp_path: Path) -> None:
    path, key = tmp_path / "roster.json", Identity.new().public_key.hex()
    register(path, 0, key)
    before = path.read_bytes()
    for client, public_key, match in (
        (0, Identity.new().public_key.hex(), "client 0 is on"),
        (1, key, "occurs twice"),
        (1, "no hex", "64 hexadecimal digits"),
        (1, key[:-2], "64 hexadecimal digits"),
        (-1, Identity.new().public_key.hex(), "a number from 0"),
        (2**32, Identity.new().public_key.hex(), "a number from 0"),  # no message holds it
    ):
        with pytest.raises(IdentityError, match=match):
            register(path, client, public_key)
        assert path.read_bytes() == before
    with pytest.raises(IdentityError, match=r"cannot write the roster .*: No such file"):
        register(tmp_path / "nowhere" / "roster.json", 0, key)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"clients": []}',
        '{"clients": {"a": "00"}}',
        '{"clients": {"0": "xy"}}',
        '{"clients": {"0": 5}}',
        '{"clients": {"0": "00"}}',
        json.dumps({"clients": {"-1": "00" * 32}}),
        json.dumps({"clients": {"0": "00" * 32, "1": "00" * 32}}),
    ],
)
def test_a_file_that_is_no_roster_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "roster.json"
    path.write_text(content)
    with pytest.raises(IdentityError, match=r"roster"):
        load_roster(path)


def test_a_roster_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="cannot read the roster"):
        load_roster(tmp_path / "roster.json")


def test_an_identity_of_known_secret_bytes() -> None:
    """RFC 8032 §7.1, test 1."""
    secret = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    identity = Identity.from_secret(bytes.fromhex(secret))
    assert identity.public_key.hex() == public
    assert identity.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974")
