"""What a verifier found out about an enclave from authentic evidence (RFC 9334: the input of appraisal)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Claims:
    """Authentic statements about one enclave. Byte strings are lower-case hexadecimal, times seconds since 1970.

    Attributes:
        tee: ``sgx`` or ``sgx-sim``.
        simulated: true where nothing but software stands behind the statements.
        mrenclave: 32 bytes.
        mrsigner: 32 bytes.
        isv_prod_id: product id that the signer gave.
        isv_svn: security version that the signer gave.
        debug: ATTRIBUTES.DEBUG: the host can read the enclave's memory.
        attributes: ATTRIBUTES.FLAGS, 8 bytes little-endian.
        xfrm: ATTRIBUTES.XFRM, 8 bytes little-endian.
        miscselect: MISCSELECT.
        cpusvn: 16 bytes.
        config_id: 64 bytes.
        report_data: 64 bytes that the enclave chose.
        tcb_status: ``UpToDate``, ``SWHardeningNeeded``, … as Intel's TCB info says.
        advisories: ids of the security advisories that apply.
        tcb_date: date of the TCB level, ISO 8601.
        tcb_evaluation_number: TCB evaluation data number of the collateral.
        fmspc: platform family, 6 bytes.
        pce_svn: security version of the provisioning certification enclave.
        root_fingerprint: SHA-256 of the root CA certificate to which everything chains.
        collateral_issued: when the oldest piece of collateral was issued.
        collateral_expires: when the first piece of collateral expires.
        verified_at: for which time the evidence was verified.
        public_key_sha256: SHA-256 of the SubjectPublicKeyInfo that evidence in a certificate vouches for.
    """

    tee: str
    simulated: bool
    mrenclave: str
    mrsigner: str
    isv_prod_id: int
    isv_svn: int
    debug: bool
    attributes: str
    xfrm: str
    miscselect: int
    cpusvn: str
    config_id: str
    report_data: str
    tcb_status: str
    advisories: tuple[str, ...]
    tcb_date: str
    tcb_evaluation_number: int
    fmspc: str
    pce_svn: int
    root_fingerprint: str
    collateral_issued: int
    collateral_expires: int
    verified_at: int
    public_key_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "advisories": list(self.advisories)}
