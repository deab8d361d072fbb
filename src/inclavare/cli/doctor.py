"""``inclavare doctor``: what this machine has for enclave containers, and what to do about what it lacks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from .. import config as configuration
from ..errors import InclavareError, PlatformError
from ._output import json_option, print_json, print_table, size

OK, WARNING, MISSING, ABSENT = "ok", "warning", "missing", "absent"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        id: stable name for programs.
        status: ``ok``; ``missing`` (enclave containers cannot run without it); ``warning`` (something works less well);
            ``absent`` (not there, and not needed for what this machine can do).
        found: what was seen.
        fix: what to do; empty if nothing.
    """

    id: str
    status: str
    found: str
    fix: str = ""


def examine() -> Iterator[Finding]:
    """Look at this machine; changes nothing.

    Raises:
        UsageError: the product's own configuration is wrong.
    """
    config = configuration.load()
    yield Finding("configuration", OK, config.source)
    yield from _privilege()
    yield from _directories(config)
    yield from _kernel()
    yield from _fuse()
    yield from _low_level(config)
    yield _program("gocryptfs", "gocryptfs", ["-version"], MISSING, "encrypts what an enclave container writes")
    yield from _simulated(config)
    yield from _hardware(config)
    yield from _images()
    yield from _engines()


def _first_line(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{argv[0]} does not run: {error}"
    return next((line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()), "no version shown")


def _version(text: str) -> str:
    found = re.search(r"\d+\.\d+[\w.+~-]*", text)
    return found[0] if found else text


def _program(id: str, package: str, version: list[str], without: str, purpose: str) -> Finding:
    path = shutil.which(id)
    if path is None:
        return Finding(id, without, f"not installed; it {purpose}", f"apt-get install {package}")
    return Finding(id, OK, f"{_version(_first_line([path, *version]))}  {path}")


# --- kernel -----------------------------------------------------------------------------------------------------------


def _privilege() -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield Finding("root", OK, "running as root")
    else:
        yield Finding("root", MISSING, f"running as uid {os.geteuid()}; enclaves need mounts", "run this as root")


def _directories(config: configuration.Config) -> Iterator[Finding]:
    for key in ("state_dir", "run_dir", "log_dir"):
        path = getattr(config, key)
        there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        if not there.is_dir():
            yield Finding(key, MISSING, f"{there} is not a directory", f"correct {key} in {config.source}")
        elif not os.access(there, os.W_OK | os.X_OK):
            yield Finding(key, MISSING, f"{there} cannot be written", f"run as root, or set {key} in the configuration")
        else:
            yield Finding(key, OK, f"{path}" if there == path else f"{path}, made when it is needed")


def _kernel() -> Iterator[Finding]:
    release = platform.release()
    numbers = tuple(int(n) for n in re.findall(r"\d+", release)[:2])
    if numbers >= (5, 4):
        yield Finding("kernel", OK, release)
    else:
        yield Finding("kernel", WARNING, release, "use Linux 5.4 or newer: what is tested")
    if "overlay" in _file_systems():
        yield Finding("overlayfs", OK, "in the kernel")
    else:
        yield Finding("overlayfs", MISSING, "not in /proc/filesystems", "modprobe overlay")
    yield _user_namespaces()
    from ..shield.secrets import has_memfd_secret

    if has_memfd_secret():
        yield Finding("memfd_secret", OK, "keys lie outside the kernel's direct map")
    else:
        yield Finding(
            "memfd_secret",
            WARNING,
            "not available; keys lie in locked memory instead",
            "Linux 5.14 or newer with CONFIG_SECRETMEM (up to 6.4 also the boot option secretmem.enable=1)",
        )


def _file_systems() -> set[str]:
    return {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines() if line.strip()}


def _user_namespaces() -> Finding:
    try:
        limit = int(Path("/proc/sys/user/max_user_namespaces").read_text())
    except (OSError, ValueError):
        return Finding("user namespaces", ABSENT, "not in this kernel", "CONFIG_USER_NS, for containers that map users")
    if limit == 0:
        return Finding("user namespaces", ABSENT, "switched off", "sysctl user.max_user_namespaces=15000, to map users")
    return Finding("user namespaces", OK, f"up to {limit}")


def _fuse() -> Iterator[Finding]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        fix = (
            "modprobe fuse" if "fuse" not in _file_systems() else "give this machine or container the device /dev/fuse"
        )
        yield Finding("FUSE", MISSING, f"/dev/fuse: {error.strerror}", fix)
    else:
        yield Finding("FUSE", OK, "/dev/fuse opens")
    yield _program("fusermount3", "fuse3", ["--version"], WARNING, "unmounts what gocryptfs mounted")


# --- low-level runtimes -----------------------------------------------------------------------------------------------


def _low_level(config: configuration.Config) -> Iterator[Finding]:
    crun, runc = (_program(name, name, ["--version"], ABSENT, "starts containers") for name in ("crun", "runc"))
    usable = [finding.id for finding in (crun, runc) if finding.status == OK]
    if crun.status == OK:
        crun = _crun_here(crun)
        if crun.status != OK:
            usable.remove("crun")
    yield crun
    yield runc
    wanted = config.low_level
    if wanted == "auto":
        chosen = next(iter(usable), None)
    elif "/" in wanted:
        chosen = wanted if os.access(wanted, os.X_OK) else None
    else:
        chosen = wanted if wanted in usable else None
    if chosen is None:
        fix = (
            "apt-get install crun" if wanted == "auto" else f"install it, or set [runtime] low_level in {config.source}"
        )
        yield Finding("low-level runtime", MISSING, f"{wanted}: nothing usable", fix)
    else:
        yield Finding("low-level runtime", OK, f"{wanted}: {chosen}" if wanted != chosen else chosen)


def _crun_here(found: Finding) -> Finding:
    """Whether crun runs on this host's cgroups, tried in a process of its own."""
    from ..rune import kernel, low_level

    if not low_level.crun_needs_private_cgroups():
        return found

    def hide() -> None:
        kernel.unshare(kernel.CLONE_NEWNS)
        low_level.hide_unified_cgroup()

    error = _in_child(hide)
    if error is None:
        return Finding("crun", OK, f"{found.found}  (hybrid cgroups: rune hides the v2 mount from it)")
    return Finding(
        "crun",
        WARNING,
        f"{found.found}, but it refuses this host's hybrid cgroups, and hiding the v2 mount failed: {error}",
        "run as root with CAP_SYS_ADMIN; without it runc is used",
    )


def _in_child(action: Callable[[], None]) -> str | None:
    """Do it in a forked process; the error's text, or ``None``."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            os.write(writer, str(error).encode() or b"failed")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text or None


# --- TEE platforms ----------------------------------------------------------------------------------------------------


def _simulated(config: configuration.Config) -> Iterator[Finding]:
    from ..sgx.image import PAGE_SIZE
    from ..tee.base import platform as tee_platform
    from ..tee.sgx_sim import epc

    try:
        availability = tee_platform("sgx-sim", config).probe()
        held = epc.usage(config)
    except (InclavareError, OSError) as error:
        yield Finding("sgx-sim", MISSING, str(error), "run this as root")
        return
    if availability.usable:
        yield Finding("sgx-sim", OK, "software platform, for development: it proves nothing about hardware")
    else:
        yield Finding("sgx-sim", MISSING, availability.reason, availability.remedy)
    used = sum(pages for _, pages, _ in held) * PAGE_SIZE
    total = epc.size(config)
    text = f"{size(used)} of {size(total)} used by {len(held)} enclaves"
    if used > total * 9 // 10:
        yield Finding("sgx-sim EPC", WARNING, text, f"stop an enclave, or raise [sgx_sim] epc_size in {config.source}")
    else:
        yield Finding("sgx-sim EPC", OK, text)
    if "sgx-sim" in config.on_node_signing:
        yield Finding("on-node signing", OK, "sgx-sim: images without a SIGSTRUCT are measured and signed at first use")
    else:
        yield Finding("on-node signing", ABSENT, "off: only built images run", "set [signing] on_node to allow it")


def _hardware(config: configuration.Config) -> Iterator[Finding]:
    from ..tee import sgx

    platform = sgx.create(config)
    availability = platform.probe()
    if not availability.usable:
        yield Finding("sgx", ABSENT, availability.reason, availability.remedy)
        return
    from ..tee.sgx.aesm import SOCKET
    from ..tee.sgx.sysfs import epc_accounting

    cpu = platform.cpu()
    yield Finding("sgx", OK, f"Intel SGX{'2' if cpu.sgx2 else ''}, {size(cpu.epc_size)} of EPC")
    accounting = epc_accounting()
    group = accounting.tightest if accounting else None
    if group is not None and group.limit is not None:
        yield Finding("sgx EPC", OK, f"{size(group.current)} of {size(group.limit)} used by cgroup {group.path}")
    if os.path.exists(SOCKET):
        yield Finding("AESM", OK, SOCKET)
    else:
        yield Finding("AESM", WARNING, f"no {SOCKET}: no quotes", "apt-get install sgx-aesm-service")


# --- images and engines -----------------------------------------------------------------------------------------------


def _images() -> Iterator[Finding]:
    yield _program("skopeo", "skopeo", ["--version"], WARNING, "reads and writes images for inclavare build")
    yield _program("umoci", "umoci", ["--version"], WARNING, "unpacks and packs images for inclavare build")


def _engines() -> Iterator[Finding]:
    from ._engines import ENGINES, configured

    for name, engine in ENGINES.items():
        program, package = ("dockerd", "docker.io") if name == "docker" else (name, name)
        found = _program(program, package, ["--version"], ABSENT, "starts containers")
        if found.status != OK:
            yield replace(found, id=name)
            continue
        try:
            rune = configured(engine)
        except InclavareError as error:
            yield Finding(name, WARNING, error.message, error.remedy or "")
            continue
        if rune is None:
            yield Finding(name, WARNING, f"{found.found}, not configured for rune", f"inclavare install {name}")
        elif not os.access(rune, os.X_OK):
            yield Finding(
                name, WARNING, f"{engine.config} names {rune}, which is not there", f"inclavare install {name}"
            )
        else:
            yield Finding(name, OK, f"{found.found}, calls {rune}")


# --- the command ------------------------------------------------------------------------------------------------------


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what this machine has for enclave containers, and what to do about what it lacks.

    Ends with 0 if enclave containers of type sgx-sim can run here, else with 5.
    """
    findings = list(examine())
    lacking = [finding for finding in findings if finding.status == MISSING]
    if as_json:
        print_json({"ready": not lacking, "findings": [asdict(finding) for finding in findings]})
    else:
        rows = [(finding.status, finding.id, finding.found, finding.fix) for finding in findings]
        print_table(("status", "what", "found", "fix"), rows)
        click.echo()
        if lacking:
            click.echo(f"Enclave containers cannot run here: {', '.join(finding.id for finding in lacking)}.")
        else:
            click.echo("Enclave containers of type sgx-sim can run here.")
    if lacking:
        click.get_current_context().exit(PlatformError.exit_code)
