"""The channel to an enclave: KBS's report data and JWE, and that only the quoted key can open it."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from attested import Attested

from inclavare.attestation import verify
from inclavare.attestation.channel import EnclaveChannel, encrypt, report_data, report_data_for, runtime_data
from inclavare.errors import EvidenceError


def unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def test_secret_travels_to_the_enclave_that_was_verified(attested: Attested) -> None:
    result = verify(attested.evidence, attested.policy, nonce=attested.nonce, now=attested.now)
    assert result.accepted
    jwe = encrypt((attested.evidence.runtime_data or {})["tee-pubkey"], b"\0secret\xff")
    assert attested.channel.decrypt(json.loads(json.dumps(jwe))) == b"\0secret\xff"


def test_report_data_is_sha384_of_the_canonical_json() -> None:
    key = {"kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW", "x": "AA", "y": "BB"}
    canonical = (
        b'{"additional-evidence":"","nonce":"bm9uY2U=",'
        b'"tee-pubkey":{"alg":"ECDH-ES+A256KW","crv":"P-256","kty":"EC","x":"AA","y":"BB"}}'
    )
    assert report_data_for(b"nonce", key) == hashlib.sha384(canonical).digest() + bytes(16)
    assert report_data({"nonce": "bm9uY2U=", "tee-pubkey": key}) == report_data(runtime_data(b"nonce", key))


def test_key_is_in_the_protocols_form() -> None:
    jwk = EnclaveChannel.new().public_jwk
    assert set(jwk) == {"kty", "crv", "alg", "x", "y"}
    assert (jwk["kty"], jwk["crv"], jwk["alg"]) == ("EC", "P-256", "ECDH-ES+A256KW")
    assert len(unpadded(jwk["x"])) == len(unpadded(jwk["y"])) == 32
    assert EnclaveChannel.new().public_jwk != jwk


def test_jwe_is_in_the_protocols_form() -> None:
    jwe = encrypt(EnclaveChannel.new().public_jwk, b"secret")
    assert set(jwe) == {"protected", "encrypted_key", "iv", "ciphertext", "tag"}
    header = json.loads(unpadded(jwe["protected"]))
    assert (header["alg"], header["enc"]) == ("ECDH-ES+A256KW", "A256GCM")
    assert header["epk"]["kty"] == "EC" and header["epk"]["crv"] == "P-256" and "d" not in header["epk"]
    assert len(unpadded(jwe["iv"])) == 12 and len(unpadded(jwe["tag"])) == 16


def refuse(channel: EnclaveChannel, jwe: Any) -> None:
    with pytest.raises(EvidenceError) as caught:
        channel.decrypt(jwe)
    assert caught.value.id == "evidence.channel.jwe"


def test_only_the_addressee_can_open_it() -> None:
    channel = EnclaveChannel.new()
    refuse(EnclaveChannel.new(), encrypt(channel.public_jwk, b"secret"))


@pytest.mark.parametrize("part", ["protected", "encrypted_key", "iv", "ciphertext", "tag"])
def test_every_part_is_protected(part: str) -> None:
    channel = EnclaveChannel.new()
    jwe = encrypt(channel.public_jwk, b"a secret that is long enough")
    raw = bytearray(unpadded(jwe[part]))
    raw[len(raw) // 2] ^= 1
    refuse(channel, {**jwe, part: base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode()})
    refuse(channel, {**jwe, part: ""})
    refuse(channel, {**jwe, part: 5})
    refuse(channel, {name: value for name, value in jwe.items() if name != part})


def test_other_members_and_algorithms_are_refused() -> None:
    channel = EnclaveChannel.new()
    jwe = encrypt(channel.public_jwk, b"secret")
    refuse(channel, {**jwe, "header": {}})
    refuse(channel, {**jwe, "aad": ""})
    refuse(channel, [])
    header = json.loads(unpadded(jwe["protected"]))
    for change in ({"alg": "ECDH-ES"}, {"enc": "A128GCM"}, {"alg": "dir"}, {"zip": "DEF"}):
        text = base64.urlsafe_b64encode(json.dumps({**header, **change}).encode()).rstrip(b"=").decode()
        refuse(channel, {**jwe, "protected": text})


@pytest.mark.parametrize(
    "change",
    [
        {"crv": "P-384"},
        {"kty": "RSA"},
        {"alg": "RSA-OAEP-256"},
        {"x": "AA"},
        {"y": base64.urlsafe_b64encode(bytes(32)).rstrip(b"=").decode()},
        {"d": "AA"},
        {"x": None},
    ],
)
def test_unusable_keys(change: dict[str, Any]) -> None:
    with pytest.raises(EvidenceError) as caught:
        encrypt({**EnclaveChannel.new().public_jwk, **change}, b"secret")
    assert caught.value.id == "evidence.channel.key"
