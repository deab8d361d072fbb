"""Envelope encryption, and the master keys: a file, a passphrase, Vault, the enclave."""

from __future__ import annotations

import ssl
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attestation_files import calls_of, mounted, needs_fuse
from hypothesis import given
from hypothesis import strategies as st
from small_enclaves import Signers, sign_image, small_image
from store_cases import ALICE, refused
from store_vault import Documented, Vault, documented_vault, real_vault

from inclavare.config import Config
from inclavare.errors import InclavareError
from inclavare.sdk import attest
from inclavare.serving import own_certificate
from inclavare.tee.sgx_sim import create
from inclavare.verdict.store import (
    Damaged,
    FileKey,
    PassphraseKey,
    SealedKey,
    Store,
    TransitKey,
    WrongMasterKey,
    crypto,
)

ROOT, AAD = bytes(range(32)), b"what it belongs to"
QUICK = {"n": 1 << 14}


# --- envelopes


@given(value=st.binary(max_size=200), aad=st.binary(max_size=40))
def test_envelopes(value: bytes, aad: bytes) -> None:
    sealed = crypto.seal(ROOT, 7, value, aad)
    assert (len(sealed.wrapped_key), len(sealed.sealed)) == (60, len(value) + 28)
    assert crypto.unseal(ROOT, sealed, aad) == value
    assert crypto.seal(ROOT, 7, value, aad).wrapped_key != sealed.wrapped_key


@given(position=st.integers(0, 200), bit=st.integers(0, 7))
def test_no_bit_of_an_envelope_can_be_changed(position: int, bit: int) -> None:
    sealed = crypto.seal(ROOT, 7, b"value", AAD)
    for name in ("wrapped_key", "sealed"):
        raw = bytearray(getattr(sealed, name))
        raw[position % len(raw)] ^= 1 << bit
        fields = {"wrapped_key": sealed.wrapped_key, "sealed": sealed.sealed, name: bytes(raw)}
        with pytest.raises(Damaged):
            crypto.unseal(ROOT, crypto.Envelope(7, **fields), AAD)
    for other in (crypto.Envelope(8, sealed.wrapped_key, sealed.sealed), crypto.Envelope(7, b"", sealed.sealed),
                  crypto.Envelope(7, sealed.wrapped_key, b"")):  # fmt: skip
        with pytest.raises(Damaged):
            crypto.unseal(ROOT, other, AAD)
    with pytest.raises(Damaged):
        crypto.unseal(ROOT, sealed, AAD + b"x")
    with pytest.raises(Damaged):
        crypto.unseal(ROOT[::-1], sealed, AAD)


@given(st.lists(st.binary(max_size=6), max_size=5), st.lists(st.binary(max_size=6), max_size=5))
def test_contexts_are_unambiguous(first: list[bytes], second: list[bytes]) -> None:
    assert (crypto.context(*first) == crypto.context(*second)) == (first == second)


# --- files


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "master.key"
    key = FileKey.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    wrapped = key.wrap(ROOT, AAD)
    assert FileKey.load(path).unwrap(wrapped, AAD, key.parameters()) == ROOT
    error = refused("verdict.store.master.file", FileKey.create, path)
    assert "without it" in str(error.remedy)
    path.chmod(0o640)
    refused("verdict.store.master.file", FileKey.load, path)
    path.chmod(0o600)
    for content in (b"", b"junk", b"AAAA", b"\xff" * 40):
        path.write_bytes(content)
        error = refused("verdict.store.master.file", FileKey.load, path)
        assert content.decode("latin1") not in error.one_line() or not content
    refused("verdict.store.master.file", FileKey.load, tmp_path / "none")
    refused("verdict.store.master.size", FileKey, bytes(31))


def test_another_key_file(tmp_path: Path) -> None:
    one, two = FileKey(bytes(32)), FileKey(bytes(31) + b"\1")
    wrapped = one.wrap(ROOT, AAD)
    error = refused("verdict.store.master.wrong", two.unwrap, wrapped, AAD, one.parameters())
    assert two.parameters()["fingerprint"] in str(error.found) and one.parameters()["fingerprint"] in str(
        error.expected
    )
    refused("verdict.store.master.wrong", two.unwrap, wrapped, AAD, two.parameters())
    refused("verdict.store.master.wrong", one.unwrap, wrapped, AAD + b"x", one.parameters())
    refused("verdict.store.master.wrong", one.unwrap, b"", AAD, one.parameters())


# --- passphrases


def test_a_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(b"correct horse battery staple\n")
    refused("verdict.store.master.file", PassphraseKey.load, path)
    path.chmod(0o600)
    key = PassphraseKey(b"correct horse battery staple", **QUICK)
    wrapped, parameters = key.wrap(ROOT, AAD), key.parameters()
    assert {**parameters, "salt": ""} == {"n": 1 << 14, "r": 8, "p": 1, "salt": ""} and len(parameters["salt"]) == 32
    again = PassphraseKey.load(path)
    assert again.unwrap(wrapped, AAD, parameters) == ROOT
    assert again.parameters() == parameters, "later generations take the same salt"
    for other in (b"correct horse battery staplf", b"correct horse battery staple\n"):
        refused("verdict.store.master.wrong", PassphraseKey(other).unwrap, wrapped, AAD, parameters)
    refused("verdict.store.master.passphrase", PassphraseKey, b"short")


@pytest.mark.parametrize(
    "change",
    [{"n": 1 << 30}, {"r": 1 << 20}, {"p": 1 << 20}, {"n": 2}, {"n": 0}, {"n": "x"}, {"n": (1 << 14) + 1}, {"salt": ""},
     {"salt": "zz"}, {"salt": None}, {"n": True}],
)  # fmt: skip
def test_who_writes_to_the_database_chooses_neither_our_memory_nor_a_weak_derivation(change: dict[str, Any]) -> None:
    key = PassphraseKey(b"correct horse battery staple", **QUICK)
    refused("verdict.store.master.wrong", key.unwrap, bytes(60), AAD, {**key.parameters(), **change})
    refused("verdict.store.master.wrong", key.unwrap, bytes(60), AAD, {})


def test_scrypt_is_the_one_of_the_rfc() -> None:
    """RFC 7914, section 12, fourth vector's function, with parameters that this takes."""
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    key = PassphraseKey(b"pleaseletmein", **QUICK)
    derived = Scrypt(bytes.fromhex(key.parameters()["salt"]), 32, 1 << 14, 8, 1).derive(b"pleaseletmein")
    assert crypto.decrypt(derived, key.wrap(ROOT, AAD), AAD) == ROOT


# --- Vault


@pytest.fixture(scope="module", params=["real", "documented"])
def vault(request: pytest.FixtureRequest) -> Iterator[Vault]:
    with real_vault() if request.param == "real" else documented_vault(Documented()) as running:
        yield running


@pytest.fixture
def token_file(vault: Vault, tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(vault.token + "\n")
    path.chmod(0o600)
    return path


def test_vaults_transit(vault: Vault, token_file: Path) -> None:
    key = TransitKey(vault.url, "verdictd", token_file=token_file)
    wrapped, parameters = key.wrap(ROOT, AAD), key.parameters()
    assert wrapped.startswith(b"vault:v") and ROOT not in wrapped
    assert TransitKey(vault.url + "/", "verdictd", token_file=token_file).unwrap(wrapped, AAD, parameters) == ROOT
    vault.call("POST", "transit/keys/verdictd/rotate")
    assert key.unwrap(wrapped, AAD, parameters) == ROOT, "Vault keeps the older versions of its key"
    assert key.wrap(ROOT, AAD)[:8] != wrapped[:8]
    for text, aad in ((wrapped, AAD + b"x"), (wrapped[:-4] + b"AAAA", AAD), (b"junk", AAD), (b"\xff", AAD), (b"", AAD)):
        refused("verdict.store.master.wrong", key.unwrap, text, aad, parameters)
    other = TransitKey(vault.url, "another", token_file=token_file)
    refused("verdict.store.master.wrong", other.unwrap, wrapped, AAD, parameters)


def test_vault_refuses(vault: Vault, token_file: Path) -> None:
    key = TransitKey(vault.url, "verdictd", token_file=token_file)
    wrapped = key.wrap(ROOT, AAD)
    token_file.write_text("hvs.somebodyelses")
    error = refused("verdict.store.master.vault.forbidden", key.unwrap, wrapped, AAD, key.parameters())
    assert "hvs." not in error.one_line() and "transit/decrypt/verdictd" in str(error.expected)
    token_file.chmod(0o644)
    refused("verdict.store.master.vault.token", key.wrap, ROOT, AAD)
    token_file.unlink()
    refused("verdict.store.master.vault.token", key.wrap, ROOT, AAD)


def test_vault_is_away(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hvs.x")
    token.chmod(0o600)
    error = refused(
        "verdict.store.master.vault.unavailable",
        TransitKey("http://127.0.0.1:1", "k", token_file=token).wrap,
        ROOT,
        AAD,
    )
    assert error.exit_code == 6
    for url in ("http://vault.example.com:8200", "ftp://localhost", "vault", "http://10.0.0.1"):
        refused("verdict.store.master.vault.url", TransitKey, url, "k", token_file=token)


def test_vaults_certificate_is_verified(tmp_path: Path) -> None:
    certificate, private = own_certificate(tmp_path / "tls", [], common_name="vault")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, private)
    token = tmp_path / "token"
    token.write_text("hvs.documented")
    token.chmod(0o600)
    with documented_vault(Documented(), tls) as vault:
        refused(
            "verdict.store.master.vault.unavailable",
            TransitKey(vault.url, "verdictd", token_file=token).wrap,
            ROOT,
            AAD,
        )
        trusting = TransitKey(vault.url, "verdictd", token_file=token, ca_file=certificate)
        assert trusting.unwrap(trusting.wrap(ROOT, AAD), AAD, trusting.parameters()) == ROOT


def test_a_vault_that_is_away_stops_no_release(url: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hvs.documented")
    token.chmod(0o600)
    behaviour = Documented()
    with documented_vault(behaviour) as vault:
        store = Store.open(url, TransitKey(vault.url, "verdictd", token_file=token))
        store.tenants.create("acme")
        store.secrets.put("acme", "a/b/c", b"value")
    asked = len(behaviour.requests)
    store.secrets.put("acme", "a/b/c", b"newer")
    assert store.secrets.read("acme", "a/b/c", holder=ALICE) == b"newer" and len(behaviour.requests) == asked
    refused(
        "verdict.store.master.vault.unavailable", Store.open, url, TransitKey(vault.url, "verdictd", token_file=token)
    )
    store.close()


# --- the enclave


@needs_fuse
def test_a_key_that_is_sealed_to_the_enclave(
    config: Config, signers: Signers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str
) -> None:
    path = tmp_path / "master.sealed"

    def within(content: bytes, work: Callable[[], None]) -> None:
        image = small_image(content)
        enclave = create(config).load(image, sign_image(image, signers.ours).to_bytes(), label="test")
        with mounted(calls_of(enclave), []) as point, monkeypatch.context() as patch:
            patch.setattr(attest, "DIRECTORY", point)
            work()

    def first() -> None:
        with Store.open(url, SealedKey.create(path)) as store:
            store.tenants.create("acme")
            store.secrets.put("acme", "a/b/c", b"value")
        refused("verdict.store.master.file", SealedKey.create, path)

    def again() -> None:
        with Store.open(url, SealedKey.load(path)) as store:
            assert store.secrets.read("acme", "a/b/c", holder=ALICE) == b"value"

    def elsewhere() -> None:
        with pytest.raises(InclavareError) as caught:
            SealedKey.load(path)
        assert caught.value.id.startswith("sealing.")

    within(b"verdictd", first)
    within(b"verdictd", again)
    within(b"verdictd, changed", elsewhere)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setattr(attest, "DIRECTORY", tmp_path / "none")
    refused("sdk.seal.outside", SealedKey.load, path)
    refused("sdk.seal.outside", SealedKey.create, tmp_path / "other.sealed")


# --- stores


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        (FileKey(bytes(32)), FileKey(bytes(31) + b"\1")),
        (
            PassphraseKey(b"correct horse battery staple", **QUICK),
            PassphraseKey(b"wrong horse battery staple", **QUICK),
        ),
        (FileKey(bytes(32)), PassphraseKey(b"correct horse battery staple", **QUICK)),
        (FileKey(bytes(32)), SealedKey(bytes(32))),
    ],
)
def test_a_store_opens_with_its_master_key_only(url: str, ours: Any, other: Any) -> None:
    with Store.open(url, ours) as store:
        store.tenants.create("acme")
        store.secrets.put("acme", "a/b/c", b"value")
    with pytest.raises(WrongMasterKey) as caught:
        Store.open(url, other)
    assert caught.value.id == "verdict.store.master.wrong" and caught.value.remedy
    with Store.open(url, ours) as store:
        assert store.secrets.read("acme", "a/b/c", holder=ALICE) == b"value"
