"""Verification of SGX ECDSA quotes (DCAP) against one given root, twice: by the steps below, and by dcap-qvl.

The steps name the cause of a refusal and are strict where dcap-qvl is lenient (bytes after the quote, text around PEM
blocks, CRLs of the future, certificate purposes). dcap-qvl is the independent second opinion: both must accept, with
the same TCB status. Sources: Intel "SGX ECDSA QuoteLibReference", appendix A; PCK certificate profile; PCS API 4.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from ...errors import EvidenceError
from ...sgx.certification import CERT_PCK_CHAIN
from ...sgx.pck import PckExtension
from ...sgx.quote import QE_VENDOR_INTEL, Quote
from ...sgx.structs import Attributes, ReportBody, StructureError
from ..claims import Claims
from ..evidence import check_collateral, sgx_quote

_PEM_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----\n([A-Za-z0-9+/=\n]+?)\n-----END CERTIFICATE-----\n?")

# Last words of the subjects' common names; before them stands INTEL's or the simulated platform's name.
_PCK_NAME = ("SGX PCK Certificate",)
_PCK_CA_NAMES = ("SGX PCK Platform CA", "SGX PCK Processor CA")
_TCB_SIGNING_NAME = ("SGX TCB Signing",)

#: What a TCB status becomes if the quoting enclave is out of date (dcap-qvl and Intel's QVL agree).
_WITH_OLD_QE = {
    "UpToDate": "OutOfDate",
    "SWHardeningNeeded": "OutOfDate",
    "ConfigurationNeeded": "OutOfDateConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded": "OutOfDateConfigurationNeeded",
}


@dataclass(frozen=True, slots=True)
class _Level:
    status: str
    date: str
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Pck:
    """What the PCK certificate's SGX extension says about the platform."""

    cpusvn: bytes
    pce_svn: int
    pce_id: bytes
    fmspc: bytes


def verify_quote(
    raw: bytes,
    collateral: dict[str, Any] | None,
    *,
    root: bytes,
    now: int,
    tee: str,
    simulated: bool,
) -> Claims:
    """The authentic claims of a version 3 quote.

    Args:
        raw: the quote, nothing around it.
        collateral: in dcap-qvl's JSON layout.
        root: the only trusted root CA certificate, DER.
        now: seconds since 1970.
        tee: what to write into the claims, with ``simulated``.

    Raises:
        EvidenceError: with an id for each cause; see the functions below.
    """
    quote = sgx_quote(raw)
    body = quote.report_body()
    qe_body = quote.qe_report_body()
    if quote.header.qe_vendor_id != QE_VENDOR_INTEL:
        raise _refused(
            "quote.qe_vendor",
            "the quoting enclave's vendor is unknown",
            quote.header.qe_vendor_id.hex(),
            QE_VENDOR_INTEL.hex(),
        )
    if quote.cert_type != CERT_PCK_CHAIN:
        raise _refused(
            "quote.cert_type",
            "the quote does not carry its PCK certificate chain",
            f"type {quote.cert_type}",
            f"type {CERT_PCK_CHAIN}",
            "configure the platform's quote provider to embed the chain",
        )
    anchor = _load_certificate(root)
    leaf, authority = _chain(quote.cert_data.removesuffix(b"\0"), anchor, "the quote's certificate chain")
    if collateral is None:
        raise _refused(
            "collateral.missing",
            "there is no collateral",
            None,
            "TCB info, QE identity and CRLs",
            "pass the collateral of the platform, for example from its PCCS",
        )
    parts = check_collateral(collateral)
    certificates = _Certificates(
        anchor,
        authority,
        leaf,
        *_chain(parts["pck_crl_issuer_chain"].encode(), anchor, "the PCK CRL's issuer chain", length=1),
        *_chain(parts["tcb_info_issuer_chain"].encode(), anchor, "the TCB info's issuer chain", length=1),
        *_chain(parts["qe_identity_issuer_chain"].encode(), anchor, "the QE identity's issuer chain", length=1),
    )
    _check_certificates(certificates)
    window = _Window(now)
    for certificate in (anchor, authority, leaf, certificates.pck_ca, certificates.tcb_signer, certificates.qe_signer):
        window.certificate(certificate)
    _check_revocation(parts, certificates, window)
    tcb_info = _signed_json(parts, "tcb_info", certificates.tcb_signer, window)
    qe_identity = _signed_json(parts, "qe_identity", certificates.qe_signer, window)
    _check_quote_signatures(quote, qe_body, leaf)
    pck = _pck_extension(leaf)
    try:
        _check_collateral_subject(tcb_info, qe_identity, pck)
        _check_qe_identity(qe_body, qe_identity)
        level = _tcb_level(tcb_info, pck)
        qe_level = _qe_level(qe_identity, qe_body)
        evaluation_number = int(tcb_info["tcbEvaluationDataNumber"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # It is signed, so its issuer wrote something that this version does not know.
        raise _refused("collateral.malformed", "the collateral's contents are not understood", repr(error)) from None
    status = level.status
    if qe_level.status == "OutOfDate":
        status = _WITH_OLD_QE.get(status, status)
    if "Revoked" in (level.status, qe_level.status):
        raise _refused("tcb.revoked", "this TCB level is revoked", "Revoked", None, "update the platform")
    if not body.debug:
        # dcap-qvl refuses every debug enclave; whether one is acceptable is for the policy to say.
        _second_opinion(raw, parts, root, now, status)
    return Claims(
        tee=tee,
        simulated=simulated,
        mrenclave=body.mrenclave.hex(),
        mrsigner=body.mrsigner.hex(),
        isv_prod_id=body.isv_prod_id,
        isv_svn=body.isv_svn,
        debug=body.debug,
        attributes=body.attributes[:8].hex(),
        xfrm=body.attributes[8:].hex(),
        miscselect=body.miscselect,
        cpusvn=body.cpusvn.hex(),
        config_id=body.config_id.hex(),
        report_data=body.report_data.hex(),
        tcb_status=status,
        advisories=tuple(sorted({*level.advisories, *qe_level.advisories})),
        tcb_date=level.date,
        tcb_evaluation_number=evaluation_number,
        fmspc=pck.fmspc.hex(),
        pce_svn=pck.pce_svn,
        root_fingerprint=hashlib.sha256(root).hexdigest(),
        collateral_issued=window.issued,
        collateral_expires=window.expires,
        verified_at=now,
    )


@dataclass(frozen=True, slots=True)
class _Certificates:
    """Every certificate that the evidence and its collateral bring, besides further copies of the root."""

    anchor: x509.Certificate
    authority: x509.Certificate
    leaf: x509.Certificate
    pck_ca: x509.Certificate
    tcb_signer: x509.Certificate
    qe_signer: x509.Certificate


class _Window:
    """Checks that everything is valid now, and remembers the collateral's oldest issue and first expiry."""

    def __init__(self, now: int) -> None:
        self._now = now
        self.issued = now
        self.expires = 1 << 62

    def certificate(self, certificate: x509.Certificate) -> None:
        """Refuses with ``evidence.certificate.expired`` or ``.not_yet_valid``."""
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        self._check("certificate", _common_name(certificate), start, end)

    def collateral(self, what: str, issued: datetime.datetime, until: datetime.datetime | None) -> None:
        """Refuses with ``evidence.collateral.expired`` or ``.not_yet_valid``."""
        if until is None:
            raise _refused("collateral.malformed", f"{what} never expires", None, "a date of the next update")
        self._check("collateral", what, issued, until)
        self.issued = min(self.issued, int(issued.timestamp()))
        self.expires = min(self.expires, int(until.timestamp()))

    def _check(self, kind: str, what: str, start: datetime.datetime, end: datetime.datetime) -> None:
        now = _iso(datetime.datetime.fromtimestamp(self._now, datetime.UTC))
        if self._now < start.timestamp():
            raise _refused(
                f"{kind}.not_yet_valid",
                f"{what} is not valid yet",
                now,
                f"{_iso(start)} or later",
                "check this machine's clock",
            )
        if self._now > end.timestamp():
            raise _refused(
                f"{kind}.expired",
                f"{what} has expired",
                now,
                f"{_iso(end)} or earlier",
                "fetch fresh collateral" if kind == "collateral" else "the platform needs new certificates",
            )


def _chain(pem: bytes, anchor: x509.Certificate, what: str, *, length: int = 2) -> tuple[x509.Certificate, ...]:
    """The certificates of a PEM chain below the root, which must be the anchor itself; any order after the leaf.

    Refuses with ``evidence.certificate.malformed`` or ``evidence.root.untrusted``.
    """
    found: list[x509.Certificate] = []
    rebuilt = b""
    for match in _PEM_BLOCK.finditer(pem):
        try:
            data = base64.b64decode(match[1].replace(b"\n", b""), validate=True)
        except ValueError:
            raise _refused("certificate.malformed", f"{what} is not base64", None) from None
        found.append(_load_certificate(data))
        rebuilt += found[-1].public_bytes(Encoding.PEM)
    # Canonical text leaves no bit in which two accepted chains could differ.
    if rebuilt.rstrip(b"\n") != pem.rstrip(b"\n"):
        raise _refused("certificate.malformed", f"{what} is not plain PEM", f"{len(pem)} bytes")
    roots = [certificate for certificate in found if certificate.subject == certificate.issuer]
    others = [certificate for certificate in found if certificate.subject != certificate.issuer]
    if len(roots) != 1 or len(others) != length:
        raise _refused(
            "certificate.malformed",
            f"{what} has the wrong length",
            f"{len(others)} and {len(roots)} self-signed",
            f"{length} and the root",
        )
    if roots[0] != anchor:
        raise _refused(
            "root.untrusted",
            f"{what} ends in a root that is not trusted",
            f"{_common_name(roots[0])}, SHA-256 {_fingerprint(roots[0])}",
            f"{_common_name(anchor)}, SHA-256 {_fingerprint(anchor)}",
            'evidence of a simulated platform needs simulated = "allow" and its root as trust_anchor',
        )
    return tuple(others)


def _check_certificates(given: _Certificates) -> None:
    """Signatures, purposes and names. Refuses with ``evidence.certificate.signature`` or ``.purpose``."""
    for certificate, issuer in (
        (given.anchor, given.anchor),
        (given.authority, given.anchor),
        (given.leaf, given.authority),
        (given.pck_ca, given.anchor),
        (given.tcb_signer, given.anchor),
        (given.qe_signer, given.anchor),
    ):
        try:
            certificate.verify_directly_issued_by(issuer)
        except Exception as error:  # As below: whatever the library objects to, the certificate is not accepted.
            raise _refused(
                "certificate.signature",
                f"the certificate {_common_name(certificate)} is not signed by {_common_name(issuer)}",
                str(error) or "the signature does not verify",
            ) from None
    for certificate, is_ca, names in (
        (given.leaf, False, _PCK_NAME),
        (given.authority, True, _PCK_CA_NAMES),
        (given.pck_ca, True, _PCK_CA_NAMES),
        (given.tcb_signer, False, _TCB_SIGNING_NAME),
        (given.qe_signer, False, _TCB_SIGNING_NAME),
    ):
        name = _common_name(certificate)
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
            fits = constraints.ca is is_ca and (usage.key_cert_sign if is_ca else usage.digital_signature)
        except x509.ExtensionNotFound:
            fits = False
        if not fits or not name.endswith(names):
            raise _refused(
                "certificate.purpose",
                "a certificate is used for something else than it was issued for",
                name,
                " or ".join(names),
            )
    if given.pck_ca.public_key() != given.authority.public_key():
        raise _refused(
            "collateral.mismatch",
            "the PCK CRL is not that of the quote's certificate authority",
            _common_name(given.pck_ca),
            _common_name(given.authority),
            "fetch the collateral of this platform",
        )


def _check_revocation(parts: dict[str, str], given: _Certificates, window: _Window) -> None:
    """Refuses with ``evidence.collateral.signature``, ``.malformed``, dates, or ``evidence.certificate.revoked``."""
    for key, issuer, subjects in (
        ("root_ca_crl", given.anchor, (given.anchor, given.authority, given.tcb_signer, given.qe_signer)),
        ("pck_crl", given.authority, (given.leaf,)),
    ):
        try:
            crl = x509.load_der_x509_crl(bytes.fromhex(parts[key]))
            signed = crl.issuer == issuer.subject and crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
            entries = [crl.get_revoked_certificate_by_serial_number(subject.serial_number) for subject in subjects]
            issued, until = crl.last_update_utc, crl.next_update_utc
        except Exception as error:  # As with certificates.
            raise _refused("collateral.malformed", f"{key} cannot be parsed", str(error)) from None
        if not signed:
            raise _refused("collateral.signature", f"{key} is not signed by {_common_name(issuer)}", None)
        window.collateral(key, issued, until)
        for subject, entry in zip(subjects, entries, strict=True):
            if entry is not None:
                raise _refused(
                    "certificate.revoked",
                    f"the certificate {_common_name(subject)} is revoked",
                    f"serial {subject.serial_number:x}",
                    None,
                    "do not trust this platform",
                )


def _signed_json(parts: dict[str, str], key: str, signer: x509.Certificate, window: _Window) -> dict[str, Any]:
    """Refuses with ``evidence.collateral.signature``, ``.malformed`` or its dates."""
    text = parts[key].encode()
    if not _signature_valid(signer, bytes.fromhex(parts[f"{key}_signature"]), text):
        raise _refused("collateral.signature", f"the signature of {key} does not verify", None)
    try:
        document: dict[str, Any] = json.loads(text)
        issued, until = (
            datetime.datetime.strptime(document[name], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.UTC)
            for name in ("issueDate", "nextUpdate")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _refused("collateral.malformed", f"{key} is not understood", repr(error)) from None
    window.collateral(key, issued, until)
    return document


def _check_quote_signatures(quote: Quote, qe_body: ReportBody, leaf: x509.Certificate) -> None:
    """Refuses with ``evidence.quote.signature``, ``.qe_binding`` or ``.qe_signature``."""
    try:
        attestation_key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + quote.attestation_key)
    except ValueError:
        raise _refused("quote.attestation_key", "the attestation key is not a point of P-256", None) from None
    expected = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest() + bytes(32)
    if qe_body.report_data != expected:
        raise _refused(
            "quote.qe_binding",
            "the quoting enclave does not vouch for the attestation key",
            qe_body.report_data.hex(),
            expected.hex(),
        )
    if not _signature_valid(leaf, quote.qe_report_signature, quote.qe_report):
        raise _refused("quote.qe_signature", "the quoting enclave's report is not signed by the PCK", None)
    if not _raw_signature_valid(attestation_key, quote.signature, quote.signed_bytes()):
        raise _refused(
            "quote.signature",
            "the quote's signature does not verify",
            None,
            None,
            "the quote was damaged or forged: challenge the enclave again",
        )


def _check_collateral_subject(tcb_info: dict[str, Any], qe_identity: dict[str, Any], pck: _Pck) -> None:
    """Refuses with ``evidence.collateral.mismatch``: collateral of another platform or kind."""
    for what, found, expected in (
        ("the TCB info's kind", (tcb_info["id"], tcb_info["version"], tcb_info["tcbType"]), ("SGX", 3, 0)),
        ("the QE identity's kind", (qe_identity["id"], qe_identity["version"]), ("QE", 2)),
        ("the TCB info's FMSPC", tcb_info["fmspc"].lower(), pck.fmspc.hex()),
        ("the TCB info's PCE-ID", tcb_info["pceId"].lower(), pck.pce_id.hex()),
    ):
        if found != expected:
            raise _refused(
                "collateral.mismatch",
                f"{what} does not fit the quote",
                found,
                expected,
                "fetch the collateral of this platform",
            )


def _check_qe_identity(qe: ReportBody, document: dict[str, Any]) -> None:
    """Refuses with ``evidence.quote.qe_identity``: another enclave than the quoting enclave signed."""
    mask = Attributes.from_bytes(bytes.fromhex(document["attributesMask"]))
    # MISCSELECT and its mask are written big-endian, as numbers.
    misc_mask = int(document["miscselectMask"], 16)
    for what, found, expected in (
        ("MRSIGNER", qe.mrsigner.hex(), document["mrsigner"].lower()),
        ("ISVPRODID", qe.isv_prod_id, document["isvprodid"]),
        ("MISCSELECT", qe.miscselect & misc_mask, int(document["miscselect"], 16) & misc_mask),
        (
            "ATTRIBUTES",
            Attributes.from_bytes(qe.attributes).masked(mask),
            Attributes.from_bytes(bytes.fromhex(document["attributes"])).masked(mask),
        ),
    ):
        if found != expected:
            raise _refused("quote.qe_identity", f"the quoting enclave's {what} is wrong", found, expected)


def _tcb_level(tcb_info: dict[str, Any], pck: _Pck) -> _Level:
    """The first level that the platform reaches. Refuses with ``evidence.tcb.unknown``."""
    for level in tcb_info["tcbLevels"]:
        wanted = [component["svn"] for component in level["tcb"]["sgxtcbcomponents"]]
        if len(wanted) != len(pck.cpusvn):
            raise ValueError(f"{len(wanted)} TCB components")
        if all(have >= want for have, want in zip(pck.cpusvn, wanted, strict=True)) and (
            pck.pce_svn >= level["tcb"]["pcesvn"]
        ):
            return _Level(level["tcbStatus"], level["tcbDate"], tuple(level.get("advisoryIDs", ())))
    raise _refused("tcb.unknown", "the platform reaches no TCB level", pck.cpusvn.hex(), None, "update the platform")


def _qe_level(qe_identity: dict[str, Any], qe: ReportBody) -> _Level:
    """The first level that the quoting enclave reaches. Refuses with ``evidence.tcb.unknown``."""
    for level in qe_identity["tcbLevels"]:
        if qe.isv_svn >= level["tcb"]["isvsvn"]:
            return _Level(level["tcbStatus"], level["tcbDate"], tuple(level.get("advisoryIDs", ())))
    raise _refused("tcb.unknown", "the quoting enclave reaches no TCB level", qe.isv_svn, None, "update the platform")


def _pck_extension(leaf: x509.Certificate) -> _Pck:
    """Refuses with ``evidence.certificate.malformed``."""
    try:
        found = PckExtension.from_certificate(leaf.public_bytes(Encoding.DER))
    except StructureError as error:
        raise _refused(
            "certificate.malformed", "the PCK certificate has no usable SGX extension", error.found
        ) from None
    return _Pck(found.cpusvn, found.pce_svn, found.pce_id, found.fmspc)


def _second_opinion(raw: bytes, parts: dict[str, str], root: bytes, now: int, status: str) -> None:
    """dcap-qvl must agree. Refuses with ``evidence.quote.refused`` or ``evidence.verifier.disagreement``."""
    import dcap_qvl

    try:
        verified = dcap_qvl.verify_with_root_ca(raw, dcap_qvl.QuoteCollateralV3.from_json(json.dumps(parts)), root, now)
    except ValueError as error:
        raise _refused("quote.refused", "the quote does not verify", " ".join(str(error).split())) from None
    if verified.status != status:
        raise _refused("verifier.disagreement", "two verifiers disagree on the TCB status", verified.status, status)


def _signature_valid(signer: x509.Certificate, signature: bytes, message: bytes) -> bool:
    key = signer.public_key()
    return isinstance(key, ec.EllipticCurvePublicKey) and _raw_signature_valid(key, signature, message)


def _raw_signature_valid(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes) -> bool:
    if len(signature) != 64:
        return False
    encoded = utils.encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
    try:
        key.verify(encoded, message, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def _load_certificate(data: bytes) -> x509.Certificate:
    """Refuses with ``evidence.certificate.malformed``."""
    try:
        certificate = x509.load_der_x509_certificate(data)
        # The library parses these when they are first asked for; afterwards they cannot fail.
        _ = certificate.subject, certificate.issuer, certificate.extensions, certificate.public_key()
        _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.signature_hash_algorithm
    except Exception as error:  # The library has a dozen unrelated exceptions for what is wrong with a certificate.
        raise _refused("certificate.malformed", "a certificate cannot be parsed", str(error)) from None
    return certificate


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else "(no name)"


def _fingerprint(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(SHA256()).hex()


def _iso(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _refused(event: str, what: str, found: object, expected: object = None, remedy: str | None = None) -> EvidenceError:
    return EvidenceError(what, id=f"evidence.{event}", found=found, expected=expected, remedy=remedy)
