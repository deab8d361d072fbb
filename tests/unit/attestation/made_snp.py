"""A manufacturer of SEV-SNP chips that exists in tests only: authorities, chip keys, reports and revocation lists."""

from __future__ import annotations

import datetime
import functools
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from inclavare.attestation import Evidence
from inclavare.attestation.claims import SnpTcb
from inclavare.attestation.collateral import SNP_CERTIFICATES_KEY, SNP_CRL_KEY
from inclavare.attestation.snp_report import SIGNED_SIZE, SnpReport, pack_tcb, resigned
from inclavare.attestation.verifiers import snp
from inclavare.sgx import der

NOW = 1_750_000_000
TCB = {"Milan": SnpTcb(4, 0, 24, 219), "Turin": SnpTcb(1, 2, 3, 70, 5), "Genoa": SnpTcb(10, 0, 23, 25)}
CPUID = {"Milan": (0x19, 0x01), "Genoa": (0x19, 0xA0), "Turin": (0x1A, 0x02)}
_PSS = padding.PSS(padding.MGF1(SHA384()), SHA384.digest_size)


def moment(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


@functools.cache
def rsa_key(name: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@functools.cache
def chip_key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def certificate(
    name: str,
    key: Any,
    issuer: str,
    *,
    ca: bool = False,
    extensions: dict[str, bytes] | None = None,
    start: int = NOW - 1000,
    end: int = NOW + 1000,
    serial: int = 7,
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(moment(start))
        .not_valid_after(moment(end))
    )
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
    for oid, value in (extensions or {}).items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    return builder.sign(rsa_key(issuer), SHA384(), rsa_padding=_PSS)


@functools.cache
def authority(name: str, issuer: str) -> x509.Certificate:
    return certificate(name, rsa_key(name).public_key(), issuer, ca=True, serial=sum(name.encode()))


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier trusts this manufacturer's roots, which it does nowhere but here."""
    made = {}
    for processor in ("Milan", "Genoa", "Turin"):
        for prefix in ("ARK-", "SEV-", "SEV-VLEK-"):
            made[prefix + processor] = authority(prefix + processor, f"ARK-{processor}")
    monkeypatch.setattr(snp, "roots", lambda: made)
    snp._key.cache_clear()


def chip_certificate(
    processor: str = "Turin", kind: str = "VCEK", tcb: SnpTcb | None = None, chip: bytes | None = None, **more: Any
) -> x509.Certificate:
    parts = tcb or TCB[processor]
    extensions = {
        oid: der.encode_integer(value)
        for part, oid in snp._OID_TCB.items()
        if (value := getattr(parts, part)) is not None
    }
    if kind == "VCEK":
        chip = chip_id(processor) if chip is None else chip
        extensions[snp._OID_HWID] = chip[:8] if processor == "Turin" else der.encode(der.OCTET_STRING, chip)
    extensions |= more.pop("extensions", {})
    issuer = more.pop("issuer", ("SEV-" if kind == "VCEK" else "SEV-VLEK-") + processor)
    name = more.pop("name", f"SEV-{kind}")
    return certificate(name, chip_key(processor).public_key(), issuer, extensions=extensions, **more)


def chip_id(processor: str) -> bytes:
    return bytes(range(1, 9)).ljust(64, b"\0") if processor == "Turin" else bytes(range(64))


def report(processor: str = "Turin", version: int = 5, kind: str = "VCEK", **fields: Any) -> SnpReport:
    tcb = pack_tcb(TCB[processor], processor)
    family, model = CPUID[processor] if version >= 3 else (0, 0)
    made = SnpReport(
        version=version,
        guest_svn=1,
        policy=0x30000,
        family_id=bytes(16),
        image_id=bytes(16),
        vmpl=0,
        sig_algo=1,
        current_tcb=tcb,
        plat_info=0x25,
        key_info={"VCEK": 0, "VLEK": 1 << 2}[kind],
        report_data=bytes(range(64)),
        measurement=b"m" * 48,
        host_data=b"h" * 32,
        id_key_digest=bytes(48),
        author_key_digest=bytes(48),
        report_id=b"r" * 32,
        report_id_ma=b"\xff" * 32,
        reported_tcb=tcb,
        cpuid_fam_id=family,
        cpuid_mod_id=model,
        cpuid_step=1 if version >= 3 else 0,
        chip_id=chip_id(processor) if kind == "VCEK" else bytes(64),
        committed_tcb=tcb,
        current=bytes((40, 55, 1)),
        committed=bytes((40, 55, 1)),
        launch_tcb=tcb,
        launch_mit_vector=3 if version >= 5 else 0,
        current_mit_vector=7 if version >= 5 else 0,
        signature_r=bytes(72),
        signature_s=bytes(72),
    )
    return sign(replace(made, **fields), processor)


def sign(made: SnpReport, processor: str) -> SnpReport:
    signature = chip_key(processor).sign(made.to_bytes()[:SIGNED_SIZE], ec.ECDSA(SHA384()))
    r, s = utils.decode_dss_signature(signature)
    return resigned(made, r.to_bytes(48, "big") + s.to_bytes(48, "big"))


def crl(
    processor: str, revoked: tuple[x509.Certificate, ...] = (), *, start: int = NOW - 100, end: int = NOW + 100
) -> str:
    root = authority(f"ARK-{processor}", f"ARK-{processor}")
    builder = x509.CertificateRevocationListBuilder(root.subject, moment(start), moment(end))
    builder = builder.add_extension(x509.CRLNumber(12), critical=False)
    for one in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(one.serial_number).revocation_date(moment(start)).build()
        )
    signed = builder.sign(rsa_key(f"ARK-{processor}"), SHA384(), rsa_padding=_PSS)
    return signed.public_bytes(Encoding.DER).hex()


def pem(*certificates: x509.Certificate) -> str:
    return "".join(one.public_bytes(Encoding.PEM).decode() for one in certificates)


def evidence(made: SnpReport, *certificates: x509.Certificate, revocations: str | None = None) -> Evidence:
    collateral = {SNP_CERTIFICATES_KEY: pem(*certificates)}
    if revocations is not None:
        collateral[SNP_CRL_KEY] = revocations
    return Evidence.from_quote(made.to_bytes(), collateral)
