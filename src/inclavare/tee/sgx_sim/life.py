"""The life of the simulated platform: making it, looking at it, changing its security, and its end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...config import Config
from ...errors import PlatformError, UsageError
from ...sgx.image import PAGE_SIZE
from . import cpu, epc, files, fuses, tcb

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

#: The smallest EPC that holds an enclave with a little heap.
MIN_EPC_SIZE = 1 << 20
#: What the processor's physical addresses leave room for.
MAX_EPC_SIZE = 1 << 45


def initialise(
    config: Config, *, epc_size: int | None = None, cpusvn: bytes = fuses.CPUSVN, fmspc: bytes = fuses.FMSPC
) -> None:
    """Make a platform: fuse keys, certificates, collateral.

    Args:
        epc_size: bytes that the firmware reserves, a multiple of 4096; by default the configuration's, also later.
        cpusvn: the sixteen TCB components' security versions.
        fmspc: 6 bytes.

    Raises:
        PlatformError: ``tee.platform.exists``.
        UsageError: ``tee.platform.epc_size``, ``.cpusvn`` or ``.fmspc``.
    """
    from . import provisioning

    if epc_size is not None and (not MIN_EPC_SIZE <= epc_size <= MAX_EPC_SIZE or epc_size % PAGE_SIZE):
        raise UsageError(
            "the EPC cannot have this size",
            id="tee.platform.epc_size",
            found=f"{epc_size} bytes",
            expected=f"a multiple of {PAGE_SIZE} from {MIN_EPC_SIZE} to {MAX_EPC_SIZE}",
        )
    _check_length("cpusvn", cpusvn, 16)
    _check_length("fmspc", fmspc, 6)
    directory = config.platform_dir
    files.private_directory(directory)
    with files.locked(directory):
        if fuses.read(directory) is not None:
            raise PlatformError(
                "there is a platform already",
                id="tee.platform.exists",
                found=str(directory),
                remedy="keep it, or remove it first: inclavare sgx platform reset",
            )
        made = fuses.draw(cpusvn=cpusvn, fmspc=fmspc, epc_size=epc_size or 0)
        fuses.write(directory, made)
    provisioning.collateral(directory, cpu.Processor(made.roots))


def exists(config: Config) -> bool:
    """Whether there is a platform, or something of one."""
    directory = config.platform_dir
    return directory.is_dir() and any(path.name != ".lock" for path in directory.iterdir())


def reset(config: Config) -> None:
    """Remove the platform with everything that only it can read. Idempotent.

    Raises:
        PlatformError: ``tee.epc.busy``: enclaves are running.
    """
    directory = config.platform_dir
    if not exists(config):
        return
    files.private_directory(directory)
    with epc.vacant(config), files.locked(directory):
        there = (path for path in directory.iterdir() if path.name != ".lock")
        # The fuses go last: until then the platform is what it was, and this can be repeated.
        for path in sorted(there, key=lambda path: path.name == fuses.FILE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def set_tcb(config: Config, *, cpusvn: bytes | None = None, **changes: Any) -> tcb.Tcb:
    """Change the platform's security, and have collateral that says so.

    Args:
        cpusvn: another microcode, 16 bytes: other sealing keys, other certificates; keys of lower versions stay
            derivable.
        changes: fields of :class:`inclavare.tee.sgx_sim.tcb.Tcb`; the others stay as they are.

    Returns:
        What is set now.

    Raises:
        UsageError: ``tee.tcb.*`` or ``tee.platform.cpusvn``: an impossible value.
        PlatformError: ``tee.epc.busy``: microcode is not changed under enclaves.
    """
    from . import provisioning

    directory = config.platform_dir
    fuses.load(directory)
    replace(tcb.load(directory), **changes).check()
    if cpusvn is not None:
        _check_length("cpusvn", cpusvn, 16)
        # As EUPDATESVN, which needs an empty EPC.
        with epc.vacant(config), files.locked(directory):
            there = _there(config)
            fresh = replace(there, roots=replace(there.roots, cpusvn=cpusvn))
            # The certificate first: a platform never has a CPUSVN without one.
            provisioning.certify(directory, cpu.Processor(fresh.roots))
            _forget_collateral(config)
            fuses.write(directory, fresh)
    with files.locked(directory):
        state = replace(tcb.load(directory), **changes).check()
        if changes:
            # First, so that no collateral outlives what it says.
            _forget_collateral(config)
            tcb.write(directory, state)
    return state


def describe(config: Config) -> dict[str, Any]:
    """Everything that can be said about the platform, JSON-ready; what is missing of it is made."""
    from . import architectural, provisioning

    directory = config.platform_dir
    processor = cpu.Processor(fuses.load(directory))
    there = _there(config)
    made = provisioning.load(directory, processor)
    collateral = provisioning.collateral(directory, processor)
    tcb_info = json.loads(collateral["tcb_info"])
    level = next(entry for entry in tcb_info["tcbLevels"] if _reached(entry, there.roots.cpusvn))
    state = tcb.load(directory)
    extension = provisioning.pck_extension(made.pck)
    return {
        "epc": _epc(config),
        "cpusvn": there.roots.cpusvn.hex(),
        "ppid": extension.ppid.hex(),
        "fmspc": extension.fmspc.hex(),
        "pce_id": extension.pce_id.hex(),
        "pck": {**_certificate(made.pck), "revoked": state.pck_revoked, "for_cpusvns": len(made.pcks)},
        "tcb": {
            "status": level["tcbStatus"],
            "advisories": level.get("advisoryIDs", []),
            "date": level["tcbDate"],
            "evaluation_number": tcb_info["tcbEvaluationDataNumber"],
        },
        "qe": {
            "svn": architectural.QE.isv_svn,
            "status": state.qe_status,
            "advisories": list(state.qe_advisories),
        },
        "pce": {"svn": extension.pce_svn},
        "collateral": {
            "issued": tcb_info["issueDate"],
            "next_update": tcb_info["nextUpdate"],
            "expired": state.collateral_expired,
        },
        "root_ca": _certificate(made.root.certificate),
    }


def _epc(config: Config) -> dict[str, Any]:
    held = epc.usage(config)
    size = epc.size(config)
    return {
        "bytes": size,
        "pages": size // PAGE_SIZE,
        "used_pages": sum(pages for _, pages, _ in held),
        # As a kernel prints its firmware's memory map.
        "e820": f"[mem {epc.BASE:#018x}-{epc.BASE + size - 1:#018x}] reserved",
        "holders": [{"label": label, "pages": pages, "pid": pid} for label, pages, pid in held],
    }


def _certificate(certificate: Certificate) -> dict[str, str]:
    from cryptography.hazmat.primitives.hashes import SHA256

    return {
        "serial": f"{certificate.serial_number:x}",
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
        "sha256": certificate.fingerprint(SHA256()).hex(),
    }


def _reached(level: dict[str, Any], cpusvn: bytes) -> bool:
    """Whether the platform is at least on that TCB level; its PCE is of the level that it was made with."""
    from .architectural import PCE

    wanted = [component["svn"] for component in level["tcb"]["sgxtcbcomponents"]]
    enough = all(have >= want for have, want in zip(cpusvn, wanted, strict=True))
    return enough and PCE.isv_svn >= int(level["tcb"]["pcesvn"])


def _there(config: Config) -> fuses.Fuses:
    found = fuses.read(config.platform_dir)
    if found is None:
        raise PlatformError(
            "the platform has just been removed",
            id="tee.platform.absent",
            found=f"no {config.platform_dir / fuses.FILE}",
            remedy="make one: inclavare sgx platform init",
        )
    return found


def _forget_collateral(config: Config) -> None:
    from .provisioning import COLLATERAL_FILE, TDX_COLLATERAL_FILE

    for name in (COLLATERAL_FILE, TDX_COLLATERAL_FILE):
        (config.platform_dir / name).unlink(missing_ok=True)


def _check_length(name: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise UsageError(
            f"{name.upper()} has the wrong length",
            id=f"tee.platform.{name}",
            found=f"{len(value)} bytes",
            expected=f"{size} bytes",
        )
