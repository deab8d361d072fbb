"""The low-level runtime: crun where it can run, else runc; by configuration either.

crun refuses to work on a host whose cgroup v1 hierarchy has a v2 mount with a left-over controller ("cgroups in hybrid
mode not supported"). In a private mount namespace where an empty tmpfs covers that v2 mount it works. Only
``/sys/fs/cgroup`` is made private there, so every other mount propagates as before.
"""

from __future__ import annotations

import os
import sys

from . import kernel

CGROUP_ROOT = "/sys/fs/cgroup"
#: What Debian and others set for root; used where a caller (containerd's shim, for one) passes no PATH.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Holds a link named ``runc`` to rune, for containerd's shim; never a low-level runtime.
SHIM_DIRECTORY = "/usr/local/lib/inclavare/shim"

#: Options of runc that crun does not have: name → whether a value follows.
_ONLY_RUNC = {"--criu": True}


class NoRuntimeError(Exception):
    """Neither crun nor runc can be used; the text says why and what to do."""


#: What every crun accepts; 1.8 and earlier refuse another minor version ("unknown version specified").
KNOWN_VERSION = "1.0.2"


def _is_ourselves(path: str) -> bool:
    """Whether this is a link to rune, made so that a caller that knows only runc finds it."""
    try:
        return os.path.samefile(path, sys.argv[0])
    except OSError:
        return False


def find(name: str) -> str | None:
    """The path of a program, or ``None``; a path is taken as it is."""
    if "/" in name:
        return name if os.access(name, os.X_OK) else None
    for directory in [*os.environ.get("PATH", DEFAULT_PATH).split(":"), "/usr/bin", "/usr/sbin"]:
        if directory and directory != SHIM_DIRECTORY:
            path = f"{directory}/{name}"
            if os.access(path, os.X_OK) and not os.path.isdir(path) and not _is_ourselves(path):
                return path
    return None


def crun_needs_private_cgroups() -> bool:
    """Whether this host has the hybrid cgroup layout that crun refuses."""
    try:
        fd = os.open(f"{CGROUP_ROOT}/unified/cgroup.controllers", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return bool(os.read(fd, 1))
    finally:
        os.close(fd)


def hide_unified_cgroup() -> None:
    """Cover the v2 mount for this process; call in a private mount namespace.

    Raises:
        OSError: the kernel refused (no CAP_SYS_ADMIN).
    """
    kernel.mount(None, CGROUP_ROOT, None, kernel.MS_PRIVATE)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("tmpfs", f"{CGROUP_ROOT}/unified", "tmpfs", flags, "size=64k,mode=755")


def select(setting: str, root: str, container: str | None) -> str:
    """The runtime's path, with crun's cgroup view prepared in this process.

    Args:
        setting: ``auto``, ``crun``, ``runc`` or a path.
        root: ``--root``; a container that runc made is runc's for life, one that crun made is crun's.
        container: the container's id, where the command names one that may exist.

    Raises:
        NoRuntimeError: nothing usable.
    """
    names: tuple[str, ...]
    if setting == "auto":
        made_by_runc = container is not None and os.path.exists(f"{root}/{container}/state.json")
        names = ("runc", "crun") if made_by_runc else ("crun", "runc")
    else:
        names = (setting,)
    reasons = []
    for name in names:
        path = find(name)
        if path is None:
            reasons.append(f"{name} is not installed")
        elif not is_crun(path) or not crun_needs_private_cgroups():
            return path
        else:
            try:
                kernel.unshare(kernel.CLONE_NEWNS)
                hide_unified_cgroup()
                return path
            except OSError as error:
                reasons.append(f"{name} cannot run on this host's hybrid cgroups ({error})")
    raise NoRuntimeError(
        "no low-level runtime: " + ", ".join(reasons) + ". Install one (apt-get install crun) "
        "or name it in /etc/inclavare/config.toml, [runtime] low_level [rune.runtime.missing]"
    )


def is_crun(path: str) -> bool:
    """Whether the program's name says that it is crun."""
    return os.path.basename(path).startswith("crun")


def arguments(path: str, root: str, global_options: list[str], rest: list[str]) -> list[str]:
    """The argument vector for the low-level runtime, without what it does not know.

    Args:
        path: the program.
        root: state directory.
        global_options: runc's global options as given, ``--root`` left out.
        rest: the command and its arguments.
    """
    options = global_options
    if is_crun(path):
        options = []
        skip = False
        for option in global_options:
            if skip:
                skip = False
                continue
            name = option.partition("=")[0]
            if name in _ONLY_RUNC:
                skip = _ONLY_RUNC[name] and "=" not in option
                continue
            options.append(option)
    return [path, "--root", root, *options, *rest]


def with_known_version(path: str, config_path: str, version: object, rest: list[str]) -> list[str]:
    """The words after the command, so that an older crun takes a bundle of a newer runtime-spec.

    The versions differ in what they add, not in what they mean, so crun is shown the same document under a version that
    it knows; the bundle stays as it is.

    Args:
        path: the low-level runtime.
        config_path: the bundle's configuration.
        version: its ``ociVersion``.
        rest: what the caller wrote after the command.
    """
    if not is_crun(path) or not isinstance(version, str) or version.startswith("1.0.") or not version.startswith("1."):
        return rest
    with open(config_path, "rb") as handle:
        data = handle.read()
    key = data.find(b'"ociVersion"')
    start = data.find(f'"{version}"'.encode(), key)
    if key < 0 or start < 0 or data[key + 12 : start].strip(b" \t\r\n") != b":":
        return rest  # written in another way than anybody does: crun decides
    fd = os.memfd_create("config.json", 0)
    os.write(fd, data[:start] + f'"{KNOWN_VERSION}"'.encode() + data[start + len(version) + 2 :])
    os.set_inheritable(fd, True)
    return ["--config", f"/proc/self/fd/{fd}", *rest]
