"""``inclavare run``: run an image as an enclave container, without a container engine."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._enclaves import tls_option
from ._output import Steps, note

if TYPE_CHECKING:
    from ..enclave.manifest import Manifest

#: What Docker and Podman leave an ordinary container.
_CAPABILITIES = [f"CAP_{name}" for name in (
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW",
    "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
)]  # fmt: skip
_MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
           "/proc/sched_debug", "/proc/scsi", "/sys/firmware"]  # fmt: skip
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]


@click.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--tee", help="TEE platform: sgx-sim, or intelSgx. [default: what the image was built for]")
@click.option("--name", help="Container id. [default: random]")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="As far as the manifest allows it.")
@click.option("-v", "--volume", multiple=True, metavar="HOST:PATH[:ro]", help="As far as the manifest allows it.")
@click.option("-t", "--tty/--no-tty", default=None, help="A terminal. [default: if this is one]")
@click.option("--network", type=click.Choice(["host", "none"]), default="host", show_default=True)
@click.option("--read-only", is_flag=True, help="Nothing can be written to the root file system.")
@click.option("--debug", is_flag=True, help="A debug enclave, for an image that is measured at first use.")
@tls_option
@click.argument("source")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def command(
    *,
    source: str,
    args: tuple[str, ...],
    tee: str | None,
    name: str | None,
    env: tuple[str, ...],
    volume: tuple[str, ...],
    tty: bool | None,
    network: str,
    read_only: bool,
    debug: bool,
    tls_verify: bool,
) -> None:
    """Run SOURCE (an image, a root file system or a bundle) in an enclave until it ends; its exit code is ours.

    If the image's files differ from what was measured, they read as errors, and exit code 0 becomes 7.

    An enclave image runs with its measured arguments. Another image is measured now and signed by this node, where the
    node's configuration allows that, with ARGS in place of its own command if there are any.
    """
    from ..config import load
    from ..enclave import build, oci, stored
    from ..enclave.programs import work_directory
    from ..enclave.reference import Reference
    from ..errors import IntegrityError, UsageError

    container = name or secrets.token_hex(16)
    with work_directory() as work:
        with Steps() as steps:
            opened = oci.open_source(Reference.parse(source), work, steps, tls_verify=tls_verify)
            carried = stored.read(opened.rootfs)
            if carried is not None:
                manifest = carried.manifest
            else:
                if tee is None:
                    raise UsageError(
                        "SOURCE was not built for an enclave, and no TEE platform is named",
                        id="cli.run.tee",
                        remedy="add --tee sgx-sim (software, for development) or --tee intelSgx, "
                        "or build it with inclavare build",
                    )
                own = {**opened.config, "Entrypoint": [], "Cmd": list(args)} if args else opened.config
                manifest = build.derive_manifest(own, opened.rootfs)
        bundle = work / "run"
        bundle.mkdir()
        config = oci_config(manifest, opened.rootfs, network=network, read_only=read_only)
        process = config["process"]
        process["args"] = list(args) or list(manifest.process.args)
        process["terminal"] = sys.stdin.isatty() and sys.stdout.isatty() if tty is None else tty
        process["env"] += [*_checked_env(env), *([f"ENCLAVE_TYPE={tee}"] if tee else [])]
        process["env"] += ["ENCLAVE_DEBUG=true"] if debug else []
        config["mounts"] += [_volume(text) for text in volume]
        (bundle / "config.json").write_text(json.dumps(config))
        log = load().log_dir / "runelet.log"
        before = log.stat().st_size if log.exists() else 0
        code = _run(container, bundle, work / "rune.log")
    violations = _violations(log, before, container)
    for path, reason in violations:
        note(f"{path} was refused to the enclave: {reason}")
    # Some programs take a read error for the end of a file and report success.
    sys.exit(code or (IntegrityError.exit_code if violations else 0))


def oci_config(manifest: Manifest, rootfs: Path, *, network: str, read_only: bool) -> dict[str, Any]:
    """An OCI runtime configuration with the manifest's process, and what engines give an ordinary container.

    Args:
        manifest: whose arguments, environment, user and directory are taken.
        rootfs: root file system.
        network: ``host``, or ``none`` for a namespace with nothing in it.
        read_only: whether the root file system is.
    """
    uid, gid, groups = manifest.process.ids
    namespaces = ["pid", "ipc", "uts", "mount", "cgroup"] + (["network"] if network == "none" else [])
    quiet = ["nosuid", "noexec", "nodev"]
    mounts: list[dict[str, Any]] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
         "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
         "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*quiet, "mode=1777", "size=65536k"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": quiet},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*quiet, "ro"]},
    ]  # fmt: skip
    if network == "host":
        mounts += [
            {"destination": path, "type": "bind", "source": path, "options": ["bind", "ro", *quiet]}
            for path in ("/etc/resolv.conf", "/etc/hosts")
            if Path(path).exists()
        ]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(rootfs.absolute()), "readonly": read_only},
        "hostname": "enclave",
        "process": {
            "terminal": False,
            "user": {"uid": uid, "gid": gid, "additionalGids": list(groups)},
            "env": [f"{name}={value}" for name, value in manifest.process.env.items()],
            "cwd": manifest.process.cwd,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 4096}],
            "noNewPrivileges": True,
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
        },
    }


def _checked_env(entries: tuple[str, ...]) -> list[str]:
    from ..errors import UsageError

    for entry in entries:
        if "=" not in entry or entry.startswith("="):
            raise UsageError("not an environment variable", id="cli.run.env", found=entry, expected="NAME=VALUE")
    return list(entries)


def _volume(text: str) -> dict[str, Any]:
    from ..errors import UsageError

    source, _, rest = text.partition(":")
    destination, _, mode = rest.partition(":")
    if not source or not destination.startswith("/") or mode not in ("", "ro", "rw"):
        raise UsageError("not a volume", id="cli.run.volume", found=text, expected="HOST:/PATH, or HOST:/PATH:ro")
    if not Path(source).exists():
        raise UsageError(f"{source} does not exist", id="cli.run.volume", remedy="create it, or correct its path")
    options = ["rbind", "rprivate", mode or "rw"]
    return {"destination": destination, "type": "bind", "source": str(Path(source).absolute()), "options": options}


def rune_program() -> str:
    """The rune of this installation, else one on the PATH.

    Raises:
        PlatformError: there is none.
    """
    from ..errors import PlatformError

    beside = Path(sys.prefix) / "bin" / "rune"
    found = str(beside) if beside.exists() else shutil.which("rune")
    if found is None:
        raise PlatformError(
            "rune is not installed", id="cli.run.rune", remedy=f"{sys.executable} -m inclavare.rune.launcher {beside}"
        )
    return found


def _violations(log: Path, start: int, container: str) -> list[tuple[str, str]]:
    """Paths whose contents on the host differed from the measured ones, and how, as the runelet logged them."""
    if not log.exists():
        return []
    with log.open("rb") as handle:
        handle.seek(start)
        lines = handle.readlines()
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a full disk cuts lines short
        if event.get("container") == container and event.get("event") == "shield.tree.violation":
            found.append((str(event.get("path")), str(event.get("reason"))))
    return found


def _run(container: str, bundle: Path, log: Path) -> int:
    """Run the container; its exit code, or that of the refusal where rune refused it."""
    # If this process is killed, so is rune, whose guard then takes the container back.
    command = ["setpriv", "--pdeathsig", "KILL", rune_program(), "--log", str(log), "--log-format", "json"]
    command += ["run", "--bundle", str(bundle), container]
    process = subprocess.Popen(command)
    # Keys typed at the terminal reach rune by themselves; what is sent to this process is passed on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda received, _: os.kill(process.pid, received))
    code = process.wait()
    if code == 1 and log.exists():
        for line in log.read_text(errors="replace").splitlines():
            try:
                code = int(json.loads(line).get("exit_code", code))
            except (ValueError, AttributeError):
                continue  # crun writes lines of its own
    return code
