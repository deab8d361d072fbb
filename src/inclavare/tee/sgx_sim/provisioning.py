"""The simulated platform's manufacturer: certificate authority, PCK certificate and collateral, in Intel's formats.

Profiles are those of the "Intel SGX PCK Certificate and Certificate Revocation List Profile Specification" and of the
PCS API, version 4. Every subject says SIMULATED. Root, intermediate and TCB signing keys are made once and kept beside
the fuses; the PCK's private key is not stored, the provisioning certification enclave derives it.
"""

from __future__ import annotations

import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from ...errors import PlatformError
from ...sgx.pck import OID_SGX_EXTENSION, SGX_TYPE_STANDARD, PckExtension
from ...sgx.structs import Attributes
from . import architectural, files
from .cpu import Processor

FILE = "provisioning.json"
COLLATERAL_FILE = "collateral.json"
SCHEMA = 1

#: Spells "SIM" and a model number; no processor of Intel's has it.
FMSPC = bytes.fromhex("53494d000001")
PCE_ID = bytes(2)
#: Collateral is valid for 30 days, as Intel's is, and issued again when a week is left.
COLLATERAL_SECONDS = 30 * 86400
RENEW_SECONDS = 7 * 86400
#: How far another machine's clock may be behind ours.
CLOCK_SKEW_SECONDS = 300
TCB_EVALUATION_NUMBER = 1
#: In use since the platform exists, so TCB dates are constants.
_TCB_DATE = "2025-01-01T00:00:00Z"
_OLD_TCB_DATE = "2024-01-01T00:00:00Z"

# A machine without a clock battery may start in the past: certificates are valid from a fixed day.
_NOT_BEFORE = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(2049, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
_CRL_URL = "https://sgx-sim.invalid/"


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        """The certificate, PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()


@dataclass(frozen=True, slots=True)
class Provisioning:
    """Everything that the manufacturer gave this platform."""

    root: Authority
    platform_ca: Authority
    tcb_signing: Authority
    pck: x509.Certificate
    qe_sigstruct: bytes
    pce_sigstruct: bytes

    @property
    def root_der(self) -> bytes:
        """The root CA's certificate, DER."""
        return self.root.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def pck_chain(self) -> bytes:
        """PCK certificate, platform CA and root, PEM, as in a quote's certification data of type 5."""
        leaf = self.pck.public_bytes(serialization.Encoding.PEM)
        return leaf + self.platform_ca.pem.encode() + self.root.pem.encode()


def load(directory: Path, processor: Processor) -> Provisioning:
    """The platform's provisioning; made by the first of all processes that ask.

    Raises:
        PlatformError: the file is damaged, or belongs to other fuses.
    """
    path = directory / FILE
    data = files.read(path)
    if data is None:
        files.private_directory(directory)
        with files.locked(directory):
            data = files.read(path)
            if data is None:
                data = _serialise(manufacture(processor))
                files.write(path, data)
    try:
        provisioning = _parse(data)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from None
    pce = architectural.load(processor, architectural.PCE, provisioning.pce_sigstruct)
    if architectural.pck_key(processor, pce).public_key() != provisioning.pck.public_key():
        raise _damaged(path, "a PCK certificate for other fuses")
    return provisioning


def manufacture(processor: Processor) -> Provisioning:
    """Make the certificate authority and certify this platform's PCK and architectural enclaves."""
    root_key = ec.generate_private_key(ec.SECP256R1())
    root = Authority(
        _certificate("SIMULATED SGX Root CA", root_key.public_key(), None, root_key, ca_path_length=1), root_key
    )
    ca_key = ec.generate_private_key(ec.SECP256R1())
    platform_ca = Authority(
        _certificate("SIMULATED SGX PCK Platform CA", ca_key.public_key(), root, root_key, ca_path_length=0), ca_key
    )
    tcb_key = ec.generate_private_key(ec.SECP256R1())
    tcb_signing = Authority(
        _certificate("SIMULATED SGX TCB Signing", tcb_key.public_key(), root, root_key, ca_path_length=None), tcb_key
    )
    # The signer of the architectural enclaves exists for as long as it takes to sign them.
    signer = rsa.generate_private_key(public_exponent=3, key_size=3072)
    pce_sigstruct = architectural.sign(architectural.PCE, signer)
    pce = architectural.load(processor, architectural.PCE, pce_sigstruct)
    pck = _certificate(
        "SIMULATED SGX PCK Certificate",
        architectural.pck_key(processor, pce).public_key(),
        platform_ca,
        ca_key,
        ca_path_length=None,
        sgx_extension=_sgx_extension(architectural.ppid(processor, pce), processor.cpusvn),
    )
    return Provisioning(
        root=root,
        platform_ca=platform_ca,
        tcb_signing=tcb_signing,
        pck=pck,
        qe_sigstruct=architectural.sign(architectural.QE, signer),
        pce_sigstruct=pce_sigstruct,
    )


def collateral(directory: Path, processor: Processor, now: int | None = None) -> dict[str, Any]:
    """Collateral that is valid now and for at least a week, in dcap-qvl's JSON layout.

    Args:
        now: seconds since 1970; by default the present.
    """
    now = int(time.time()) if now is None else now
    provisioning = load(directory, processor)
    path = directory / COLLATERAL_FILE
    found = _usable(files.read(path), provisioning, now)
    if found is None:
        with files.locked(directory):
            found = _usable(files.read(path), provisioning, now)
            if found is None:
                found = issue(provisioning, processor.cpusvn, now - CLOCK_SKEW_SECONDS)
                files.write(path, json.dumps(found).encode())
    return found


def issue(provisioning: Provisioning, cpusvn: bytes, issued: int) -> dict[str, str]:
    """Sign TCB info, QE identity and CRLs that are valid for 30 days from ``issued``."""
    qe = architectural.QE
    dates = {"issueDate": _iso(issued), "nextUpdate": _iso(issued + COLLATERAL_SECONDS)}
    tcb_info = _compact(
        {
            "id": "SGX",
            "version": 3,
            **dates,
            "fmspc": FMSPC.hex().upper(),
            "pceId": PCE_ID.hex().upper(),
            "tcbType": 0,
            "tcbEvaluationDataNumber": TCB_EVALUATION_NUMBER,
            "tcbLevels": [
                _tcb_level(cpusvn, architectural.PCE.isv_svn, _TCB_DATE, "UpToDate"),
                _tcb_level(bytes(16), 0, _OLD_TCB_DATE, "OutOfDate"),
            ],
        }
    )
    qe_identity = _compact(
        {
            "id": "QE",
            "version": 2,
            **dates,
            "tcbEvaluationDataNumber": TCB_EVALUATION_NUMBER,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": Attributes(architectural.QE_FLAGS_IDENTITY, 0).to_bytes().hex().upper(),
            "attributesMask": Attributes(architectural.QE_FLAGS_MASK, 0).to_bytes().hex().upper(),
            "mrsigner": architectural.mrsigner(provisioning.qe_sigstruct).hex().upper(),
            "isvprodid": qe.isv_prod_id,
            "tcbLevels": [{"tcb": {"isvsvn": qe.isv_svn}, "tcbDate": _TCB_DATE, "tcbStatus": "UpToDate"}],
        }
    )
    signer_chain = provisioning.tcb_signing.pem + provisioning.root.pem
    return {
        "pck_crl_issuer_chain": provisioning.platform_ca.pem + provisioning.root.pem,
        "root_ca_crl": _crl(provisioning.root, issued).hex(),
        "pck_crl": _crl(provisioning.platform_ca, issued).hex(),
        "tcb_info_issuer_chain": signer_chain,
        "tcb_info": tcb_info,
        "tcb_info_signature": sign_raw(provisioning.tcb_signing.key, tcb_info.encode()).hex(),
        "qe_identity_issuer_chain": signer_chain,
        "qe_identity": qe_identity,
        "qe_identity_signature": sign_raw(provisioning.tcb_signing.key, qe_identity.encode()).hex(),
    }


def sign_raw(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA P-256 with SHA-256 as r‖s, 64 bytes."""
    r, s = utils.decode_dss_signature(key.sign(message, ec.ECDSA(SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _tcb_level(components: bytes, pce_svn: int, date: str, status: str) -> dict[str, Any]:
    return {
        "tcb": {"sgxtcbcomponents": [{"svn": svn} for svn in components], "pcesvn": pce_svn},
        "tcbDate": date,
        "tcbStatus": status,
    }


def _compact(value: dict[str, Any]) -> str:
    """JSON without white space: the signature is over these very bytes."""
    return json.dumps(value, separators=(",", ":"))


def _iso(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _usable(data: bytes | None, provisioning: Provisioning, now: int) -> dict[str, Any] | None:
    """Stored collateral, if it is whole, of this platform, and valid for a while."""
    if data is None:
        return None
    try:
        stored: dict[str, Any] = json.loads(data)
        body = json.loads(stored["tcb_info"])
        issued, until = (datetime.datetime.fromisoformat(body[key]).timestamp() for key in ("issueDate", "nextUpdate"))
        signature = bytes.fromhex(stored["tcb_info_signature"])
        provisioning.tcb_signing.key.public_key().verify(
            utils.encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")),
            stored["tcb_info"].encode(),
            ec.ECDSA(SHA256()),
        )
    except (ValueError, KeyError, TypeError, InvalidSignature):
        return None
    return stored if issued <= now < until - RENEW_SECONDS else None


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Inclavare sgx-sim (no hardware protection)"),
        ]
    )


def _certificate(
    common_name: str,
    public_key: ec.EllipticCurvePublicKey,
    issuer: Authority | None,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    ca_path_length: int | None,
    sgx_extension: bytes | None = None,
) -> x509.Certificate:
    subject = _name(common_name)
    is_ca = ca_path_length is not None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(
            x509.CRLDistributionPoints(
                [x509.DistributionPoint([x509.UniformResourceIdentifier(_CRL_URL)], None, None, None)]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_ca,
                content_commitment=not is_ca,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=is_ca,
                crl_sign=is_ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=ca_path_length), critical=True)
    )
    if sgx_extension is not None:
        builder = builder.add_extension(
            x509.UnrecognizedExtension(x509.ObjectIdentifier(OID_SGX_EXTENSION), sgx_extension), critical=False
        )
    return builder.sign(issuer_key, SHA256())


def _crl(issuer: Authority, issued: int) -> bytes:
    def moment(seconds: int) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)

    return (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(moment(issued))
        .next_update(moment(issued + COLLATERAL_SECONDS))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
        .sign(issuer.key, SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def _sgx_extension(ppid: bytes, cpusvn: bytes) -> bytes:
    """The SGX extension of a PCK certificate, all seven parts, DER."""
    return PckExtension(
        ppid=ppid,
        tcb_components=tuple(cpusvn),
        pce_svn=architectural.PCE.isv_svn,
        cpusvn=cpusvn,
        pce_id=PCE_ID,
        fmspc=FMSPC,
        sgx_type=SGX_TYPE_STANDARD,
        platform_instance_id=ppid,
        dynamic_platform=False,
        cached_keys=False,
        smt_enabled=False,
    ).to_bytes()


def _serialise(provisioning: Provisioning) -> bytes:
    def authority(value: Authority) -> dict[str, str]:
        key = value.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return {"certificate": value.pem, "key": key.decode()}

    document = {
        "version": SCHEMA,
        "root": authority(provisioning.root),
        "platform_ca": authority(provisioning.platform_ca),
        "tcb_signing": authority(provisioning.tcb_signing),
        "pck": provisioning.pck.public_bytes(serialization.Encoding.PEM).decode(),
        "qe_sigstruct": provisioning.qe_sigstruct.hex(),
        "pce_sigstruct": provisioning.pce_sigstruct.hex(),
    }
    return json.dumps(document, indent=1).encode()


def _parse(data: bytes) -> Provisioning:
    document = json.loads(data)
    if document["version"] != SCHEMA:
        raise ValueError(f"version {document['version']}")

    def authority(name: str) -> Authority:
        key = serialization.load_pem_private_key(document[name]["key"].encode(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{name} is not an EC key")
        return Authority(x509.load_pem_x509_certificate(document[name]["certificate"].encode()), key)

    return Provisioning(
        root=authority("root"),
        platform_ca=authority("platform_ca"),
        tcb_signing=authority("tcb_signing"),
        pck=x509.load_pem_x509_certificate(document["pck"].encode()),
        qe_sigstruct=bytes.fromhex(document["qe_sigstruct"]),
        pce_sigstruct=bytes.fromhex(document["pce_sigstruct"]),
    )


def _damaged(path: Path, found: str) -> PlatformError:
    return PlatformError(
        f"the simulated platform's certificates in {path} cannot be used",
        id="tee.provisioning.damaged",
        found=found,
        expected="certificates and keys of this platform",
        remedy=f"restore the file, or remove it and {path.with_name(COLLATERAL_FILE)}: the platform gets a new root",
    )
