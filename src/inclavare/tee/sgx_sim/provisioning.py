"""The simulated platform's manufacturer: certificate authority, PCK certificates and collateral, in Intel's formats.

Profiles are those of the "Intel SGX PCK Certificate and Certificate Revocation List Profile Specification" and of the
PCS API, version 4. Every subject says SIMULATED. Root, intermediate and TCB signing keys are made once and kept beside
the fuses; the PCK's private key is not stored, the provisioning certification enclave derives it.
"""

from __future__ import annotations

import datetime
import json
import time
from dataclasses import dataclass, replace
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
from ...sgx.structs import Attributes, StructureError
from . import architectural, files, fuses, tcb, tdmodule
from .cpu import Processor, Secs

FILE = "provisioning.json"
COLLATERAL_FILE = "collateral.json"
TDX_COLLATERAL_FILE = "tdx-collateral.json"
SCHEMA = 2

PCE_ID = bytes(2)
#: Collateral is valid for 30 days, as Intel's is, and issued again when a week is left.
COLLATERAL_SECONDS = 30 * 86400
RENEW_SECONDS = 7 * 86400
#: How far another machine's clock may be behind ours.
CLOCK_SKEW_SECONDS = 300
#: Collateral that is to be expired is this old.
EXPIRED_SECONDS = COLLATERAL_SECONDS + 10 * 86400
#: In use since the platform exists, so TCB dates are constants.
_TCB_DATE = "2025-01-01T00:00:00Z"
_OLD_TCB_DATE = "2024-01-01T00:00:00Z"

# A machine without a clock battery may start in the past: certificates are valid from a fixed day.
_NOT_BEFORE = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(2049, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
CRL_URL = "https://sgx-sim.invalid/"

_UP_TO_DATE = tcb.Tcb()
#: Statuses that an update of the platform would mend.
_FIXABLE = ("OutOfDate", "OutOfDateConfigurationNeeded", "Revoked")


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
    #: One for each CPUSVN that the platform has had; ``pck`` is that of its processor's.
    pcks: tuple[x509.Certificate, ...]
    td_qe_sigstruct: bytes = b""

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
                data = _serialise(manufacture(processor, _fmspc(directory)))
                files.write(path, data)
    try:
        provisioning = _parse(data, processor.cpusvn)
    except (ValueError, KeyError, TypeError, StructureError) as error:
        raise _damaged(path, str(error)) from None
    with architectural.loaded(processor, architectural.PCE, provisioning.pce_sigstruct) as pce:
        if architectural.pck_key(processor, pce).public_key() != provisioning.pck.public_key():
            raise _damaged(path, "a PCK certificate for other fuses")
    return provisioning


def manufacture(processor: Processor, fmspc: bytes = fuses.FMSPC) -> Provisioning:
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
    with architectural.loaded(processor, architectural.PCE, pce_sigstruct) as pce:
        pck = _pck(processor, pce, platform_ca, architectural.ppid(processor, pce), fmspc)
    return Provisioning(
        root=root,
        platform_ca=platform_ca,
        tcb_signing=tcb_signing,
        pck=pck,
        qe_sigstruct=architectural.sign(architectural.QE, signer),
        pce_sigstruct=pce_sigstruct,
        pcks=(pck,),
        td_qe_sigstruct=architectural.sign(architectural.TD_QE, signer),
    )


def certify(directory: Path, processor: Processor) -> None:
    """Have a PCK certificate for the processor's CPUSVN, beside those of other CPUSVNs. The caller holds the lock.

    Raises:
        PlatformError: the file is damaged.
    """
    path = directory / FILE
    data = files.read(path)
    if data is None:
        return
    try:
        known = _parse(data)
    except (ValueError, KeyError, TypeError, StructureError) as error:
        raise _damaged(path, str(error)) from None
    extensions = [pck_extension(certificate) for certificate in known.pcks]
    if any(extension.cpusvn == processor.cpusvn for extension in extensions):
        return
    with architectural.loaded(processor, architectural.PCE, known.pce_sigstruct) as pce:
        fresh = _pck(processor, pce, known.platform_ca, extensions[0].ppid, extensions[0].fmspc)
    files.write(path, _serialise(replace(known, pcks=(*known.pcks, fresh))))


def with_td_qe(directory: Path, processor: Processor) -> Provisioning:
    """The provisioning with a SIGSTRUCT of the TD quoting enclave, which platforms of old had not.

    Raises:
        PlatformError: see :func:`load`.
    """
    found = load(directory, processor)
    if not found.td_qe_sigstruct:
        with files.locked(directory):
            stored = files.read(directory / FILE)
            found = found if stored is None else _parse(stored)
            if not found.td_qe_sigstruct:
                signer = rsa.generate_private_key(public_exponent=3, key_size=3072)
                found = replace(found, td_qe_sigstruct=architectural.sign(architectural.TD_QE, signer))
                files.write(directory / FILE, _serialise(found))
    return found


def collateral(directory: Path, processor: Processor, now: int | None = None, *, tdx: bool = False) -> dict[str, Any]:
    """Collateral that is valid now and for at least a week, in dcap-qvl's JSON layout; or expired, if that is set.

    Args:
        now: seconds since 1970; by default the present.
        tdx: for quotes of trust domains instead of enclaves.
    """
    now = int(time.time()) if now is None else now
    provisioning = with_td_qe(directory, processor) if tdx else load(directory, processor)
    path = directory / (TDX_COLLATERAL_FILE if tdx else COLLATERAL_FILE)
    found = _usable(files.read(path), provisioning, now)
    if found is None:
        with files.locked(directory):
            found = _usable(files.read(path), provisioning, now)
            if found is None:
                state = tcb.load(directory)
                # Another process may have updated the microcode since this session began.
                there = fuses.read(directory)
                cpusvn = processor.cpusvn if there is None else there.roots.cpusvn
                issued = now - (EXPIRED_SECONDS if state.collateral_expired else CLOCK_SKEW_SECONDS)
                found = issue(provisioning, cpusvn, issued, state=state, tdx=tdx)
                if not state.collateral_expired:
                    files.write(path, json.dumps(found).encode())
    return found


def issue(
    provisioning: Provisioning, cpusvn: bytes, issued: int, *, state: tcb.Tcb = _UP_TO_DATE, tdx: bool = False
) -> dict[str, str]:
    """Sign TCB info, QE identity and CRLs that are valid for 30 days from ``issued``.

    Args:
        cpusvn: the platform's present CPUSVN, 16 bytes.
        state: what they say.
        tdx: for quotes of trust domains.
    """
    dates = {"issueDate": _iso(issued), "nextUpdate": _iso(issued + COLLATERAL_SECONDS)}
    number = {"tcbEvaluationDataNumber": state.evaluation_number}
    pck = pck_extension(provisioning.pck)
    tcb_info = _compact(
        {
            "id": "TDX" if tdx else "SGX",
            "version": 3,
            **dates,
            "fmspc": pck.fmspc.hex().upper(),
            "pceId": pck.pce_id.hex().upper(),
            "tcbType": 0,
            **number,
            **(tdmodule.collateral(_TCB_DATE) if tdx else {}),
            "tcbLevels": _tcb_levels(cpusvn, state, tdx),
        }
    )
    qe = architectural.TD_QE if tdx else architectural.QE
    qe_sigstruct = provisioning.td_qe_sigstruct if tdx else provisioning.qe_sigstruct
    qe_identity = _compact(
        {
            "id": "TD_QE" if tdx else "QE",
            "version": 2,
            **dates,
            **number,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": Attributes(architectural.QE_FLAGS_IDENTITY, 0).to_bytes().hex().upper(),
            "attributesMask": Attributes(architectural.QE_FLAGS_MASK, 0).to_bytes().hex().upper(),
            "mrsigner": architectural.mrsigner(qe_sigstruct).hex().upper(),
            "isvprodid": qe.isv_prod_id,
            "tcbLevels": _qe_levels(qe.isv_svn, state),
        }
    )
    signer_chain = provisioning.tcb_signing.pem + provisioning.root.pem
    revoked = provisioning.pcks if state.pck_revoked else ()
    return {
        "pck_crl_issuer_chain": provisioning.platform_ca.pem + provisioning.root.pem,
        "root_ca_crl": _crl(provisioning.root, issued).hex(),
        "pck_crl": _crl(provisioning.platform_ca, issued, revoked).hex(),
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


def _tcb_levels(cpusvn: bytes, state: tcb.Tcb, tdx: bool) -> list[dict[str, Any]]:
    """The levels, the highest first: what a fix brings, if there is one; the platform's present one; every older."""
    levels = []

    def add(components: bytes, pce_svn: int, tdx_components: bytes, date: str, *said: Any) -> None:
        level: dict[str, Any] = {"sgxtcbcomponents": [{"svn": svn} for svn in components], "pcesvn": pce_svn}
        if tdx:
            level["tdxtcbcomponents"] = [{"svn": svn} for svn in tdx_components]
        levels.append({"tcb": level, "tcbDate": date, **_said(*said)})

    pce_svn = architectural.PCE.isv_svn
    if state.status in _FIXABLE:
        # The fix is one of microcode; where that cannot be newer, it is one of the PCE.
        newer = next((at for at, svn in enumerate(cpusvn) if svn < 0xFF), None)
        fixed = cpusvn if newer is None else cpusvn[:newer] + bytes([cpusvn[newer] + 1]) + cpusvn[newer + 1 :]
        add(fixed, pce_svn + (newer is None), tdmodule.TCB_SVN, _TCB_DATE, "UpToDate", ())
    date = _OLD_TCB_DATE if state.status in _FIXABLE else _TCB_DATE
    add(cpusvn, pce_svn, tdmodule.TCB_SVN, date, state.status, state.advisories)
    add(bytes(16), 0, bytes(16), _OLD_TCB_DATE, "OutOfDate", ())
    return levels


def _qe_levels(isv_svn: int, state: tcb.Tcb) -> list[dict[str, Any]]:
    present = {"tcb": {"isvsvn": isv_svn}, "tcbDate": _TCB_DATE, **_said(state.qe_status, state.qe_advisories)}
    if state.qe_status == "UpToDate":
        return [present]
    fixed = {"tcb": {"isvsvn": isv_svn + 1}, "tcbDate": _TCB_DATE, "tcbStatus": "UpToDate"}
    return [fixed, {**present, "tcbDate": _OLD_TCB_DATE}]


def _said(status: str, advisories: tuple[str, ...]) -> dict[str, Any]:
    # As in Intel's, the list is left out where it is empty.
    return {"tcbStatus": status, **({"advisoryIDs": list(advisories)} if advisories else {})}


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
                [x509.DistributionPoint([x509.UniformResourceIdentifier(CRL_URL)], None, None, None)]
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


def _crl(issuer: Authority, issued: int, revoked: tuple[x509.Certificate, ...] = ()) -> bytes:
    def moment(seconds: int) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)

    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(moment(issued))
        .next_update(moment(issued + COLLATERAL_SECONDS))
        # Numbers must grow from one list to the next.
        .add_extension(x509.CRLNumber(issued), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
    )
    for certificate in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(certificate.serial_number)
            .revocation_date(moment(issued))
            .add_extension(x509.CRLReason(x509.ReasonFlags.key_compromise), critical=False)
            .build()
        )
    return builder.sign(issuer.key, SHA256()).public_bytes(serialization.Encoding.DER)


def _pck(processor: Processor, pce: Secs, issuer: Authority, ppid: bytes, fmspc: bytes) -> x509.Certificate:
    """Certify the provisioning certification key that the PCE derives on this processor."""
    return _certificate(
        "SIMULATED SGX PCK Certificate",
        architectural.pck_key(processor, pce).public_key(),
        issuer,
        issuer.key,
        ca_path_length=None,
        sgx_extension=_sgx_extension(ppid, processor.cpusvn, fmspc),
    )


def _sgx_extension(ppid: bytes, cpusvn: bytes, fmspc: bytes = fuses.FMSPC) -> bytes:
    """The SGX extension of a PCK certificate, all seven parts, DER."""
    return PckExtension(
        ppid=ppid,
        tcb_components=tuple(cpusvn),
        pce_svn=architectural.PCE.isv_svn,
        cpusvn=cpusvn,
        pce_id=PCE_ID,
        fmspc=fmspc,
        sgx_type=SGX_TYPE_STANDARD,
        platform_instance_id=ppid,
        dynamic_platform=False,
        cached_keys=False,
        smt_enabled=False,
    ).to_bytes()


def pck_extension(pck: x509.Certificate) -> PckExtension:
    """What a PCK certificate says about its platform."""
    return PckExtension.from_certificate(pck.public_bytes(serialization.Encoding.DER))


def _fmspc(directory: Path) -> bytes:
    there = fuses.read(directory)
    return fuses.FMSPC if there is None else there.fmspc


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
        "pcks": [pck.public_bytes(serialization.Encoding.PEM).decode() for pck in provisioning.pcks],
        "qe_sigstruct": provisioning.qe_sigstruct.hex(),
        "td_qe_sigstruct": provisioning.td_qe_sigstruct.hex(),
        "pce_sigstruct": provisioning.pce_sigstruct.hex(),
    }
    return json.dumps(document, indent=1).encode()


def _parse(data: bytes, cpusvn: bytes | None = None) -> Provisioning:
    """Read the file; with a CPUSVN, ``pck`` is the certificate for it, else the newest one."""
    document = json.loads(data)
    version = document["version"]
    if version not in (1, SCHEMA):
        raise ValueError(f"version {version}")

    def authority(name: str) -> Authority:
        key = serialization.load_pem_private_key(document[name]["key"].encode(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{name} is not an EC key")
        return Authority(x509.load_pem_x509_certificate(document[name]["certificate"].encode()), key)

    # Version 1 knew one CPUSVN, and no trust domains.
    texts = [document["pck"]] if version == 1 else document["pcks"]
    pcks = tuple(x509.load_pem_x509_certificate(text.encode()) for text in texts)
    fitting = [pck for pck in pcks if cpusvn is None or pck_extension(pck).cpusvn == cpusvn]
    if not fitting:
        raise ValueError("no PCK certificate for the processor's CPUSVN")
    return Provisioning(
        root=authority("root"),
        platform_ca=authority("platform_ca"),
        tcb_signing=authority("tcb_signing"),
        pck=fitting[-1],
        qe_sigstruct=bytes.fromhex(document["qe_sigstruct"]),
        pce_sigstruct=bytes.fromhex(document["pce_sigstruct"]),
        pcks=pcks,
        td_qe_sigstruct=bytes.fromhex(document.get("td_qe_sigstruct", "")),
    )


def _damaged(path: Path, found: str) -> PlatformError:
    return PlatformError(
        f"the simulated platform's certificates in {path} cannot be used",
        id="tee.provisioning.damaged",
        found=found,
        expected="certificates and keys of this platform",
        remedy=f"restore the file, or remove it and {path.with_name(COLLATERAL_FILE)}: the platform gets a new root",
    )
