"""TCB levels of Intel's TCB info, QE identity and TDX modules: which one a platform reaches, and what follows.

The algorithm is that of Intel's quote verification library and of "PCS API, version 4, TCB info": levels in descending
order, the first whose every component the platform reaches; a TDX module of version 1 or later is rated by its own
levels. Pure functions; documents are authentic when they come here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .certificates import refused

#: What a TCB status becomes if the quoting enclave or the TDX module is out of date.
_WITH_OLD_PART = {
    "UpToDate": "OutOfDate",
    "SWHardeningNeeded": "OutOfDate",
    "ConfigurationNeeded": "OutOfDateConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded": "OutOfDateConfigurationNeeded",
}
_REVOKED = "Revoked"
_PLATFORM_STATUSES = frozenset(
    {
        "UpToDate",
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
        _REVOKED,
    }
)
_PART_STATUSES = _PLATFORM_STATUSES - {"SWHardeningNeeded", "ConfigurationAndSWHardeningNeeded"}
_MODULE_STATUSES = frozenset({"UpToDate", "OutOfDate", _REVOKED})
_COMPONENTS = 16


@dataclass(frozen=True, slots=True)
class Rating:
    """Status, date of the level (ISO 8601) and advisories, of a platform or of a part of it."""

    status: str
    date: str
    advisories: tuple[str, ...]

    def with_part(self, part: Rating, *, dated: bool) -> Rating:
        """The rating of a platform that has this quoting enclave or TDX module.

        Args:
            dated: whether an older date of the part counts (that of a TDX module does).
        """
        status = self.status
        if part.status == _REVOKED:
            status = _REVOKED
        elif part.status == "OutOfDate":
            status = _WITH_OLD_PART.get(status, status)
        date = min(self.date, part.date) if dated else self.date
        return Rating(status, date, tuple(sorted({*self.advisories, *part.advisories})))


@dataclass(frozen=True, slots=True)
class _Level:
    """A TCB level: 16 SGX components, PCESVN, for TDX 16 more components."""

    sgx: tuple[int, ...]
    pce_svn: int
    tdx: tuple[int, ...]
    rating: Rating

    def reached(self, components: tuple[int, ...], pce_svn: int, tee_tcb_svn: bytes | None) -> bool:
        if pce_svn < self.pce_svn or any(have < want for have, want in zip(components, self.sgx, strict=True)):
            return False
        if tee_tcb_svn is None:
            return True
        # A module that has a version is rated by its own levels, not by components 0 and 1.
        first = 2 if tee_tcb_svn[1] else 0
        return all(have >= want for have, want in zip(tee_tcb_svn[first:], self.tdx[first:], strict=True))


@dataclass(frozen=True, slots=True)
class PartLevels:
    """ISVSVN levels of a quoting enclave or TDX module, as they stand in the document."""

    what: str
    levels: tuple[tuple[int, Rating], ...]

    @classmethod
    def parse(cls, what: str, levels: Any, *, module: bool = False) -> PartLevels:
        """Raises what malformed documents raise: ``KeyError``, ``TypeError``, ``ValueError``, ``AttributeError``."""
        statuses = _MODULE_STATUSES if module else _PART_STATUSES
        return cls(what, tuple((_number(level["tcb"]["isvsvn"]), _rating(level, statuses)) for level in levels))

    def rate(self, isv_svn: int) -> Rating:
        """The first level that it reaches. Refuses with ``evidence.tcb.unknown``."""
        for least, rating in self.levels:
            if isv_svn >= least:
                return rating
        raise refused("tcb.unknown", f"{self.what} reaches no TCB level", isv_svn, None, "update the platform")


@dataclass(frozen=True, slots=True)
class ModuleIdentity:
    """What the manufacturer says about TDX modules of one version: signer (48 bytes), SEAMATTRIBUTES and mask."""

    mrsigner: bytes
    attributes: int
    mask: int
    levels: PartLevels | None

    @classmethod
    def parse(cls, document: dict[str, Any], what: str) -> ModuleIdentity:
        """Raises what malformed documents raise."""
        signer = bytes.fromhex(document["mrsigner"])
        attributes, mask = (bytes.fromhex(document[name]) for name in ("attributes", "attributesMask"))
        if (len(signer), len(attributes), len(mask)) != (48, 8, 8):
            raise ValueError(f"{what}: wrong lengths")
        levels = document.get("tcbLevels")
        return cls(
            signer,
            int.from_bytes(attributes, "little"),
            int.from_bytes(mask, "little"),
            None if levels is None else PartLevels.parse(what, levels, module=True),
        )


@dataclass(frozen=True, slots=True)
class TcbInfo:
    """A TCB info, version 3, of SGX or TDX; levels in descending order whatever the document's order is.

    Attributes:
        tee: ``SGX`` or ``TDX``.
        fmspc: 6 bytes.
        pce_id: 2 bytes.
        number: TCB evaluation data number.
        module: of TDX modules without a version.
        modules: by version.
    """

    tee: str
    fmspc: bytes
    pce_id: bytes
    number: int
    levels: tuple[_Level, ...]
    module: ModuleIdentity | None
    modules: dict[int, ModuleIdentity]

    @classmethod
    def parse(cls, document: dict[str, Any], expected: str) -> TcbInfo:
        """Raises what malformed documents raise: ``KeyError``, ``TypeError``, ``ValueError``, ``AttributeError``.

        Args:
            expected: ``SGX`` or ``TDX``.

        Refuses with ``evidence.collateral.mismatch``: another kind of document.
        """
        tee = document["id"]
        if (tee, document["version"], document["tcbType"]) != (expected, 3, 0):
            raise refused(
                "collateral.mismatch",
                "the TCB info's kind does not fit the quote",
                f"{tee}, version {document['version']}, type {document['tcbType']}",
                f"{expected}, version 3, type 0",
                "fetch the collateral of this platform",
            )
        levels = []
        for level in document["tcbLevels"]:
            tcb = level["tcb"]
            tdx = _components(tcb["tdxtcbcomponents"]) if tee == "TDX" else ()
            levels.append(
                _Level(
                    _components(tcb["sgxtcbcomponents"]),
                    _number(tcb["pcesvn"]),
                    tdx,
                    _rating(level, _PLATFORM_STATUSES),
                )
            )
        levels.sort(key=lambda level: (level.sgx, level.pce_svn, level.tdx), reverse=True)
        module, modules = None, {}
        if tee == "TDX":
            module = ModuleIdentity.parse(document["tdxModule"], "the TDX module")
            for identity in document.get("tdxModuleIdentities", ()):
                name = identity["id"].upper()
                modules[int(name.removeprefix("TDX_"), 16)] = ModuleIdentity.parse(identity, f"the TDX module {name}")
        return cls(
            tee,
            bytes.fromhex(document["fmspc"]),
            bytes.fromhex(document["pceId"]),
            _number(document["tcbEvaluationDataNumber"]),
            tuple(levels),
            module,
            modules,
        )

    def rate(self, components: tuple[int, ...], pce_svn: int, tee_tcb_svn: bytes | None = None) -> Rating:
        """The platform's rating, for TDX with the module's.

        Args:
            components: of the PCK certificate, 16.
            tee_tcb_svn: of a trust domain, 16 bytes.

        Refuses with ``evidence.tcb.unknown``.
        """
        rating = next((level.rating for level in self.levels if level.reached(components, pce_svn, tee_tcb_svn)), None)
        if rating is None:
            raise refused(
                "tcb.unknown", "the platform reaches no TCB level", bytes(components).hex(), None, "update the platform"
            )
        if tee_tcb_svn is None or (module := self.module_rating(tee_tcb_svn)) is None:
            return rating
        return rating.with_part(module, dated=True)

    def module_identity(self, tee_tcb_svn: bytes) -> ModuleIdentity:
        """What a TDX module with this TEE_TCB_SVN must be. Refuses with ``evidence.tcb.unknown``."""
        version = tee_tcb_svn[1]
        found = self.modules.get(version) if version else self.module
        if found is None:
            raise refused(
                "tcb.unknown",
                "the TCB info does not know this version of the TDX module",
                f"TDX_{version:02X}",
                ", ".join(f"TDX_{known:02X}" for known in sorted(self.modules)) or "a module without a version",
                "fetch fresh collateral",
            )
        return found

    def module_rating(self, tee_tcb_svn: bytes) -> Rating | None:
        """The TDX module's own rating, if it has a version. Refuses with ``evidence.tcb.unknown``."""
        if not tee_tcb_svn[1]:
            return None
        levels = self.module_identity(tee_tcb_svn).levels
        if levels is None:
            raise refused("tcb.unknown", "the TDX module has no TCB levels", None)
        return levels.rate(tee_tcb_svn[0])


def after_relaunch(launched: Rating, current: Rating) -> Rating:
    """The rating of a TD 1.5, whose module may have been updated since its launch: what was launched counts.

    If only a relaunch is missing, the status says so: ``TDRelaunchAdvised`` or ``…ConfigurationNeeded``.
    """
    if not launched.status.startswith("OutOfDate") or current.status.startswith("OutOfDate"):
        return launched
    needed = any("Configuration" in status for status in (launched.status, current.status))
    status = "TDRelaunchAdvised" + ("ConfigurationNeeded" if needed else "")
    return Rating(status, launched.date, launched.advisories)


def check_not_revoked(*ratings: Rating) -> None:
    """Refuses with ``evidence.tcb.revoked``."""
    if any(rating.status == _REVOKED for rating in ratings):
        raise refused("tcb.revoked", "this TCB level is revoked", _REVOKED, None, "update the platform")


def _rating(level: dict[str, Any], statuses: Iterable[str]) -> Rating:
    status, date = level["tcbStatus"], level["tcbDate"]
    if status not in statuses or not isinstance(date, str):
        raise ValueError(f"unknown TCB status {status!r}")
    return Rating(status, date, tuple(level.get("advisoryIDs", ())))


def _components(found: Any) -> tuple[int, ...]:
    components = tuple(_number(component["svn"]) for component in found)
    if len(components) != _COMPONENTS:
        raise ValueError(f"{len(components)} TCB components")
    return components


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"not a number: {value!r}")
    return value
