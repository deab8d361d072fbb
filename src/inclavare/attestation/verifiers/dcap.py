"""Verification of ECDSA quotes (DCAP) of enclaves and trust domains against one given root, by two verifiers.

The steps below name the cause of a refusal and are strict where dcap-qvl is lenient (bytes after the quote, text around
PEM blocks, CRLs of the future, certificate purposes). dcap-qvl is the independent second opinion: both must accept,
with the same TCB status. It judges no debug enclave or TD, and no SGX quote of version 4 or 5; there our steps stand
alone.

What quotes of one platform have in common is judged once: collateral, certification and TCB, by both verifiers, for as
long as everything in them is valid. They are found again only if every byte is the same. Left for each quote are its
body and its signature. Sources: Intel "SGX ECDSA QuoteLibReference" and "TDX DCAP Quoting Library API", appendices on
quote formats; PCK certificate profile; PCS API 4; TDX Module ABI Specification, TDX attributes.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ...errors import InclavareError
from ...sgx.certification import CERT_PCK_CHAIN
from ...sgx.pck import PckExtension
from ...sgx.quote import QE_VENDOR_INTEL, TEE_TDX, TEE_TYPES, VERSION_3, Quote
from ...sgx.structs import Attributes, ReportBody, StructureError
from ...sgx.tdx import (
    TD_KL,
    TD_MIGRATABLE,
    TD_PERFMON,
    TD_PKS,
    TD_SEPT_VE_DISABLE,
    TdReport10,
    TdReport15,
)
from ..claims import Claims, Endorsement, TdxClaims
from ..collateral import PCK_CHAIN_KEY, check_collateral
from . import certificates as pki
from .certificates import Period, Validity, refused
from .tcb import PartLevels, Rating, TcbInfo, after_relaunch, check_not_revoked

# Last words of the subjects' common names; before them stands INTEL's or the simulated platform's name.
_PCK_NAME = ("SGX PCK Certificate",)
_PCK_CA_NAMES = ("SGX PCK Platform CA", "SGX PCK Processor CA")
_TCB_SIGNING_NAME = ("SGX TCB Signing",)

#: How many sets of collateral, platforms and verdicts are remembered; some 100 KB, 10 KB and 3 KB each.
_COLLATERALS = 64
_PLATFORMS = 512
_VERDICTS = 1024

#: ATTRIBUTES of a TD, bits that must be zero (TDX Module ABI Specification, 348551-008US, table 3.23).
_TD_RESERVED = 0x3FFFFFFF0780FF8E
#: DEBUG, and the bits of the group "TD under debug" that let the host profile it.
_TD_UNDER_DEBUG = 0x71
_TD_SERVTD_EXT = 1 << 17

_SGX_BODY_JUDGED = 64
_TDX_BODY_JUDGED = 136


def verify_quote(
    raw: bytes,
    collateral: dict[str, str] | None,
    *,
    root: bytes,
    now: int,
    tee: str,
    simulated: bool,
    source: str | None = None,
) -> Claims:
    """The authentic claims of a quote.

    Args:
        raw: the quote, nothing around it.
        collateral: in dcap-qvl's JSON layout.
        root: the only trusted root CA certificate, DER.
        now: seconds since 1970.
        tee: what to write into the claims, with ``simulated``: ``sgx…`` for enclaves, ``tdx…`` for trust domains.
        source: where the collateral came from.

    Raises:
        EvidenceError: with an id for each cause; see the functions below.
    """
    quote = Quote.from_bytes(raw)
    _check_header(quote, tee)
    body: ReportBody | TdReport10 = quote.td_report() if quote.header.tee_type == TEE_TDX else quote.report_body()
    if isinstance(body, TdReport10):
        _check_domain(body)
    given = _collateral(root, TEE_TYPES[quote.header.tee_type], _parts(collateral))
    platform = _platform(given, _certification(quote, given))
    platform.validity.check(now)
    _check_signature(quote, platform)
    verdict = _verdict(quote, body, given, platform, raw, now)
    common: dict[str, Any] = {
        "tee": tee,
        "simulated": simulated,
        "report_data": body.report_data.hex(),
        "tcb_status": verdict.rating.status,
        "advisories": verdict.rating.advisories,
        "tcb_date": verdict.rating.date,
        "root_fingerprint": given.root_fingerprint,
        "collateral_issued": given.validity.issued,
        "collateral_expires": given.validity.expires,
        "verified_at": now,
        "collateral_source": source,
        "endorsements": given.endorsements,
        "tcb_evaluation_number": given.tcb_info.number,
        "fmspc": platform.pck.fmspc.hex(),
        "pce_svn": platform.pck.pce_svn,
        "platform_instance_id": platform.instance_id,
        "signed": quote.signed_bytes(),
    }
    if isinstance(body, TdReport10):
        return Claims(
            debug=bool(body.td_attributes & _TD_UNDER_DEBUG),
            cpusvn=platform.pck.cpusvn.hex(),
            tdx=_domain_claims(body, verdict.module),
            **common,
        )
    return Claims(
        debug=body.debug,
        mrenclave=body.mrenclave.hex(),
        mrsigner=body.mrsigner.hex(),
        isv_prod_id=body.isv_prod_id,
        isv_svn=body.isv_svn,
        attributes=body.attributes[:8].hex(),
        xfrm=body.attributes[8:].hex(),
        miscselect=body.miscselect,
        cpusvn=body.cpusvn.hex(),
        config_id=body.config_id.hex(),
        config_svn=body.config_svn,
        isv_ext_prod_id=body.isv_ext_prod_id.hex(),
        isv_family_id=body.isv_family_id.hex(),
        **common,
    )


def forget() -> None:
    """Judge everything anew; for measurements of what the memory is worth."""
    pki.load.cache_clear()
    pki.check_issued.cache_clear()
    _collateral.cache_clear()
    _platform.cache_clear()
    _verdicts.clear()


# The quote alone


def _check_header(quote: Quote, tee: str) -> None:
    """Refuses with ``evidence.quote.tee`` or ``.qe_vendor``."""
    expected = "TDX" if tee.startswith("tdx") else "SGX"
    found = TEE_TYPES[quote.header.tee_type]
    if found != expected:
        raise refused(
            "quote.tee", "the quote is of another TEE than the evidence says", found, expected, "say what it is"
        )
    if quote.header.qe_vendor_id != QE_VENDOR_INTEL:
        raise refused(
            "quote.qe_vendor",
            "the quoting enclave's vendor is unknown",
            quote.header.qe_vendor_id.hex(),
            QE_VENDOR_INTEL.hex(),
        )


def _check_domain(body: TdReport10) -> None:
    """Refuses with ``evidence.td.attributes`` or ``.service_td``. Debugging is left to the policy."""
    attributes = body.td_attributes
    for wrong, what in (
        (attributes & _TD_RESERVED, "reserved bits are set"),
        (not attributes & TD_SEPT_VE_DISABLE, "SEPT_VE_DISABLE is not set: the host could inject faults"),
        (attributes & TD_MIGRATABLE, "the trust domain is migratable"),
        (attributes & _TD_SERVTD_EXT, "service TD extensions are enabled"),
    ):
        if wrong:
            raise refused(
                "td.attributes", f"the trust domain's ATTRIBUTES are not acceptable: {what}", f"{attributes:#x}"
            )
    if isinstance(body, TdReport15) and any(body.mr_service_td):
        raise refused("td.service_td", "another trust domain serves this one", body.mr_service_td.hex(), "none")


# Collateral


@dataclass(frozen=True, slots=True, eq=False)
class _Collateral:
    """Authentic collateral under one root; compared by identity, because :func:`_collateral` makes one for each."""

    root: bytes
    root_fingerprint: str
    parts: tuple[str, ...]
    anchor: x509.Certificate
    pck_ca: x509.Certificate
    root_crl: x509.CertificateRevocationList
    pck_crl: x509.CertificateRevocationList
    tcb_info: TcbInfo
    qe_identity: dict[str, Any]
    qe_levels: PartLevels
    validity: Validity
    endorsements: tuple[Endorsement, ...]
    for_dcap_qvl: Any


_PART_KEYS = (
    "pck_crl_issuer_chain",
    "root_ca_crl",
    "pck_crl",
    "tcb_info_issuer_chain",
    "tcb_info",
    "tcb_info_signature",
    "qe_identity_issuer_chain",
    "qe_identity",
    "qe_identity_signature",
)


def _parts(collateral: dict[str, str] | None) -> tuple[str, ...]:
    """The collateral's values in the order of ``_PART_KEYS``, then the PCK certificate chain or an empty text.

    Refuses with ``evidence.collateral.missing`` or ``.malformed``.
    """
    if collateral is None:
        raise refused(
            "collateral.missing",
            "there is no collateral",
            None,
            "TCB info, QE identity and CRLs",
            "pass the collateral of the platform, from a file or its PCCS",
        )
    try:
        return (*[collateral[key] for key in _PART_KEYS], collateral.get(PCK_CHAIN_KEY, ""))
    except (KeyError, TypeError, AttributeError):
        check_collateral(collateral)
        raise


@functools.lru_cache(maxsize=_COLLATERALS)
def _collateral(root: bytes, tee: str, parts: tuple[str, ...]) -> _Collateral:
    """Everything that does not depend on the quote or the time; ``tee`` is ``SGX`` or ``TDX``.

    Refuses with ``evidence.collateral.*``, ``evidence.certificate.*`` or ``evidence.root.untrusted``.
    """
    given = dict(zip(_PART_KEYS, parts, strict=False))
    check_collateral(given)
    anchor = pki.load(root)
    pck_ca, tcb_signer, qe_signer = (
        pki.chain(given[key].encode(), anchor, what, length=1)[0]
        for key, what in (
            ("pck_crl_issuer_chain", "the PCK CRL's issuer chain"),
            ("tcb_info_issuer_chain", "the TCB info's issuer chain"),
            ("qe_identity_issuer_chain", "the QE identity's issuer chain"),
        )
    )
    for certificate in (anchor, pck_ca, tcb_signer, qe_signer):
        pki.check_issued(certificate, anchor)
    pki.check_purpose(pck_ca, _PCK_CA_NAMES, is_ca=True)
    pki.check_purpose(tcb_signer, _TCB_SIGNING_NAME, is_ca=False)
    pki.check_purpose(qe_signer, _TCB_SIGNING_NAME, is_ca=False)
    root_crl, root_crl_period = pki.revocation_list(bytes.fromhex(given["root_ca_crl"]), "root_ca_crl", anchor)
    pck_crl, pck_crl_period = pki.revocation_list(bytes.fromhex(given["pck_crl"]), "pck_crl", pck_ca)
    for certificate in (anchor, pck_ca, tcb_signer, qe_signer):
        pki.check_not_revoked(root_crl, certificate)
    tcb_info, tcb_info_period = _signed_json(given, "tcb_info", tcb_signer)
    qe_identity, qe_identity_period = _signed_json(given, "qe_identity", qe_signer)
    try:
        info = TcbInfo.parse(tcb_info, tee)
        _check_qe_kind(qe_identity, tee)
        levels = PartLevels.parse("the quoting enclave", qe_identity["tcbLevels"])
        qe_number = int(qe_identity["tcbEvaluationDataNumber"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_understood(error) from None
    dated = (
        (root_crl_period, given["root_ca_crl"].encode(), anchor, pki.crl_number(root_crl)),
        (pck_crl_period, given["pck_crl"].encode(), pck_ca, pki.crl_number(pck_crl)),
        (tcb_info_period, given["tcb_info"].encode(), tcb_signer, info.number),
        (qe_identity_period, given["qe_identity"].encode(), qe_signer, qe_number),
    )
    return _Collateral(
        root=root,
        root_fingerprint=hashlib.sha256(root).hexdigest(),
        parts=parts,
        anchor=anchor,
        pck_ca=pck_ca,
        root_crl=root_crl,
        pck_crl=pck_crl,
        tcb_info=info,
        qe_identity=qe_identity,
        qe_levels=levels,
        validity=Validity(
            [
                *(Period.of(certificate) for certificate in (anchor, pck_ca, tcb_signer, qe_signer)),
                *(period for period, *_ in dated),
            ]
        ),
        endorsements=tuple(
            Endorsement(
                period.what,
                period.start,
                period.end,
                hashlib.sha256(bytes.fromhex(data.decode()) if period.what.endswith("crl") else data).hexdigest(),
                pki.common_name(issuer),
                number,
            )
            for period, data, issuer, number in dated
        ),
        for_dcap_qvl=_for_dcap_qvl(parts),
    )


def _signed_json(parts: dict[str, str], key: str, signer: x509.Certificate) -> tuple[dict[str, Any], Period]:
    """Refuses with ``evidence.collateral.signature`` or ``.malformed``."""
    text = parts[key].encode()
    if not pki.signature_valid(signer.public_key(), bytes.fromhex(parts[f"{key}_signature"]), text):
        raise refused("collateral.signature", f"the signature of {key} does not verify", None)
    try:
        document = json.loads(text)
        start, end = (
            int(datetime.datetime.strptime(document[name], "%Y-%m-%dT%H:%M:%S%z").timestamp())
            for name in ("issueDate", "nextUpdate")
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise refused("collateral.malformed", f"{key} is not understood", repr(error)) from None
    return document, Period("collateral", key, start, end)


def _check_qe_kind(document: dict[str, Any], tee: str) -> None:
    """Refuses with ``evidence.collateral.mismatch``."""
    expected, versions = ("QE", (2,)) if tee == "SGX" else ("TD_QE", (2, 3))
    found = (document["id"], document["version"])
    if found[0] != expected or found[1] not in versions:
        raise refused(
            "collateral.mismatch",
            "the QE identity's kind does not fit the quote",
            f"{found[0]}, version {found[1]}",
            f"{expected}, version {' or '.join(map(str, versions))}",
            "fetch the collateral of this platform",
        )


def _for_dcap_qvl(parts: tuple[str, ...]) -> Any:
    import dcap_qvl

    given = {key: value for key, value in zip((*_PART_KEYS, PCK_CHAIN_KEY), parts, strict=True) if value}
    try:
        return dcap_qvl.QuoteCollateralV3.from_json(json.dumps(given))
    except ValueError as error:
        raise refused("collateral.malformed", "the collateral is not understood", str(error)) from None


# The platform: certification


@dataclass(frozen=True, slots=True)
class _Certification:
    """What vouches for an attestation key; every byte counts."""

    chain: bytes
    qe_report: bytes
    qe_report_signature: bytes
    qe_auth_data: bytes
    attestation_key: bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Platform:
    """A certified attestation key; compared by identity, because :func:`_platform` makes one for each."""

    attestation_key: ec.EllipticCurvePublicKey
    pck: PckExtension
    instance_id: str | None
    qe_rating: Rating
    validity: Validity
    certification: _Certification


def _certification(quote: Quote, given: _Collateral) -> _Certification:
    """Refuses with ``evidence.quote.cert_type``."""
    fetched = given.parts[-1].encode()
    if quote.cert_type == CERT_PCK_CHAIN and not fetched:
        chain = quote.cert_data.removesuffix(b"\0")
    elif fetched:
        chain = fetched
    else:
        raise refused(
            "quote.cert_type",
            "the quote does not carry its PCK certificate chain",
            f"type {quote.cert_type}",
            f"type {CERT_PCK_CHAIN}, or collateral with {PCK_CHAIN_KEY}",
            "configure the platform's quote provider to embed the chain, or fetch it from the platform's PCCS",
        )
    return _Certification(chain, quote.qe_report, quote.qe_report_signature, quote.qe_auth_data, quote.attestation_key)


@functools.lru_cache(maxsize=_PLATFORMS)
def _platform(given: _Collateral, by: _Certification) -> _Platform:
    """Everything about the platform that does not depend on the time.

    Refuses with ``evidence.certificate.*``, ``evidence.root.untrusted``, ``evidence.collateral.mismatch``,
    ``evidence.quote.qe_*`` or ``evidence.quote.attestation_key``.
    """
    leaf, authority = pki.chain(by.chain, given.anchor, "the quote's certificate chain")
    pki.check_issued(authority, given.anchor)
    pki.check_issued(leaf, authority)
    pki.check_purpose(leaf, _PCK_NAME, is_ca=False)
    pki.check_purpose(authority, _PCK_CA_NAMES, is_ca=True)
    if given.pck_ca.public_key() != authority.public_key():
        raise refused(
            "collateral.mismatch",
            "the PCK CRL is not that of the quote's certificate authority",
            pki.common_name(given.pck_ca),
            pki.common_name(authority),
            "fetch the collateral of this platform",
        )
    pki.check_not_revoked(given.root_crl, authority)
    pki.check_not_revoked(given.pck_crl, leaf)
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + by.attestation_key)
    except ValueError:
        raise refused("quote.attestation_key", "the attestation key is not a point of P-256", None) from None
    qe = _qe_report(by)
    expected = hashlib.sha256(by.attestation_key + by.qe_auth_data).digest() + bytes(32)
    if qe.report_data != expected:
        raise refused(
            "quote.qe_binding",
            "the quoting enclave does not vouch for the attestation key",
            qe.report_data.hex(),
            expected.hex(),
        )
    if not pki.signature_valid(leaf.public_key(), by.qe_report_signature, by.qe_report):
        raise refused("quote.qe_signature", "the quoting enclave's report is not signed by the PCK", None)
    pck = _pck_extension(leaf)
    for what, found, wanted in (
        ("the TCB info's FMSPC", given.tcb_info.fmspc, pck.fmspc),
        ("the TCB info's PCE-ID", given.tcb_info.pce_id, pck.pce_id),
    ):
        if found != wanted:
            raise refused(
                "collateral.mismatch",
                f"{what} does not fit the quote",
                found.hex(),
                wanted.hex(),
                "fetch the collateral of this platform",
            )
    try:
        _check_qe_identity(qe, given.qe_identity)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_understood(error) from None
    instance = pck.platform_instance_id
    return _Platform(
        attestation_key=key,
        pck=pck,
        instance_id=None if instance is None else instance.hex(),
        qe_rating=given.qe_levels.rate(qe.isv_svn),
        validity=Validity([Period.of(leaf), Period.of(authority), *given.validity.periods]),
        certification=by,
    )


def _qe_report(by: _Certification) -> ReportBody:
    """Refuses with ``evidence.quote.body``."""
    try:
        return ReportBody.from_bytes(by.qe_report)
    except StructureError as error:
        raise refused("quote.body", f"the quoting enclave's {error.message}", error.found, error.expected) from None


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
        ("DEBUG", qe.debug, False),
    ):
        if found != expected:
            raise refused("quote.qe_identity", f"the quoting enclave's {what} is wrong", found, expected)


def _pck_extension(leaf: x509.Certificate) -> PckExtension:
    """Refuses with ``evidence.certificate.malformed``."""
    try:
        return PckExtension.from_certificate(leaf.public_bytes(Encoding.DER))
    except StructureError as error:
        raise refused("certificate.malformed", "the PCK certificate has no usable SGX extension", error.found) from None


# Each quote


def _check_signature(quote: Quote, platform: _Platform) -> None:
    """Refuses with ``evidence.quote.signature``."""
    if not pki.signature_valid(platform.attestation_key, quote.signature, quote.signed_bytes()):
        raise refused(
            "quote.signature",
            "the quote's signature does not verify",
            None,
            None,
            "the quote was damaged or forged: challenge the enclave again",
        )


@dataclass(frozen=True, slots=True)
class _Verdict:
    """The platform's rating, with its quoting enclave's and TDX module's; and the latter's alone."""

    rating: Rating
    module: Rating | None


_Key = tuple[_Collateral, _Platform, bytes, bytes, bytes]
_verdicts: OrderedDict[_Key, _Verdict] = OrderedDict()


def _verdict(
    quote: Quote, body: ReportBody | TdReport10, given: _Collateral, platform: _Platform, raw: bytes, now: int
) -> _Verdict:
    """Our rating, with which dcap-qvl agrees. The quote's signature must have been verified, and the time checked.

    Refuses with ``evidence.tcb.*``, ``evidence.td.module``, ``evidence.quote.refused``,
    ``evidence.verifier.disagreement``.
    """
    # Of a body, what either verifier looks at besides its signature: of an enclave up to ATTRIBUTES, of a trust domain
    # up to XFAM, and what TDX 1.5 adds.
    judged = _SGX_BODY_JUDGED if isinstance(body, ReportBody) else _TDX_BODY_JUDGED
    key = (given, platform, quote.header.to_bytes(), quote.body[:judged], quote.body[TdReport10.LAYOUT.size :])
    found = _verdicts.get(key)
    if found is not None:
        return found
    if isinstance(body, TdReport10):
        found = _rate_domain(body, given.tcb_info, platform)
        judges = not body.td_attributes & _TD_UNDER_DEBUG
    else:
        rating = given.tcb_info.rate(platform.pck.tcb_components, platform.pck.pce_svn)
        found = _Verdict(rating.with_part(platform.qe_rating, dated=False), None)
        judges = not body.debug and quote.header.version == VERSION_3
    check_not_revoked(found.rating)
    if judges:
        _second_opinion(raw, given, now, found.rating.status)
    _verdicts[key] = found
    while len(_verdicts) > _VERDICTS:
        _verdicts.popitem(last=False)
    return found


def _rate_domain(body: TdReport10, info: TcbInfo, platform: _Platform) -> _Verdict:
    """Refuses with ``evidence.td.module`` or ``evidence.tcb.*``."""
    identity = info.module_identity(body.tee_tcb_svn)
    for what, found, expected in (
        ("MRSIGNERSEAM", body.mr_signer_seam.hex(), identity.mrsigner.hex()),
        # Bits outside of the mask must be zero.
        ("SEAMATTRIBUTES", f"{body.seam_attributes:#x}", f"{identity.attributes & identity.mask:#x}"),
    ):
        if found != expected:
            raise refused("td.module", f"the TDX module's {what} is wrong", found, expected)
    components, pce_svn = platform.pck.tcb_components, platform.pck.pce_svn
    launched = info.rate(components, pce_svn, body.tee_tcb_svn).with_part(platform.qe_rating, dated=False)
    if isinstance(body, TdReport15):
        current = info.rate(components, pce_svn, body.tee_tcb_svn2).with_part(platform.qe_rating, dated=False)
        check_not_revoked(launched, current)
        launched = after_relaunch(launched, current)
    return _Verdict(launched, info.module_rating(body.tee_tcb_svn))


def _second_opinion(raw: bytes, given: _Collateral, now: int, status: str) -> None:
    """dcap-qvl must agree. Refuses with ``evidence.quote.refused`` or ``evidence.verifier.disagreement``."""
    import dcap_qvl

    try:
        verified = dcap_qvl.verify_with_root_ca(raw, given.for_dcap_qvl, given.root, now)
    except ValueError as error:
        raise refused("quote.refused", "the quote does not verify", " ".join(str(error).split())) from None
    if verified.status != status:
        raise refused("verifier.disagreement", "two verifiers disagree on the TCB status", verified.status, status)


def _domain_claims(body: TdReport10, module: Rating | None) -> TdxClaims:
    later = body if isinstance(body, TdReport15) else None
    attributes = body.td_attributes
    return TdxClaims(
        mr_td=body.mr_td.hex(),
        mr_config_id=body.mr_config_id.hex(),
        mr_owner=body.mr_owner.hex(),
        mr_owner_config=body.mr_owner_config.hex(),
        mr_seam=body.mr_seam.hex(),
        mrsigner_seam=body.mr_signer_seam.hex(),
        seam_attributes=_little(body.seam_attributes),
        td_attributes=_little(attributes),
        xfam=_little(body.xfam),
        tcb_svn=body.tee_tcb_svn.hex(),
        rtmr_0=body.rtmr0.hex(),
        rtmr_1=body.rtmr1.hex(),
        rtmr_2=body.rtmr2.hex(),
        rtmr_3=body.rtmr3.hex(),
        septve_disable=bool(attributes & TD_SEPT_VE_DISABLE),
        migratable=bool(attributes & TD_MIGRATABLE),
        protection_keys=bool(attributes & TD_PKS),
        key_locker=bool(attributes & TD_KL),
        perfmon=bool(attributes & TD_PERFMON),
        tee_tcb_svn2=None if later is None else later.tee_tcb_svn2.hex(),
        mr_servicetd=None if later is None else later.mr_service_td.hex(),
        module_version=body.tee_tcb_svn[1],
        module_svn=body.tee_tcb_svn[0],
        module_status=None if module is None else module.status,
        module_date=None if module is None else module.date,
    )


def _little(number: int) -> str:
    return number.to_bytes(8, "little").hex()


def _not_understood(error: Exception) -> InclavareError:
    """For signed documents: their issuer wrote something that this version does not know."""
    return refused("collateral.malformed", "the collateral's contents are not understood", repr(error))
