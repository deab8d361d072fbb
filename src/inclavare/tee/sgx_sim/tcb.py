"""What the simulated platform's manufacturer says about its security: TCB status, advisories, revocation, expiry.

A real platform gets this by being patched or not; here it can be set, so that a verifier's policy can be tested against
every case. Without the file, everything is up to date.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import PlatformError, UsageError
from . import files

FILE = "tcb.json"
SCHEMA = 1

#: Intel's, in the order of the PCS API's documentation.
STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
)
#: Those of enclave identities.
QE_STATUSES = ("UpToDate", "OutOfDate", "Revoked")

_ADVISORY = re.compile(r"INTEL-SA-\d{5}")


@dataclass(frozen=True, slots=True)
class Tcb:
    """The security of this platform as its collateral tells it.

    Attributes:
        status: of the platform's present TCB level, one of :data:`STATUSES`.
        advisories: ids like ``INTEL-SA-00615`` that apply to it.
        qe_status: of the quoting enclaves, one of :data:`QE_STATUSES`.
        qe_advisories: ids that apply to them.
        pck_revoked: the PCK certificates are in the CRL.
        collateral_expired: TCB info, QE identity and CRLs are of last month.
        evaluation_number: TCB evaluation data number.
    """

    status: str = "UpToDate"
    advisories: tuple[str, ...] = ()
    qe_status: str = "UpToDate"
    qe_advisories: tuple[str, ...] = ()
    pck_revoked: bool = False
    collateral_expired: bool = False
    evaluation_number: int = 1

    def check(self) -> Tcb:
        """The same, if its values are possible.

        Raises:
            UsageError: ``tee.tcb.status``, ``.advisory`` or ``.evaluation_number``.
        """
        for value, known in ((self.status, STATUSES), (self.qe_status, QE_STATUSES)):
            if value not in known:
                raise UsageError(
                    "there is no such TCB status", id="tee.tcb.status", found=value, expected=" or ".join(known)
                )
        for advisory in (*self.advisories, *self.qe_advisories):
            if not isinstance(advisory, str) or not _ADVISORY.fullmatch(advisory):
                raise UsageError(
                    "this is not the id of an advisory",
                    id="tee.tcb.advisory",
                    found=advisory,
                    expected="an id like INTEL-SA-00615",
                )
        if not 1 <= self.evaluation_number < 1 << 31:
            raise UsageError(
                "the TCB evaluation data number is out of range",
                id="tee.tcb.evaluation_number",
                found=self.evaluation_number,
                expected=f"1 to {(1 << 31) - 1}",
            )
        return self


def load(directory: Path) -> Tcb:
    """What is set.

    Raises:
        PlatformError: ``tee.tcb.damaged``.
    """
    import json

    path = directory / FILE
    data = files.read(path)
    if data is None:
        return Tcb()
    try:
        document = json.loads(data)
        if document.pop("version") != SCHEMA:
            raise ValueError("another version")
        for key in ("advisories", "qe_advisories"):
            document[key] = tuple(document[key])
        found = Tcb(**document).check()
        if not isinstance(found.pck_revoked, bool) or not isinstance(found.collateral_expired, bool):
            raise ValueError("a switch is neither true nor false")
        return found
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise PlatformError(
            f"the platform's TCB settings in {path} are damaged",
            id="tee.tcb.damaged",
            found=str(error),
            expected=f"settings of version {SCHEMA}",
            remedy="remove the file (everything is up to date then) and set them again",
        ) from None


def write(directory: Path, tcb: Tcb) -> None:
    """Replace what is set; the caller holds the directory's lock."""
    import json

    files.write(directory / FILE, json.dumps({"version": SCHEMA, **asdict(tcb)}, indent=1).encode())
