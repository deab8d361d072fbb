"""Reference values signed through sigstore, verified without any network against the caller's trusted root."""

from __future__ import annotations

import base64
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_sigstore import IDENTITY, OIDC_ISSUER, SIGNED_AT, Sigstore
from test_references import CLAIMS, SUBJECT, TRUSTED, payload

from inclavare.attestation.references import ReferenceBundle, References, ReferenceValue, envelope_payload, revoked
from inclavare.attestation.references import revocation as revocation_statement
from inclavare.attestation.signers import SigstoreIdentity, TrustedSigners
from inclavare.errors import IntegrityError, UsageError


@pytest.fixture(scope="module")
def instance() -> Sigstore:
    return Sigstore()


@pytest.fixture
def root(tmp_path: Path, instance: Sigstore) -> Path:
    path = tmp_path / "trusted_root.json"
    path.write_text(json.dumps(instance.trusted_root()))
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def trusting(root: Path, identity: str = IDENTITY, issuer: str = OIDC_ISSUER) -> TrustedSigners:
    return TrustedSigners(sigstore=[SigstoreIdentity(root, identity, issuer)])


def cause(data: bytes, trusted: TrustedSigners) -> str:
    with pytest.raises(IntegrityError) as caught:
        ReferenceBundle.parse(data, trusted)
    return caught.value.id


def test_verified(instance: Sigstore, root: Path) -> None:
    data = instance.signed(payload())
    found = ReferenceBundle.parse(data, trusting(root))
    assert found.subjects == (SUBJECT,) and found.signers == (f"{IDENTITY} ({OIDC_ISSUER})",)
    assert envelope_payload(data) == payload()
    assert isinstance(found.references[0], ReferenceValue) and References([found]).active(2000) == (found,)


def test_revocation(instance: Sigstore, root: Path) -> None:
    data = instance.signed(revocation_statement(["12" * 32], "leaked", SIGNED_AT))
    assert revoked(data, trusting(root)) == {"12" * 32: "leaked"}


def test_several_identities(instance: Sigstore, root: Path) -> None:
    both = TrustedSigners(
        sigstore=[
            SigstoreIdentity(root, "other@example.org", OIDC_ISSUER),
            SigstoreIdentity(root, IDENTITY, OIDC_ISSUER),
        ]
    )
    assert ReferenceBundle.parse(instance.signed(payload()), both).signers == (f"{IDENTITY} ({OIDC_ISSUER})",)


def test_strangers(instance: Sigstore, root: Path, tmp_path: Path) -> None:
    data = instance.signed(payload())
    assert cause(data, trusting(root, identity="other@example.org")) == "reference.signature"
    assert cause(data, trusting(root, issuer="https://other.example.org")) == "reference.signature"
    assert cause(data, TRUSTED) == "reference.signer"
    assert cause(Sigstore().signed(payload()), trusting(root)) == "reference.signature"


def _flipped(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[len(data) // 2] ^= 1
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "path",
    [
        ("dsseEnvelope", "payload"),
        ("dsseEnvelope", "signatures", 0, "sig"),
        ("verificationMaterial", "certificate", "rawBytes"),
        ("verificationMaterial", "tlogEntries", 0, "canonicalizedBody"),
        ("verificationMaterial", "tlogEntries", 0, "inclusionPromise", "signedEntryTimestamp"),
        ("verificationMaterial", "tlogEntries", 0, "inclusionProof", "rootHash"),
        ("verificationMaterial", "tlogEntries", 0, "logId", "keyId"),
    ],
)
def test_damaged(instance: Sigstore, root: Path, path: tuple[Any, ...]) -> None:
    document = instance.bundle(payload())
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = _flipped(place[path[-1]])
    assert cause(json.dumps(document).encode(), trusting(root)) in ("reference.signature", "reference.malformed")


@pytest.mark.parametrize(
    "change",
    [
        {"verificationMaterial": {}},
        {"dsseEnvelope": None},
        {"mediaType": "application/vnd.dev.sigstore.bundle.v9+json"},
    ],
)
def test_incomplete(instance: Sigstore, root: Path, change: dict[str, Any]) -> None:
    assert cause(json.dumps({**instance.bundle(payload()), **change}).encode(), trusting(root)) == "reference.signature"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damaged_byte_passes(instance: Sigstore, root: Path, data: st.DataObject) -> None:
    whole = _WHOLE.setdefault(id(instance), instance.signed(payload()))
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[position] ^= data.draw(st.integers(1, 255))
    try:
        found = ReferenceBundle.parse(bytes(damaged), trusting(root))
    except IntegrityError as error:
        assert error.id in ("reference.signature", "reference.malformed")
    else:  # white space, and fields that say nothing, such as the note's name
        assert found.references[0].claims == CLAIMS


_WHOLE: dict[int, bytes] = {}


def test_logged_after_the_certificate_had_expired(instance: Sigstore, root: Path) -> None:
    document = instance.bundle(payload())
    document["verificationMaterial"]["tlogEntries"][0]["integratedTime"] = str(SIGNED_AT + 3600)
    assert cause(json.dumps(document).encode(), trusting(root)) == "reference.signature"


def test_a_root_that_is_none(tmp_path: Path, instance: Sigstore) -> None:
    (tmp_path / "root.json").write_text("{}")
    for path in (tmp_path / "root.json", tmp_path / "none.json"):
        with pytest.raises(UsageError) as caught:
            ReferenceBundle.parse(instance.signed(payload()), trusting(path))
        assert caught.value.id == "reference.sigstore"


def test_without_the_extra(instance: Sigstore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sigstore", None)
    with pytest.raises(UsageError) as caught:
        ReferenceBundle.parse(instance.signed(payload()), trusting(root))
    assert caught.value.id == "reference.sigstore" and "inclavare[sigstore]" in str(caught.value.remedy)
