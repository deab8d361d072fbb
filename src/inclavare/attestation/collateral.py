"""Collateral: what verifying evidence takes besides the evidence, and where it comes from.

For quotes the layout is dcap-qvl's JSON: nine strings, and ``pck_certificate_chain`` where the quote carries no chain.
For SEV-SNP reports: ``certificates`` (PEM: VCEK or VLEK, and what of ASK and ARK there is) and, if there is one,
``crl`` (hexadecimal). Nothing here is trusted: a verifier checks every signature and date, whatever the source.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ..errors import EvidenceError, InclavareError, PlatformError, UsageError

PCK_CHAIN_KEY = "pck_certificate_chain"
COLLATERAL_KEYS = (
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
SNP_CERTIFICATES_KEY = "certificates"
SNP_CRL_KEY = "crl"
#: Those that are hexadecimal.
_HEX_KEYS = ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature", SNP_CRL_KEY)

#: Intel's and AMD's own services.
INTEL_PCS = "https://api.trustedservices.intel.com/sgx/certification/v4/"
AMD_KDS = "https://kdsintf.amd.com"

#: Seconds until a service is asked again for what it could not give, and for what it gave.
RETRY_AFTER = 10
REFRESH_AFTER = 86400
#: Bytes of a collateral file; a PCK CRL can have a megabyte.
MAX_FILE = 16 << 20
_IN_MEMORY = 64
_ON_DISK = 1000
_log = logging.getLogger("inclavare.attestation.collateral")


@dataclass(frozen=True, slots=True)
class Collateral:
    """Collateral as a source gave it.

    Attributes:
        parts: in the layout above.
        source: ``embedded``, a file's path or a service's URL.
    """

    parts: dict[str, str]
    source: str


class CollateralSource(Protocol):
    """Where collateral for evidence that carries none comes from."""

    def fetch(self, quote: bytes) -> Collateral:
        """The collateral for this quote or SEV-SNP report.

        Raises:
            InclavareError: ``PlatformError`` if it cannot be had, ``EvidenceError`` if the quote cannot be parsed.
        """


def check_collateral(value: Any) -> dict[str, str]:
    """Collateral of a quote or SEV-SNP report: exactly its layout's keys, all strings.

    Raises:
        EvidenceError: ``evidence.collateral.malformed``.
    """
    problem = None
    required, optional = set(COLLATERAL_KEYS), {PCK_CHAIN_KEY}
    if isinstance(value, dict) and SNP_CERTIFICATES_KEY in value:
        required, optional = {SNP_CERTIFICATES_KEY}, {SNP_CRL_KEY}
    if not isinstance(value, dict):
        problem = f"a {type(value).__name__}"
    elif not required <= set(value) <= required | optional:
        problem = "keys: " + (", ".join(sorted(map(str, set(value) - optional ^ required))))
    elif not all(isinstance(item, str) for item in value.values()):
        problem = "a value that is not a string"
    else:
        try:
            for key in _HEX_KEYS:
                bytes.fromhex(value.get(key, ""))
        except ValueError:
            problem = f"{key} is not hexadecimal"
    if problem is not None:
        raise EvidenceError(
            "the collateral is malformed",
            id="evidence.collateral.malformed",
            found=problem,
            expected="exactly " + ", ".join(sorted(required)),
            remedy="fetch it again from a PCCS or from the platform",
        )
    return dict(value)


@dataclass(frozen=True, slots=True)
class FileSource:
    """One file with the collateral of one platform family, for machines without a network; read anew each time."""

    path: Path

    def fetch(self, quote: bytes) -> Collateral:
        """The file's collateral, whatever the quote.

        Raises:
            UsageError: ``attestation.collateral.file``: unreadable, or not JSON.
            EvidenceError: ``evidence.collateral.malformed``.
        """
        try:
            with self.path.open("rb") as handle:
                data = handle.read(MAX_FILE + 1)
            if len(data) > MAX_FILE:
                raise ValueError(f"more than {MAX_FILE} bytes")
            found = json.loads(data)
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{self.path} is not a collateral file",
                id="attestation.collateral.file",
                found=getattr(error, "strerror", None) or error,
                expected="collateral as JSON",
            ) from None
        return Collateral(check_collateral(found), str(self.path))


@dataclass(frozen=True, slots=True)
class PccsSource:
    """A PCCS, or Intel's PCS: quotes of enclaves and of trust domains, API version 4.

    Attributes:
        url: for example ``https://localhost:8081``, or with the path up to ``/sgx/certification/v4``.
        check_certificate: whether the service's TLS certificate must be valid.
        timeout: seconds for each answer.
    """

    url: str = INTEL_PCS
    check_certificate: bool = True
    timeout: float = 20.0

    def fetch(self, quote: bytes) -> Collateral:
        """What the service has for the quote's platform; for quotes without a PCK certificate that, too.

        Raises:
            PlatformError: ``tee.sgx.pccs``.
            EvidenceError: the quote cannot be parsed.
        """
        from ..tee.sgx import pccs

        _check_kind(quote, "quote")
        parts = pccs.collateral(
            pccs.base(self.url), quote, check_certificate=self.check_certificate, timeout=self.timeout
        )
        return Collateral(check_collateral(parts), self.url)


@dataclass(frozen=True, slots=True)
class KdsSource:
    """AMD's key distribution service, or a cache of it: the VCEK for an SEV-SNP report, and the CRL.

    Attributes:
        url: base URL.
        timeout: seconds for each answer.
    """

    url: str = AMD_KDS
    timeout: float = 20.0

    def fetch(self, quote: bytes) -> Collateral:
        """The VCEK of the report's chip for its reported TCB, and the CRL of its processor's root.

        Raises:
            PlatformError: ``attestation.collateral.kds``: it is not there, or the report does not say enough.
            EvidenceError: the report cannot be parsed.
        """
        import ssl

        from ..tee.sgx import pccs
        from .snp_report import SnpReport, tcb

        _check_kind(quote, "report")
        report = SnpReport.from_bytes(quote)
        processor = report.processor()
        if processor is None or report.signing_key != "vcek" or not any(report.chip_id):
            raise PlatformError(
                "AMD's key distribution service cannot be asked for this report's key",
                id="attestation.collateral.kds",
                found=f"version {report.version}, {report.signing_key}, chip id {report.chip_id[:8].hex()}…",
                expected="a report of version 3 or later, signed by a VCEK, with the chip's id",
                remedy="let the attester send the certificate",
            )
        version = tcb(report.reported_tcb, processor)
        chip = report.chip_id[:8] if processor == "Turin" else report.chip_id
        asked = {
            "blSPL": version.bootloader,
            "teeSPL": version.tee,
            "snpSPL": version.snp,
            "ucodeSPL": version.microcode,
        }
        if version.fmc is not None:
            asked = {"fmcSPL": version.fmc, **asked}
        query = "&".join(f"{name}={value:02d}" for name, value in asked.items())
        get = pccs.Fetcher(self.url.rstrip("/") + "/vcek/v1/", timeout=self.timeout)
        try:
            certificate, crl = (get(path)[0] for path in (f"{processor}/{chip.hex()}?{query}", f"{processor}/crl"))
        except PlatformError as error:
            raise PlatformError(
                "AMD's key distribution service does not have this report's key",
                id="attestation.collateral.kds",
                found=error.found,
                remedy="let the attester send the certificate, or configure another source",
            ) from None
        parts = {SNP_CERTIFICATES_KEY: ssl.DER_cert_to_PEM_cert(certificate), SNP_CRL_KEY: crl.hex()}
        return Collateral(check_collateral(parts), self.url)


@dataclass(frozen=True, slots=True)
class PlatformSource:
    """This machine's simulated platform, for development."""

    def fetch(self, quote: bytes) -> Collateral:
        """Its collateral, for enclaves or trust domains."""
        from ..config import load
        from ..sgx.quote import TEE_TDX, Quote
        from ..tee.sgx_sim import create

        platform = create(load())
        is_domain = Quote.split(quote)[0].header.tee_type == TEE_TDX
        parts = platform.td_collateral() if is_domain else platform.collateral()
        return Collateral(check_collateral(parts), "sgx-sim")


class ChainSource:
    """Several sources, asked in turn; the first that has an answer gives it.

    Args:
        sources: in the order in which they are asked.
    """

    def __init__(self, sources: Sequence[CollateralSource]) -> None:
        if not sources:
            raise UsageError("there is no source of collateral", id="attestation.collateral.none")
        self._sources = tuple(sources)

    def fetch(self, quote: bytes) -> Collateral:
        """The first answer.

        Raises:
            InclavareError: as the only source, or ``PlatformError``, ``attestation.collateral.unavailable``, with the
                reasons of all.
        """
        reasons: list[str] = []
        for source in self._sources:
            try:
                return source.fetch(quote)
            except InclavareError as error:
                if len(self._sources) == 1:
                    raise
                reasons.append(f"{error.message}: {error.found}" if error.found is not None else error.message)
        raise PlatformError(
            "no source has collateral for this evidence",
            id="attestation.collateral.unavailable",
            found="; ".join(reasons),
            remedy="embed collateral in the evidence, or configure a PCCS that knows the platform",
        )


class CachedSource:
    """Another source's answers, kept in memory and in a private directory for as long as they are valid.

    An entry that has expired, is damaged, or is older than ``refresh_after`` is fetched again. If that fails, an entry
    that is merely old is used, and a warning says so; an expired one never is. One thread fetches for all that wait for
    the same answer, and a service that fails is left alone for some seconds.

    Args:
        source: who is asked.
        directory: mode 0700, made if missing; ``None`` keeps answers in memory only.
        refresh_after: seconds.
        clock: seconds since 1970.

    Raises:
        PlatformError: ``tee.state.*``: the directory is not private or cannot be made.
    """

    def __init__(
        self,
        source: CollateralSource,
        directory: Path | None = None,
        *,
        refresh_after: int = REFRESH_AFTER,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if directory is not None:
            from ..tee.sgx_sim.files import private_directory

            private_directory(directory)
        self._source = source
        self._directory = directory
        self._refresh_after = refresh_after
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._failures: dict[str, tuple[float, InclavareError]] = {}
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}

    def fetch(self, quote: bytes) -> Collateral:
        """Cached or fetched collateral.

        Raises:
            InclavareError: as the source; for ``RETRY_AFTER`` seconds the same error again.
        """
        key = cache_key(quote)
        found = self._fresh(key)
        if found is not None:
            return found.collateral
        with self._lock:
            lock = self._fetching.setdefault(key, threading.Lock())
        try:
            with lock:
                found = self._fresh(key)
                return found.collateral if found is not None else self._renew(key, quote)
        finally:
            with self._lock:
                self._fetching.pop(key, None)

    def _fresh(self, key: str) -> _Entry | None:
        entry, now = self._entry(key), self._clock()
        return entry if entry is not None and entry.fetched <= now < entry.fetched + self._refresh_after else None

    def _entry(self, key: str) -> _Entry | None:
        """A valid entry, from memory or disk."""
        entry = self._entries.get(key)
        if entry is None and self._directory is not None:
            entry = _Entry.read(self._directory / f"{key}.json")
            if entry is not None:
                self._remember(key, entry)
        return entry if entry is not None and self._clock() <= entry.expires else None

    def _remember(self, key: str, entry: _Entry) -> None:
        with self._lock:
            self._entries[key] = entry
            self._entries.move_to_end(key)
            while len(self._entries) > _IN_MEMORY:
                self._entries.popitem(last=False)

    def _renew(self, key: str, quote: bytes) -> Collateral:
        now = self._clock()
        failed = self._failures.get(key)
        old = self._entry(key)
        try:
            if failed is not None and now < failed[0]:
                raise failed[1].with_traceback(None)
            fetched = self._source.fetch(quote)
            entry = _Entry(fetched, int(now), validity_end(fetched.parts))
            if entry.expires < now:
                raise PlatformError(
                    "the service's collateral has expired",
                    id="attestation.collateral.expired",
                    found=_iso(entry.expires),
                    expected=f"after {_iso(int(now))}",
                    remedy="let the PCCS refresh its cache",
                )
        except InclavareError as error:
            with self._lock:
                if len(self._failures) > _IN_MEMORY:
                    self._failures.clear()
                if failed is None or failed[1] is not error:
                    self._failures[key] = (now + RETRY_AFTER, error)
            if old is None:
                raise
            _log.warning(
                "collateral of %s is used although it could not be refreshed (%s): %s",
                _iso(old.fetched),
                error.id,
                error.one_line(),
            )
            return old.collateral
        self._failures.pop(key, None)
        self._remember(key, entry)
        if self._directory is not None:
            entry.write(self._directory / f"{key}.json")
            self._prune(self._directory)
        return fetched

    @staticmethod
    def _prune(directory: Path) -> None:
        """Keep the newest entries: who sends quotes must not choose how much is kept."""
        with contextlib.suppress(OSError):
            found = [(entry.stat().st_mtime_ns, entry.path) for entry in os.scandir(directory)]
            for _, path in sorted(found)[:-_ON_DISK]:
                os.unlink(path)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Collateral, when it was fetched and when the first of it expires, seconds since 1970."""

    collateral: Collateral
    fetched: int
    expires: int

    @classmethod
    def read(cls, path: Path) -> _Entry | None:
        """From a file; ``None`` if there is none, or it is damaged."""
        try:
            digest, _, body = path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() != digest:
                return None
            found = json.loads(body)
            made = Collateral(check_collateral(found["parts"]), str(found["source"]))
            return cls(made, int(found["fetched"]), validity_end(made.parts))
        except (OSError, ValueError, KeyError, TypeError, InclavareError):
            return None

    def write(self, path: Path) -> None:
        """Whole or not at all, mode 0600. A full disk costs the entry, not the answer."""
        body = json.dumps(
            {"source": self.collateral.source, "fetched": self.fetched, "parts": self.collateral.parts}
        ).encode()
        import tempfile

        try:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
                os.replace(name, path)
            except OSError:
                os.unlink(name)
                raise
        except OSError as error:
            _log.warning("collateral could not be cached in %s: %s", path.parent, error.strerror)


def cache_key(quote: bytes) -> str:
    """What collateral depends on, as a file name.

    Of a quote: TEE, certificate authority and platform family, or, without a PCK certificate, the platform itself; of
    an SEV-SNP report: the chip and its reported TCB.

    Raises:
        EvidenceError: it cannot be parsed.
    """
    from ..sgx.certification import CERT_PCK_CHAIN
    from ..sgx.quote import Quote
    from ..tee.sgx.pccs import platform_of
    from .snp_report import SnpReport, is_report

    if is_report(quote):
        report = SnpReport.from_bytes(quote)
        what: tuple[object, ...] = ("snp", report.chip_id, report.reported_tcb, report.signing_key, report.cpuid_fam_id)
        what = (*what, report.cpuid_mod_id)
    else:
        parsed = Quote.split(quote)[0]
        if parsed.cert_type == CERT_PCK_CHAIN:
            what = (parsed.header.tee_type, *platform_of(parsed.cert_data))
        else:
            what = (parsed.header.tee_type, parsed.header.user_data, parsed.cert_type, parsed.cert_data)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def validity_end(parts: dict[str, str]) -> int:
    """When the first dated piece expires, seconds since 1970.

    Raises:
        EvidenceError: ``evidence.collateral.malformed``.
    """
    import warnings

    from cryptography import x509

    moments: list[datetime | None] = []
    try:
        for key in ("tcb_info", "qe_identity"):
            if key in parts:
                moments.append(datetime.strptime(json.loads(parts[key])["nextUpdate"], "%Y-%m-%dT%H:%M:%S%z"))
        for key in ("root_ca_crl", "pck_crl", SNP_CRL_KEY):
            if parts.get(key):
                moments.append(x509.load_der_x509_crl(bytes.fromhex(parts[key])).next_update_utc)
        if SNP_CERTIFICATES_KEY in parts:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Parsed a serial number")
                certificates = x509.load_pem_x509_certificates(parts[SNP_CERTIFICATES_KEY].encode())
            moments += [certificate.not_valid_after_utc for certificate in certificates]
        return min(int(moment.timestamp()) for moment in moments if moment is not None)
    except (ValueError, KeyError, TypeError) as error:
        raise EvidenceError(
            "the collateral's dates cannot be read", id="evidence.collateral.malformed", found=repr(error)
        ) from None


def _check_kind(quote: bytes, expected: str) -> None:
    from .snp_report import is_report

    found = "report" if is_report(quote) else "quote"
    if found != expected:
        raise PlatformError(
            "this service has no collateral for such evidence",
            id="attestation.collateral.kind",
            found="an SEV-SNP report" if found == "report" else "an SGX or TDX quote",
            expected="an SGX or TDX quote" if found == "report" else "an SEV-SNP report",
        )


def _iso(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
