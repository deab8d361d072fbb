"""A key broker client written from the protocol's document (Trustee, kbs_attestation_protocol.md), sharing no code with the service."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap

#: Makes evidence with 64 bytes of report data: the value of ``primary_evidence``.
Attester = Callable[[bytes], Any]
ERRORS = "https://github.com/confidential-containers/kbs/errors/"


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def unb64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The error's name, for a well-formed error."""
        found = self.json
        assert set(found) == {"type", "detail"}, found
        assert found["type"].startswith(ERRORS)
        return str(found["type"].removeprefix(ERRORS))

    @property
    def detail(self) -> str:
        return str(self.json["detail"])


class Key:
    """A TEE's key pair: ``P-256``, ``P-521`` or ``RSA``."""

    def __init__(self, kind: str = "P-256") -> None:
        self.kind = kind
        if kind == "RSA":
            self.private: Any = rsa.generate_private_key(65537, 2048)
            numbers = self.private.public_key().public_numbers()
            size = (numbers.n.bit_length() + 7) // 8
            self.jwk = {
                "kty": "RSA",
                "alg": "RSA-OAEP-256",
                "n": b64url(numbers.n.to_bytes(size, "big")),
                "e": b64url(numbers.e.to_bytes(3, "big")),
            }
            return
        self.size = {"P-256": 32, "P-521": 66}[kind]
        self.private = ec.generate_private_key({"P-256": ec.SECP256R1, "P-521": ec.SECP521R1}[kind]())
        numbers = self.private.public_key().public_numbers()
        self.jwk = {
            "kty": "EC",
            "crv": kind,
            "alg": "ECDH-ES+A256KW",
            "x": b64url(numbers.x.to_bytes(self.size, "big")),
            "y": b64url(numbers.y.to_bytes(self.size, "big")),
        }

    def open(self, jwe: dict[str, str]) -> bytes:
        """Decrypt a flattened JWE (RFC 7516, 7518)."""
        header = json.loads(unb64url(jwe["protected"]))
        assert header["enc"] == "A256GCM"
        assert set(jwe) == {"protected", "encrypted_key", "iv", "ciphertext", "tag"}
        # kbs-types writes the header anew instead of taking the bytes that came, with its own order of members.
        first = {name: header[name] for name in ("alg", "enc")}
        rest = {name: header[name] for name in sorted(header) if name not in first}
        authenticated = json.dumps({**first, **json.loads(json.dumps(rest, sort_keys=True))}, separators=(",", ":"))
        wrapped = unb64url(jwe["encrypted_key"])
        if self.kind == "RSA":
            assert header["alg"] == "RSA-OAEP-256"
            content_key = self.private.decrypt(wrapped, padding.OAEP(padding.MGF1(SHA256()), SHA256(), None))
        else:
            assert header["alg"] == "ECDH-ES+A256KW"
            assert header["epk"]["crv"] == self.kind
            x, y = (int.from_bytes(unb64url(header["epk"][name]), "big") for name in "xy")
            peer = ec.EllipticCurvePublicNumbers(x, y, self.private.curve).public_key()
            z = self.private.exchange(ec.ECDH(), peer)
            algorithm = header["alg"].encode()
            info = len(algorithm).to_bytes(4, "big") + algorithm + bytes(8) + (256).to_bytes(4, "big")
            content_key = aes_key_unwrap(hashlib.sha256(b"\0\0\0\1" + z + info).digest(), wrapped)
        sealed = unb64url(jwe["ciphertext"]) + unb64url(jwe["tag"])
        return AESGCM(content_key).decrypt(unb64url(jwe["iv"]), sealed, b64url(authenticated.encode()).encode())


@dataclass
class Client:
    """One client with its TEE key and cookie."""

    url: str
    ca: str
    attester: Attester
    tee: str = "sgx-sim"
    tenant: str = ""
    key: Key = field(default_factory=Key)
    cookie: str | None = None
    nonce: str = ""
    token: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        self._context = ssl.create_default_context(cafile=self.ca)
        self._where = (parts.hostname or "", parts.port)
        self._connection: http.client.HTTPSConnection | None = None

    @property
    def prefix(self) -> str:
        return (f"/t/{self.tenant}" if self.tenant else "") + "/kbs/v0"

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        cookie: str | None = None,
        bearer: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        sent = dict(headers or {})
        if cookie is not None:
            sent["Cookie"] = f"kbs-session-id={cookie}"
        if bearer is not None:
            sent["Authorization"] = f"Bearer {bearer}"
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        for fresh in (False, True):
            if self._connection is None or fresh:
                self._connection = http.client.HTTPSConnection(*self._where, context=self._context, timeout=30)
            try:
                self._connection.request(method, path, data, sent)
                answer = self._connection.getresponse()
                return Reply(answer.status, {name.lower(): text for name, text in answer.getheaders()}, answer.read())
            except (http.client.RemoteDisconnected, ConnectionError):
                self._connection.close()
                if fresh:
                    raise
        raise AssertionError

    def auth(self, **changes: Any) -> Reply:
        request = {
            "version": "0.4.0",
            "tee": self.tee,
            "extra-params": {"supported-hash-algorithms": ["sha256", "sha384", "sha512"]},
            **changes,
        }
        reply = self.call("POST", f"{self.prefix}/auth", request)
        if reply.status == 200:
            name, _, rest = reply.headers["set-cookie"].partition("=")
            assert name == "kbs-session-id"
            self.cookie = rest.partition(";")[0]
            challenge = reply.json
            assert set(challenge) == {"nonce", "extra-params"}
            self.nonce = challenge["nonce"]
        return reply

    def attestation(self, *, nonce: str | None = None, key: Key | None = None, additional: str = "") -> dict[str, Any]:
        """The body of ``attest``, with fresh evidence."""
        jwk = (key or self.key).jwk
        runtime = {"nonce": self.nonce if nonce is None else nonce, "tee-pubkey": jwk}
        # All members are ASCII strings, so this is their canonical form (RFC 8785).
        bound = json.dumps({**runtime, "additional-evidence": additional}, sort_keys=True, separators=(",", ":"))
        evidence = self.attester(hashlib.sha384(bound.encode()).digest().ljust(64, b"\0"))
        return {
            "runtime-data": runtime,
            "tee-evidence": {"primary_evidence": evidence, "additional_evidence": additional},
        }

    def attest(self, body: Any = None, *, cookie: str | None = None) -> Reply:
        sent = self.attestation() if body is None else body
        reply = self.call("POST", f"{self.prefix}/attest", sent, cookie=cookie or self.cookie)
        if reply.status == 200:
            self.token = reply.json["token"]
        return reply

    def handshake(self) -> str:
        """``auth`` and ``attest``, which must succeed."""
        reply = self.auth()
        assert reply.status == 200, reply.body
        reply = self.attest()
        assert reply.status == 200, reply.body
        return self.token

    def resource(self, path: str, *, plugin: str = "resource", bearer: str | None = None) -> Reply:
        cookie = None if bearer is not None else self.cookie
        return self.call("GET", f"{self.prefix}/{plugin}/{path}", cookie=cookie, bearer=bearer)

    def get(self, path: str, **where: Any) -> bytes:
        """A resource, which must be released."""
        reply = self.resource(path, **where)
        assert reply.status == 200, reply.body
        return self.key.open(reply.json)
