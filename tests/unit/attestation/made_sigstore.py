"""A sigstore instance that exists in tests only: authority, certificate log, transparency log, and what it signs."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from typing import Any

import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from inclavare.attestation.references import PAYLOAD_TYPE, pae

SIGNED_AT = 1_780_000_000
IDENTITY, OIDC_ISSUER = "builder@example.org", "https://accounts.example.org"
_ORIGIN = "log.example.org - 1"
_SCTS = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_OIDC = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    return key.sign(message, ec.ECDSA(SHA256()))


class Sigstore:
    """Everybody's keys."""

    def __init__(self) -> None:
        self.authority, self.certificate_log, self.log = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sigstore of tests")])
        start = datetime.datetime.fromtimestamp(SIGNED_AT - 1000, datetime.UTC)
        self.root = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.authority.public_key())
            .serial_number(1)
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.authority.public_key()), critical=False)
            .sign(self.authority, SHA256())
        )

    def trusted_root(self) -> dict[str, Any]:
        valid = {"start": "2020-01-01T00:00:00Z"}

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            return {
                "baseUrl": "https://log.example.org",
                "hashAlgorithm": "SHA2_256",
                "publicKey": {
                    "rawBytes": _b64(_spki(key)),
                    "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                    "validFor": valid,
                },
                "logId": {"keyId": _b64(hashlib.sha256(_spki(key)).digest())},
            }

        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.log)],
            "ctlogs": [log(self.certificate_log)],
            "certificateAuthorities": [
                {
                    "subject": {"organization": "tests", "commonName": "sigstore of tests"},
                    "uri": "https://ca.example.org",
                    "certChain": {"certificates": [{"rawBytes": _b64(self.root.public_bytes(Encoding.DER))}]},
                    "validFor": valid,
                }
            ],
            "timestampAuthorities": [],
        }

    def certificate(self, key: ec.EllipticCurvePrivateKey, identity: str, issuer: str) -> x509.Certificate:
        """Ten minutes, as Fulcio gives them, and logged."""
        start = datetime.datetime.fromtimestamp(SIGNED_AT - 60, datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.root.subject)
            .public_key(key.public_key())
            .serial_number(2)
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(minutes=10))
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(identity)]), critical=True)
            .add_extension(x509.UnrecognizedExtension(_OIDC, issuer.encode()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority.public_key()), critical=False
            )
        )
        entry = builder.sign(self.authority, SHA256()).tbs_certificate_bytes
        # RFC 6962, section 3.2: the log signs the certificate without what it returns.
        time = (SIGNED_AT * 1000).to_bytes(8, "big")
        issuer_hash = hashlib.sha256(_spki(self.authority)).digest()
        precertificate = b"\0\1" + issuer_hash + len(entry).to_bytes(3, "big") + entry
        signature = _sign(self.certificate_log, b"\0\0" + time + precertificate + b"\0\0")
        timestamp = b"\0" + hashlib.sha256(_spki(self.certificate_log)).digest() + time + b"\0\0"
        timestamp += b"\4\3" + len(signature).to_bytes(2, "big") + signature
        listed = len(timestamp).to_bytes(2, "big") + timestamp
        value = len(listed).to_bytes(2, "big") + listed
        encoded = b"\4" + (bytes([len(value)]) if len(value) < 128 else b"\x81" + bytes([len(value)])) + value
        return builder.add_extension(x509.UnrecognizedExtension(_SCTS, encoded), critical=False).sign(
            self.authority, SHA256()
        )

    def bundle(self, payload: bytes, *, identity: str = IDENTITY, issuer: str = OIDC_ISSUER) -> dict[str, Any]:
        """A payload, signed and logged."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.certificate(key, identity, issuer)
        signature = _sign(key, pae(payload))
        envelope = {
            "payload": _b64(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": _b64(signature)}],
        }
        body = rfc8785.dumps(
            {
                "apiVersion": "0.0.1",
                "kind": "dsse",
                "spec": {
                    "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(b"envelope").hexdigest()},
                    "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()},
                    "signatures": [
                        {"signature": _b64(signature), "verifier": _b64(certificate.public_bytes(Encoding.PEM))}
                    ],
                },
            }
        )
        log_id = hashlib.sha256(_spki(self.log)).digest()
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"{_ORIGIN}\n1\n{_b64(root)}\n"
        name = _ORIGIN.split(" ", maxsplit=1)[0]
        checkpoint = f"{note}\n\u2014 {name} {_b64(log_id[:4] + _sign(self.log, note.encode()))}\n"
        promise = rfc8785.dumps({"body": _b64(body), "integratedTime": SIGNED_AT, "logID": log_id.hex(), "logIndex": 0})
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": _b64(certificate.public_bytes(Encoding.DER))},
                "tlogEntries": [
                    {
                        "logIndex": "0",
                        "logId": {"keyId": _b64(log_id)},
                        "kindVersion": {"kind": "dsse", "version": "0.0.1"},
                        "integratedTime": str(SIGNED_AT),
                        "inclusionPromise": {"signedEntryTimestamp": _b64(_sign(self.log, promise))},
                        "inclusionProof": {
                            "logIndex": "0",
                            "rootHash": _b64(root),
                            "treeSize": "1",
                            "hashes": [],
                            "checkpoint": {"envelope": checkpoint},
                        },
                        "canonicalizedBody": _b64(body),
                    }
                ],
            },
            "dsseEnvelope": envelope,
        }

    def signed(self, payload: bytes, **more: Any) -> bytes:
        return json.dumps(self.bundle(payload, **more)).encode()


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
