"""The software platform ``sgx-sim``: SGX without the hardware, for development and tests.

Measurement, signature checks, key derivation, reports, quotes and collateral are the real ones, byte for byte. What is
missing is the protection: whoever is root on the host can read the platform's keys. Its certificates say so, and every
verifier refuses them unless a policy names its root and says ``simulated = "allow"``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import Config
from ...errors import UsageError
from ...sgx import report
from ...sgx.image import PAGE_SIZE, EnclaveImage
from ...sgx.keys import KEY_SEAL, POLICY_MRENCLAVE, POLICY_MRSIGNER
from ...sgx.structs import ATTRIBUTE_DEBUG, ATTRIBUTE_INIT, Attributes, KeyRequest, Report, ReportBody, TargetInfo
from ..base import Availability
from . import cpu, epc, fuses

if TYPE_CHECKING:
    from .counters import SimulatedCounters
    from .quoting import QuotingEnclave, TdQuotingEnclave
    from .tdmodule import TdxModule

#: KEYREQUEST.ATTRIBUTEMASK of seal keys: INIT, DEBUG and the reserved high bits, as in the Intel SDK's default.
_SEAL_ATTRIBUTE_MASK = Attributes(ATTRIBUTE_INIT | ATTRIBUTE_DEBUG | 0xFF << 56, 0).to_bytes()
#: EPC pages beyond the configured size, for the platform's own enclaves.
_OWN_PAGES = 256
_SEAL_POLICIES = {"mrenclave": POLICY_MRENCLAVE, "mrsigner": POLICY_MRSIGNER}


class SimulatedEnclave:
    """An initialised enclave on the simulated processor (see :class:`inclavare.tee.base.Enclave`)."""

    def __init__(self, processor: cpu.Processor, secs: cpu.Secs, reservation: epc.Reservation, state: Path) -> None:
        self._state = state
        self._processor = processor
        self._secs = secs
        self._reservation = reservation
        # Both are asked for after the enclave's end too, in logs and audit records.
        self._identity = cpu.identity(secs)

    @property
    def mrenclave(self) -> bytes:
        """32 bytes."""
        return self._identity.mrenclave

    @property
    def mrsigner(self) -> bytes:
        """32 bytes."""
        return self._identity.mrsigner

    @property
    def debug(self) -> bool:
        """ATTRIBUTES.DEBUG."""
        return self._identity.attributes.debug

    @property
    def epc_pages(self) -> int:
        """4096-byte pages in use, the SECS included; 0 after :meth:`destroy`."""
        return self._secs.epc_pages

    def target_info(self) -> bytes:
        """This enclave's TARGETINFO, 512 bytes."""
        return report.target_info(cpu.identity(self._secs)).to_bytes()

    def report(self, target_info: bytes, report_data: bytes) -> bytes:
        """EREPORT: 512 and 64 bytes in, 432 bytes out.

        Raises:
            UsageError: ``report_data`` is not 64 bytes.
            IntegrityError: ``target_info`` is not a TARGETINFO.
        """
        if len(report_data) != 64:
            raise UsageError(
                "report data has the wrong length",
                id="tee.report.data",
                found=f"{len(report_data)} bytes",
                expected="64 bytes",
            )
        return self._processor.ereport(self._secs, TargetInfo.from_bytes(target_info), report_data).to_bytes()

    def verify_report(self, received: bytes) -> ReportBody:
        """Check a 432-byte report that was directed at this enclave.

        Raises:
            EvidenceError: the MAC does not verify.
        """
        return self._processor.verify_report(self._secs, Report.from_bytes(received))

    def seal_key(self, policy: str) -> bytes:
        """EGETKEY for the seal key of this enclave's and the platform's current security versions; 16 bytes.

        Args:
            policy: ``mrenclave`` (this very enclave) or ``mrsigner`` (every enclave of its signer with its product id).

        Raises:
            UsageError: unknown policy.
        """
        if policy not in _SEAL_POLICIES:
            raise UsageError(
                f"unknown sealing policy {policy!r}", id="tee.seal.policy", expected="mrenclave or mrsigner"
            )
        request = KeyRequest(
            key_name=KEY_SEAL,
            key_policy=_SEAL_POLICIES[policy],
            isv_svn=self._identity.isv_svn,
            cpusvn=self._processor.cpusvn,
            attribute_mask=_SEAL_ATTRIBUTE_MASK,
        )
        return self._processor.egetkey(self._secs, request)

    def egetkey(self, request: bytes) -> bytes:
        """EGETKEY for a 512-byte KEYREQUEST; 16 bytes.

        Raises:
            PolicyError: the processor refuses the request.
        """
        return self._processor.egetkey(self._secs, KeyRequest.from_bytes(request))

    @property
    def counters(self) -> SimulatedCounters:
        """Its monotonic counters."""
        from .counters import SimulatedCounters

        return SimulatedCounters(self._state, lambda: cpu.identity(self._secs))

    def read(self, offset: int, length: int) -> bytes:
        """What code in the enclave reads at ``offset`` bytes from its base."""
        return self._processor.read(self._secs, offset, length)

    def destroy(self) -> None:
        """EREMOVE every page and give the EPC back. Idempotent."""
        self._processor.eremove(self._secs)
        self._reservation.release()


class SimulatedPlatform:
    """See :class:`inclavare.tee.base.Platform`."""

    name = "sgx-sim"
    simulated = True

    def __init__(self, config: Config) -> None:
        self._config = config
        self._processor: cpu.Processor | None = None
        self._quoting: QuotingEnclave | None = None
        self._td_quoting: tuple[TdxModule, TdQuotingEnclave] | None = None

    def probe(self) -> Availability:
        """Usable wherever the state and run directories can be written."""
        for path in (self._config.platform_dir, self._config.run_dir):
            there = path
            while not there.exists() and there != there.parent:
                there = there.parent
            if not os.access(there, os.W_OK | os.X_OK):
                return Availability(
                    False,
                    f"{there} cannot be written",
                    "run as root, or set state_dir and run_dir in the configuration",
                )
        return Availability(True)

    def load(self, image: EnclaveImage, sigstruct: bytes, *, label: str) -> SimulatedEnclave:
        """ECREATE, EADD, EEXTEND and EINIT (see :meth:`inclavare.tee.base.Platform.load`)."""
        reservation = epc.reserve(self._config, image.page_count, label)
        try:
            # After the reservation: no platform is reset, nor its microcode updated, under an enclave.
            processor = self._session()
            secs = processor.load(image, sigstruct)
            return SimulatedEnclave(processor, secs, reservation, self._config.platform_dir)
        except BaseException:
            reservation.release()
            raise

    def quote_target_info(self) -> bytes:
        """TARGETINFO of the quoting enclave, 512 bytes."""
        from . import quoting

        return quoting.target_info()

    def quote(self, report: bytes) -> bytes:
        """An ECDSA quote, version 3, over a 432-byte REPORT that is targeted at the quoting enclave.

        Raises:
            EvidenceError: the report was not made on this platform for the quoting enclave.
        """
        if self._quoting is None:
            from . import provisioning, quoting

            processor = self._session()
            self._quoting = quoting.QuotingEnclave(processor, provisioning.load(self._config.platform_dir, processor))
        return self._quoting.quote(report)

    def collateral(self) -> dict[str, Any]:
        """Collateral for this platform's quotes, in dcap-qvl's JSON layout; issued again before it expires."""
        from . import provisioning

        return provisioning.collateral(self._config.platform_dir, self._session())

    def td_quote(self, report_data: bytes, mrtd: bytes, rtmrs: Sequence[bytes] = (), **more: Any) -> bytes:
        """A TDX quote, version 4, of a trust domain that exists in these arguments only.

        Args:
            report_data: 64 bytes.
            mrtd: measurement of the TD, 48 bytes.
            rtmrs: up to four values of 48 bytes; the others are zero.
            more: see :func:`inclavare.tee.sgx_sim.tdmodule.domain`.

        Raises:
            UsageError: ``tee.td.*``: a length or a number is wrong.
        """
        from . import provisioning, quoting, tdmodule

        domain = tdmodule.domain(mrtd, rtmrs, **more)
        if self._td_quoting is None:
            processor = self._session()
            module = tdmodule.TdxModule(processor.cpusvn)
            made = provisioning.with_td_qe(self._config.platform_dir, processor)
            self._td_quoting = (module, quoting.TdQuotingEnclave(processor, made, module))
        module, enclave = self._td_quoting
        return enclave.quote(module.report(domain, report_data))

    def td_collateral(self) -> dict[str, Any]:
        """Collateral for this platform's TDX quotes, in dcap-qvl's JSON layout."""
        from . import provisioning

        return provisioning.collateral(self._config.platform_dir, self._session(), tdx=True)

    def root_ca(self) -> bytes:
        """The platform's root CA certificate, DER."""
        from . import provisioning

        return provisioning.load(self._config.platform_dir, self._session()).root_der

    def reclaim(self) -> None:
        """Drop the ledger's entries of dead owners."""
        epc.usage(self._config)

    def _session(self) -> cpu.Processor:
        if self._processor is None:
            # The platform's own enclaves are not in the ledger, and hold a few pages.
            pages = epc.size(self._config) // PAGE_SIZE + _OWN_PAGES
            self._processor = cpu.Processor(fuses.load(self._config.platform_dir), epc_pages=pages)
        return self._processor


def create(config: Config) -> SimulatedPlatform:
    """The simulated platform of this host."""
    return SimulatedPlatform(config)


def usage(config: Config) -> list[tuple[str, int, int]]:
    """Who holds how many EPC pages: ``(label, pages, pid)``, the largest first."""
    return epc.usage(config)
