"""What a verifier found out about a TEE from authentic evidence (RFC 9334: the input of appraisal).

:class:`Claims` has what every TEE has and, flat, an SGX enclave's fields. A trust domain's are in :attr:`Claims.tdx`,
an SEV-SNP guest's in :attr:`Claims.snp`; an SGX enclave's fields are then empty, so that a policy that names an enclave
refuses everything else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

#: The TCB status of a platform whose manufacturer publishes no TCB levels (AMD): a policy has to name the least TCB.
NOT_RATED = "NotRated"

#: Fields that only an SGX enclave's claims have.
_SGX_ONLY = frozenset(
    {
        "mrenclave",
        "mrsigner",
        "isv_prod_id",
        "isv_svn",
        "attributes",
        "xfrm",
        "miscselect",
        "config_id",
        "config_svn",
        "isv_ext_prod_id",
        "isv_family_id",
    }
)
#: Fields of every Intel platform.
_INTEL_ONLY = frozenset({"cpusvn", "fmspc", "pce_svn", "tcb_evaluation_number", "platform_instance_id"})


@dataclass(frozen=True, slots=True)
class Endorsement:
    """One piece of collateral that was used.

    Attributes:
        name: ``tcb_info``, ``qe_identity``, ``pck_crl``, ``root_ca_crl``, ``vcek``, ``vlek`` or ``crl``.
        issued: seconds since 1970.
        next_update: seconds since 1970; a certificate's end.
        sha256: of its bytes.
        issuer: common name of who signed it.
        number: TCB evaluation data number, CRL number or certificate serial number, if it has one.
    """

    name: str
    issued: int
    next_update: int
    sha256: str
    issuer: str
    number: int | None = None


@dataclass(frozen=True, slots=True)
class TdxClaims:
    """A trust domain. Names are those of Trustee's TDX claims; byte strings are hexadecimal.

    Attributes:
        mr_td: 48 bytes, as are ``mr_config_id`` (init-data), ``mr_owner``, ``mr_owner_config`` and the RTMRs.
        mr_seam: the TDX module's measurement, 48 bytes; ``mrsigner_seam`` its signer's, zeros for Intel.
        seam_attributes: 8 bytes, as are ``td_attributes`` and ``xfam``; little-endian.
        tcb_svn: TEE_TCB_SVN, 16 bytes.
        septve_disable: bits of ``td_attributes``, as are the next four.
        tee_tcb_svn2: 16 bytes, and ``mr_servicetd``, 48 bytes: TDX 1.5 only.
        module_version: major version of the TDX module; ``module_svn`` its security version.
        module_status: TCB status of the module where the TCB info rates it apart; ``module_date`` of that level.
        event_log: the entries of the CC event log whose replay gives the RTMRs; ``None`` without a log.
    """

    mr_td: str
    mr_config_id: str
    mr_owner: str
    mr_owner_config: str
    mr_seam: str
    mrsigner_seam: str
    seam_attributes: str
    td_attributes: str
    xfam: str
    tcb_svn: str
    rtmr_0: str
    rtmr_1: str
    rtmr_2: str
    rtmr_3: str
    septve_disable: bool
    migratable: bool
    protection_keys: bool
    key_locker: bool
    perfmon: bool
    tee_tcb_svn2: str | None
    mr_servicetd: str | None
    module_version: int
    module_svn: int
    module_status: str | None
    module_date: str | None
    event_log: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class SnpTcb:
    """TCB_VERSION: security versions; ``fmc`` from Turin on."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None

    def covers(self, other: SnpTcb) -> bool:
        """Whether every part is at least the other's."""
        return all((getattr(self, part.name) or 0) >= (getattr(other, part.name) or 0) for part in fields(self))


@dataclass(frozen=True, slots=True)
class SnpClaims:
    """An SEV-SNP guest (AMD 56860, ATTESTATION_REPORT). Byte strings are hexadecimal.

    Attributes:
        version: of the report.
        processor: ``Milan``, ``Genoa`` or ``Turin``.
        signing_key: ``vcek`` or ``vlek``.
        vmpl: privilege level of who asked, 0 (most privileged) to 3; 4294967295 if the host asked.
        measurement: launch digest, 48 bytes.
        host_data: 32 bytes (init-data).
        id_key_digest: 48 bytes, as is ``author_key_digest``; zeros without an ID block.
        report_id: 32 bytes, as is ``report_id_ma``.
        chip_id: 64 bytes; zeros where the host masks it.
        family_id: 16 bytes, as is ``image_id``.
        policy: the guest's policy, 64 bits; ``policy_…`` are its bits.
        reported_tcb: what the key is derived from; ``committed_tcb`` the least that the platform can go back to,
            ``current_tcb`` what runs, ``launch_tcb`` what ran when the guest was launched.
        platform_info: 64 bits; ``platform_…`` are its bits.
    """

    version: int
    processor: str
    signing_key: str
    vmpl: int
    guest_svn: int
    measurement: str
    host_data: str
    id_key_digest: str
    author_key_digest: str
    report_id: str
    report_id_ma: str
    chip_id: str
    family_id: str
    image_id: str
    policy: str
    policy_abi_major: int
    policy_abi_minor: int
    policy_smt_allowed: bool
    policy_migrate_ma: bool
    policy_debug_allowed: bool
    policy_single_socket: bool
    reported_tcb: SnpTcb
    committed_tcb: SnpTcb
    current_tcb: SnpTcb
    launch_tcb: SnpTcb
    current_version: str
    committed_version: str
    platform_info: str
    platform_smt_enabled: bool
    platform_tsme_enabled: bool


@dataclass(frozen=True, slots=True)
class Claims:
    """Authentic statements about one TEE. Byte strings are lower-case hexadecimal, times seconds since 1970.

    Attributes:
        tee: ``sgx``, ``sgx-sim``, ``tdx``, ``tdx-sim`` or ``snp``.
        simulated: true where nothing but software stands behind the statements.
        debug: the host can read the TEE's memory.
        report_data: 64 bytes that the TEE chose.
        tcb_status: ``UpToDate``, ``SWHardeningNeeded``, … as Intel's TCB info says; ``NotRated`` for AMD.
        advisories: ids of the security advisories that apply.
        tcb_date: date of the TCB level, ISO 8601; empty where there are no levels.
        root_fingerprint: SHA-256 of the root CA certificate to which everything chains.
        collateral_issued: when the oldest piece of collateral was issued.
        collateral_expires: when the first piece of collateral expires.
        verified_at: for which time the evidence was verified.
        collateral_source: where the collateral came from: ``embedded``, a file's path or a service's URL.
        endorsements: what was used, piece by piece.
        mrenclave: 32 bytes.
        mrsigner: 32 bytes.
        isv_prod_id: product id that the signer gave.
        isv_svn: security version that the signer gave.
        attributes: ATTRIBUTES.FLAGS, 8 bytes little-endian.
        xfrm: ATTRIBUTES.XFRM, 8 bytes little-endian.
        miscselect: MISCSELECT.
        cpusvn: 16 bytes.
        config_id: 64 bytes.
        tcb_evaluation_number: TCB evaluation data number of the collateral.
        fmspc: platform family, 6 bytes.
        pce_svn: security version of the provisioning certification enclave.
        platform_instance_id: 16 bytes, in platform CAs' certificates.
        public_key_sha256: SHA-256 of the SubjectPublicKeyInfo that evidence in a certificate vouches for.
        tdx: a trust domain's claims.
        snp: an SEV-SNP guest's claims.
        signed: what the attestation key signed, as it stood in the evidence; not part of :meth:`to_dict`.
    """

    tee: str
    simulated: bool
    debug: bool
    report_data: str
    tcb_status: str
    advisories: tuple[str, ...]
    tcb_date: str
    root_fingerprint: str
    collateral_issued: int
    collateral_expires: int
    verified_at: int
    mrenclave: str = ""
    mrsigner: str = ""
    isv_prod_id: int = 0
    isv_svn: int = 0
    attributes: str = ""
    xfrm: str = ""
    miscselect: int = 0
    config_id: str = ""
    config_svn: int = 0
    isv_ext_prod_id: str = ""
    isv_family_id: str = ""
    cpusvn: str = ""
    fmspc: str = ""
    pce_svn: int = 0
    tcb_evaluation_number: int = 0
    platform_instance_id: str | None = None
    collateral_source: str | None = None
    endorsements: tuple[Endorsement, ...] = ()
    public_key_sha256: str | None = None
    tdx: TdxClaims | None = None
    snp: SnpClaims | None = None
    signed: bytes = b""

    @property
    def family(self) -> str:
        """``sgx``, ``tdx`` or ``snp``: which fields there are, whoever vouches for them."""
        return self.tee.removesuffix("-sim")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; what another TEE has is not there."""
        absent = {"signed", "tdx", "snp"} - {self.family}
        if self.family != "sgx":
            absent |= _SGX_ONLY
        if self.family == "snp":
            absent |= _INTEL_ONLY
        found: dict[str, Any] = {
            part.name: getattr(self, part.name) for part in fields(self) if part.name not in absent
        }
        found["advisories"] = list(self.advisories)
        found["endorsements"] = [asdict(endorsement) for endorsement in self.endorsements]
        for name in ("tdx", "snp"):
            if found.get(name) is not None:
                found[name] = asdict(found[name])
        return found
