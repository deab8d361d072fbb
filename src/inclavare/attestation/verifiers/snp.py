"""Evidence of AMD SEV-SNP guests. The roots are AMD's, and no policy or option can replace them.

A report is signed by the chip's VCEK or the host operator's VLEK, whose certificate names the chip and the TCB that
the key is derived from; ASK or ASVK and ARK are AMD's, per processor generation. AMD publishes no TCB levels: the
status is ``NotRated``, and a policy has to name the least TCB. A CRL is checked where there is one. Sources: AMD 56860
(firmware ABI) and 57230 ("VCEK certificate and KDS interface").
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from dataclasses import dataclass
from importlib import resources

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384

from ...sgx import der
from ..claims import NOT_RATED, Claims, Endorsement, SnpClaims, SnpTcb
from ..collateral import SNP_CERTIFICATES_KEY, SNP_CRL_KEY
from ..evidence import Evidence
from ..policy import Policy
from ..snp_report import SIGNATURE_ALGORITHM, SIGNED_SIZE, SnpReport, tcb
from . import certificates as pki
from .certificates import Period, Validity, refused

_OID = "1.3.6.1.4.1.3704.1"
_OID_HWID = f"{_OID}.4"
#: Parts of the TCB in a VCEK or VLEK certificate.
_OID_TCB = {
    "bootloader": f"{_OID}.3.1",
    "tee": f"{_OID}.3.2",
    "snp": f"{_OID}.3.3",
    "microcode": f"{_OID}.3.8",
    "fmc": f"{_OID}.3.9",
}
_SUBJECTS = {"SEV-VCEK": "vcek", "VCEK": "vcek", "SEV-VLEK": "vlek"}
#: Common names of the intermediate authorities end in the processor's.
_AUTHORITIES = {"vcek": "SEV-", "vlek": "SEV-VLEK-"}
_PROCESSORS = ("Milan", "Genoa", "Turin")
_CHIPS = 512


@dataclass(frozen=True, slots=True)
class _Key:
    """An authentic VCEK or VLEK.

    Attributes:
        kind: ``vcek`` or ``vlek``.
        processor: of the authority that issued it.
        hwid: the chip's id as far as the certificate has one: 64 bytes, 8 on Turin; empty for a VLEK.
    """

    kind: str
    processor: str
    public_key: ec.EllipticCurvePublicKey
    tcb: SnpTcb
    hwid: bytes
    root_fingerprint: str
    validity: Validity
    endorsements: tuple[Endorsement, ...]


class SnpVerifier:
    """See :class:`inclavare.attestation.verifiers.Verifier`."""

    def verify(self, evidence: Evidence, policy: Policy, now: int) -> Claims:
        """The authentic claims of an SEV-SNP guest.

        Raises:
            EvidenceError: ``evidence.snp.*``, ``evidence.collateral.*`` or ``evidence.certificate.*``.
        """
        report = SnpReport.from_bytes(evidence.quote)
        if report.sig_algo != SIGNATURE_ALGORITHM:
            raise refused(
                "snp.algorithm", "the report is signed in an unknown way", report.sig_algo, SIGNATURE_ALGORITHM
            )
        given = evidence.collateral
        if given is None:
            raise refused(
                "collateral.missing",
                "there is no certificate of the chip's key",
                None,
                "the VCEK or VLEK certificate",
                "let the attester send it, or fetch it from AMD's key distribution service",
            )
        if SNP_CERTIFICATES_KEY not in given:
            raise refused(
                "collateral.mismatch",
                "the collateral is not that of an SEV-SNP report",
                ", ".join(sorted(given))[:200],
                SNP_CERTIFICATES_KEY,
                "give the VCEK or VLEK certificate, or fetch it from AMD's key distribution service",
            )
        key = _key(given[SNP_CERTIFICATES_KEY], given.get(SNP_CRL_KEY, ""))
        key.validity.check(now)
        _check_belongs(report, key)
        if not pki.signature_valid(key.public_key, report.signature(), evidence.quote[:SIGNED_SIZE], SHA384()):
            raise refused(
                "snp.signature",
                "the report's signature does not verify",
                None,
                None,
                "the report was damaged or forged: challenge the guest again",
            )
        return Claims(
            tee="snp",
            simulated=False,
            debug=report.debug,
            report_data=report.report_data.hex(),
            tcb_status=NOT_RATED,
            advisories=(),
            tcb_date="",
            root_fingerprint=key.root_fingerprint,
            # A root or authority is older than any policy's greatest age; what is fetched are the last of these.
            collateral_issued=key.endorsements[-1].issued,
            collateral_expires=min(endorsement.next_update for endorsement in key.endorsements),
            verified_at=now,
            collateral_source=evidence.collateral_source,
            endorsements=key.endorsements,
            snp=_claims(report, key),
            signed=evidence.quote[:SIGNED_SIZE],
        )


def create() -> SnpVerifier:
    """The verifier."""
    return SnpVerifier()


@functools.cache
def roots() -> dict[str, x509.Certificate]:
    """AMD's authorities by common name: per processor ``ARK-…``, ``SEV-…`` and ``SEV-VLEK-…``."""
    pem = resources.files(__package__).joinpath("amd_roots.pem").read_bytes()
    found = {pki.common_name(one): one for one in x509.load_pem_x509_certificates(pem)}
    for processor in _PROCESSORS:
        root = found[f"ARK-{processor}"]
        for prefix in ("ARK-", *_AUTHORITIES.values()):
            pki.check_issued(found[f"{prefix}{processor}"], root)
    return found


@functools.lru_cache(maxsize=_CHIPS)
def _key(pem: str, crl: str) -> _Key:
    """The chip's key; everything that depends neither on the report nor on the time.

    Refuses with ``evidence.certificate.*``, ``evidence.root.untrusted`` or ``evidence.collateral.*``.
    """
    with warnings.catch_warnings():
        # AMD numbers its VCEKs with 0, which RFC 5280 forbids.
        warnings.filterwarnings("ignore", "Parsed a serial number")
        certificates = pki.pem_chain(pem.encode(), "the chip's certificate chain")
    by_name = {pki.common_name(certificate): certificate for certificate in certificates}
    leaves = [(name, certificate) for name, certificate in by_name.items() if name in _SUBJECTS]
    if len(leaves) != 1 or len(by_name) != len(certificates):
        raise refused(
            "certificate.malformed",
            "there is not one VCEK or VLEK",
            ", ".join(by_name) or "nothing",
            "SEV-VCEK or SEV-VLEK",
        )
    (name, leaf) = leaves[0]
    kind = _SUBJECTS[name]
    issuer = pki.common_name_of(leaf.issuer)
    processor = issuer.removeprefix(_AUTHORITIES[kind])
    root = roots().get(f"ARK-{processor}")
    if root is None or issuer != _AUTHORITIES[kind] + processor:
        raise refused("root.untrusted", "the chip's key is not certified by AMD", issuer, " or ".join(_PROCESSORS))
    for sent in certificates:
        if sent.subject == sent.issuer and sent != root:
            raise refused(
                "root.untrusted",
                "the chip's certificate chain ends in a root that is not AMD's",
                f"{pki.common_name(sent)}, SHA-256 {pki.fingerprint(sent)}",
                f"SHA-256 {pki.fingerprint(root)}",
            )
    # AMD may issue an authority again: what came with the evidence is used if the root has signed it.
    authority = by_name.get(issuer, roots()[issuer])
    pki.check_issued(authority, root)
    pki.check_issued(leaf, authority)
    public_key = leaf.public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, ec.SECP384R1):
        raise refused("certificate.purpose", "the chip's key is not of P-384", name, "ECDSA P-384")
    periods = [Period.of(certificate) for certificate in (leaf, authority, root)]
    endorsements = [
        Endorsement(kind, periods[0].start, periods[0].end, pki.fingerprint(leaf), pki.common_name(authority))
    ]
    if crl:
        data = bytes.fromhex(crl)
        parsed, period = pki.revocation_list(data, "crl", root)
        # The root's list: of keys, which their authorities certify, there is none.
        for certificate in (authority, root):
            pki.check_not_revoked(parsed, certificate)
        periods.append(period)
        endorsements.append(
            Endorsement(
                "crl",
                period.start,
                period.end,
                hashlib.sha256(data).hexdigest(),
                pki.common_name(root),
                pki.crl_number(parsed),
            )
        )
    values = {one.oid.dotted_string: bytes(one.value.public_bytes()) for one in leaf.extensions}
    parts = {part: _small(values, oid) for part, oid in _OID_TCB.items() if part != "fmc" or processor == "Turin"}
    return _Key(
        kind=kind,
        processor=processor,
        public_key=public_key,
        tcb=SnpTcb(**parts),
        hwid=_hwid(values) if kind == "vcek" else b"",
        root_fingerprint=pki.fingerprint(root),
        validity=Validity(periods),
        endorsements=tuple(endorsements),
    )


def _small(values: dict[str, bytes], oid: str) -> int:
    """A number of 0 to 255. Refuses with ``evidence.certificate.malformed``."""
    try:
        value = int.from_bytes(der.only(values[oid], der.INTEGER).value, "big", signed=True)
    except (KeyError, ValueError):
        value = -1
    if not 0 <= value <= 255:
        raise refused("certificate.malformed", "the chip's certificate does not say its TCB", f"extension {oid}")
    return value


def _hwid(values: dict[str, bytes]) -> bytes:
    """The chip's id, which older certificates have without DER around it.

    Refuses with ``evidence.certificate.malformed``.
    """
    value = values.get(_OID_HWID, b"")
    if len(value) in (8, 64):
        return value
    try:
        inner = der.only(value, der.OCTET_STRING).value
    except ValueError:
        inner = b""
    if len(inner) not in (8, 64):
        raise refused("certificate.malformed", "the chip's certificate does not say its id", f"extension {_OID_HWID}")
    return inner


def _check_belongs(report: SnpReport, key: _Key) -> None:
    """The report is one of this key. Refuses with ``evidence.snp.key``, ``.processor``, ``.chip`` or ``.tcb``."""
    if report.signing_key != key.kind:
        raise refused("snp.key", "the report is signed by another kind of key", key.kind, report.signing_key)
    processor = report.processor() or key.processor
    if processor != key.processor:
        raise refused("snp.processor", "the chip's key is of another processor", key.processor, processor)
    chip = report.chip_id
    if key.kind == "vcek" and (chip[: len(key.hwid)] != key.hwid or any(chip[len(key.hwid) :])):
        raise refused(
            "snp.chip",
            "the report is of another chip than the key",
            chip.hex(),
            key.hwid.hex(),
            "send this chip's VCEK; the host must not mask the chip's id (MASK_CHIP_ID)",
        )
    reported, committed, current = (
        tcb(value, processor) for value in (report.reported_tcb, report.committed_tcb, report.current_tcb)
    )
    if reported != key.tcb:
        raise refused(
            "snp.tcb",
            "the report's TCB is not the key's",
            reported,
            key.tcb,
            "fetch the certificate for the reported TCB from AMD's key distribution service",
        )
    for what, least in (("committed", committed), ("reported", reported)):
        if not current.covers(least):
            raise refused("snp.tcb", f"the {what} TCB is above the current one", least, current)


def _claims(report: SnpReport, key: _Key) -> SnpClaims:
    parts = {
        name: tcb(getattr(report, name), key.processor)
        for name in ("reported_tcb", "committed_tcb", "current_tcb", "launch_tcb")
    }

    def bit(value: int, number: int) -> bool:
        return bool(value >> number & 1)

    return SnpClaims(
        version=report.version,
        processor=key.processor,
        signing_key=key.kind,
        vmpl=report.vmpl,
        guest_svn=report.guest_svn,
        measurement=report.measurement.hex(),
        host_data=report.host_data.hex(),
        id_key_digest=report.id_key_digest.hex(),
        author_key_digest=report.author_key_digest.hex(),
        report_id=report.report_id.hex(),
        report_id_ma=report.report_id_ma.hex(),
        chip_id=report.chip_id.hex(),
        family_id=report.family_id.hex(),
        image_id=report.image_id.hex(),
        policy=f"{report.policy:#x}",
        policy_abi_minor=report.policy & 0xFF,
        policy_abi_major=report.policy >> 8 & 0xFF,
        policy_smt_allowed=bit(report.policy, 16),
        policy_migrate_ma=bit(report.policy, 18),
        policy_debug_allowed=bit(report.policy, 19),
        policy_single_socket=bit(report.policy, 20),
        current_version=".".join(str(part) for part in report.current[::-1]),
        committed_version=".".join(str(part) for part in report.committed[::-1]),
        platform_info=f"{report.plat_info:#x}",
        platform_smt_enabled=bit(report.plat_info, 0),
        platform_tsme_enabled=bit(report.plat_info, 1),
        **parts,
    )
