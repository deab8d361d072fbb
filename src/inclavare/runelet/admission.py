"""What the host may ask of an enclave: its configuration against the measured manifest.

Arguments, environment, mounts, hooks, user and working directory come from the host, which is not trusted. Each is
either what the manifest says, or allowed by it, or known to be harmless and dropped, or refused with the reason.
"""

from __future__ import annotations

import copy
import fnmatch
import posixpath
from typing import Any

from ..enclave.manifest import Manifest
from ..errors import PolicyError, UsageError

#: Variables that configure rune itself; the application never sees them.
ENCLAVE_VARIABLES = (
    "ENCLAVE_TYPE",
    "ENCLAVE_RUNTIME_PATH",
    "ENCLAVE_RUNTIME_ARGS",
    "ENCLAVE_RUNTIME_LOGLEVEL",
    "ENCLAVE_RA_TYPE",
    "ENCLAVE_DEBUG",
    "RUNE_CARRIER",
)

#: Variables that container engines and kubelets add by themselves: dropped where the manifest does not take them.
INJECTED = (
    "HOSTNAME", "TERM", "container", "HOME", "PATH", "NOTIFY_SOCKET", "LISTEN_*",
    "KUBERNETES_*", "*_SERVICE_HOST", "*_SERVICE_PORT", "*_SERVICE_PORT_*", "*_PORT", "*_PORT_*_*",
)  # fmt: skip

#: Kernel file systems and empty directories at their usual places: destination → types.
_STANDARD = {
    "/proc": {"proc"},
    "/sys": {"sysfs"},
    "/sys/fs/cgroup": {"cgroup", "cgroup2"},
    "/dev": {"tmpfs"},
    "/dev/pts": {"devpts"},
    "/dev/mqueue": {"mqueue"},
    "/dev/shm": {"tmpfs", "bind"},
    "/run": {"tmpfs"},
}
#: Files that engines supply for name resolution and bookkeeping. They are the host's words, never trusted.
_ENGINE_FILES = {
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/run/.containerenv",
    "/dev/termination-log",
    "/var/run/secrets/kubernetes.io/serviceaccount",
    "/run/secrets/kubernetes.io/serviceaccount",
}
_CONTAINER_HOOKS = ("createContainer", "startContainer")


def enclave_request(config: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """What the configuration asks of rune: ``ENCLAVE_*`` variables and ``enclave.*`` annotations."""
    variables = {}
    for entry in (config.get("process") or {}).get("env") or []:
        name, _, value = entry.partition("=")
        if name in ENCLAVE_VARIABLES:
            variables[name] = value
    annotations = {k: str(v) for k, v in (config.get("annotations") or {}).items() if k.startswith("enclave.")}
    return variables, annotations


def requested(config: dict[str, Any], variable: str) -> str | None:
    """The value of an ``ENCLAVE_*`` variable, else of its annotation (``ENCLAVE_TYPE`` ↔ ``enclave.type``)."""
    variables, annotations = enclave_request(config)
    annotation = variable.lower().replace("_", ".")
    return variables.get(variable) or annotations.get(annotation) or None


def check_shape(config: object) -> dict[str, Any]:
    """An enclave container's configuration has the parts that rune reads, with the types that the runtime-spec gives.

    Raises:
        UsageError: names the first part that is missing or of a wrong type.
    """

    def need(value: object, kind: type, label: str) -> Any:
        if not isinstance(value, kind):
            raise UsageError(
                f"config.json: {label} is missing or has the wrong type",
                id="config.oci.shape",
                found=type(value).__name__,
                expected=kind.__name__,
                remedy="write it as the OCI runtime-spec says (rune spec makes an example)",
            )
        return value

    document: dict[str, Any] = need(config, dict, "the document")
    need(need(document.get("root"), dict, "root").get("path"), str, "root.path")
    process = need(document.get("process"), dict, "process")
    for entry in need(process.get("args"), list, "process.args"):
        need(entry, str, "process.args[]")
    for entry in need(process.get("env", []), list, "process.env"):
        need(entry, str, "process.env[]")
    need(process.get("cwd"), str, "process.cwd")
    for mount in need(document.get("mounts", []), list, "mounts"):
        need(need(mount, dict, "mounts[]").get("destination"), str, "mounts[].destination")
    need(document.get("annotations", {}), dict, "annotations")
    linux = need(document.get("linux", {}), dict, "linux")
    namespaces = need(linux.get("namespaces", []), list, "linux.namespaces")
    own = [n for n in namespaces if isinstance(n, dict) and n.get("type") == "mount" and not n.get("path")]
    if not own:
        raise UsageError(
            "an enclave container needs a mount namespace of its own",
            id="config.oci.namespace",
            remedy='add {"type": "mount"} without a path to linux.namespaces in config.json',
        )
    return document


def _kind(mount: dict[str, Any]) -> str:
    options = mount.get("options") or []
    if "bind" in options or "rbind" in options:
        return "bind"
    return str(mount.get("type") or "bind")


def _is_standard(destination: str, kind: str) -> bool:
    return kind in _STANDARD.get(destination, ()) or (kind == "bind" and destination in _ENGINE_FILES)


def manifest_fields(config: dict[str, Any], template: Manifest) -> dict[str, Any]:
    """What an image without a manifest is measured with: this configuration, on top of the node's template.

    Everything that the host chose is taken over, and so is measured: another argument, variable or mount
    gives another MRENCLAVE.

    Returns:
        process arguments, env, cwd, user, hooks; allowed and tmpfs paths.
    """
    process = config["process"]
    user = process.get("user") or {}
    env: dict[str, str] = dict(template.process.env)
    for entry in process.get("env") or []:
        name, _, value = entry.partition("=")
        if name not in ENCLAVE_VARIABLES and not _matches(name, template.process.env_from_host):
            env[name] = value
    allowed, tmpfs = list(template.files.allowed), list(template.files.tmpfs)
    encrypted = {entry.path for entry in template.files.encrypted}
    for mount in config.get("mounts") or []:
        destination, kind = posixpath.normpath(mount["destination"]), _kind(mount)
        if _is_standard(destination, kind) or destination in encrypted:
            continue
        target = tmpfs if kind == "tmpfs" else allowed
        if destination not in target:
            target.append(destination)
    hooks = [hook_argv(hook) for name in _CONTAINER_HOOKS for hook in (config.get("hooks") or {}).get(name) or []]
    return {
        "args": list(process["args"]),
        "env": env,
        "cwd": process["cwd"],
        "user": f"{user.get('uid', 0)}:{user.get('gid', 0)}",
        "hooks": hooks,
        "allowed": sorted(allowed),
        "tmpfs": sorted(tmpfs),
    }


def hook_argv(hook: dict[str, Any]) -> list[str]:
    """A hook as one list: its path, then its arguments without argv[0]."""
    return [str(hook.get("path", "")), *(str(word) for word in (hook.get("args") or [])[1:])]


def _matches(name: str, patterns: Any) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def admit(config: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """The configuration that may run in the enclave; the given one is not changed.

    Raises:
        PolicyError: the host asks for something that the manifest does not allow; names it, what was expected, and how
            to allow it.
    """
    out = copy.deepcopy(config)
    process = out["process"]
    process["env"] = admit_env(process.get("env") or [], manifest)
    process["args"] = _admit_args(process["args"], manifest)
    _admit_identity(process, manifest)
    _admit_mounts(out.get("mounts") or [], manifest)
    out["mounts"] = out.get("mounts") or []
    _admit_masks(out.get("linux") or {})
    _admit_hooks(out.get("hooks") or {}, manifest)
    out["annotations"] = {k: v for k, v in (out.get("annotations") or {}).items() if not k.startswith("enclave.")}
    return out


def admit_env(entries: list[str], manifest: Manifest) -> list[str]:
    """The environment: the manifest's variables, and of the host's those that the manifest takes.

    Raises:
        PolicyError: a variable of the host is neither taken nor a known addition of a container engine.
    """
    measured = dict(manifest.process.env)
    out = dict(measured)
    for entry in entries:
        name, _, value = entry.partition("=")
        if name in ENCLAVE_VARIABLES or measured.get(name) == value:
            continue
        if _matches(name, manifest.process.env_from_host):
            out[name] = value
        elif not _matches(name, INJECTED):
            raise PolicyError(
                f"the environment variable {name} comes from the host and the manifest does not allow it",
                id="admission.env.refused",
                found=name,
                expected=", ".join([*measured, *manifest.process.env_from_host]) or "no variables",
                remedy="leave it out, or add it to [process] env or env_from_host in enclave.toml and build again",
            )
    return [f"{name}={value}" for name, value in out.items()]


def _admit_args(args: list[str], manifest: Manifest) -> list[str]:
    if manifest.process.args_from_host or list(manifest.process.args) == args:
        return args
    raise PolicyError(
        "the arguments come from the host and differ from the measured ones",
        id="admission.args.refused",
        found=args,
        expected=list(manifest.process.args),
        remedy="leave them out, or set [process] args or args_from_host in enclave.toml and build again",
    )


def _admit_identity(process: dict[str, Any], manifest: Manifest) -> None:
    user = process.get("user") or {}
    found = f"{user.get('uid', 0)}:{user.get('gid', 0)}"
    expected = ":".join(manifest.process.user.split(":")[:2])
    for label, have, want in (("user", found, expected), ("cwd", process["cwd"], manifest.process.cwd)):
        if have != want:
            raise PolicyError(
                f"process.{label} comes from the host and differs from the measured one",
                id=f"admission.{label}.refused",
                found=have,
                expected=want,
                remedy=f"leave it out, or set [process] {label} in enclave.toml and build again",
            )


def _below(path: str, roots: Any) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def _admit_mounts(mounts: list[dict[str, Any]], manifest: Manifest) -> None:
    encrypted = {entry.path for entry in manifest.files.encrypted}
    for mount in mounts:
        destination, kind = posixpath.normpath(mount["destination"]), _kind(mount)
        if destination.startswith("//"):
            destination = destination[1:]
        if destination == "/dev/attestation" or destination.startswith("/dev/attestation/"):
            raise PolicyError(
                "a mount of the host would hide /dev/attestation",
                id="admission.mount.attestation",
                found=destination,
                remedy="mount it elsewhere",
            )
        if _is_standard(destination, kind) or (kind == "bind" and destination in encrypted):
            continue
        allowed = manifest.files.tmpfs if kind == "tmpfs" else manifest.files.allowed
        if not _below(destination, allowed):
            key = "tmpfs" if kind == "tmpfs" else "allowed"
            raise PolicyError(
                f"the mount on {destination} comes from the host and the manifest does not allow it",
                id="admission.mount.refused",
                found=f"{kind} on {destination}",
                expected=", ".join(allowed) or f"no path in [files] {key}",
                remedy=f"leave it out, or add the path to [files] {key} in enclave.toml and build again"
                + ("; for confidential data use [[files.encrypted]]" if kind == "bind" else ""),
            )


def _admit_masks(linux: dict[str, Any]) -> None:
    for key in ("maskedPaths", "readonlyPaths"):
        for path in linux.get(key) or []:
            if not _below(posixpath.normpath(str(path)), ("/proc", "/sys")):
                raise PolicyError(
                    f"linux.{key} would hide or freeze a file of the measured tree",
                    id="admission.mask.refused",
                    found=path,
                    expected="paths below /proc and /sys",
                    remedy="leave it out",
                )


def _admit_hooks(hooks: dict[str, Any], manifest: Manifest) -> None:
    for name in _CONTAINER_HOOKS:
        for hook in hooks.get(name) or []:
            argv = hook_argv(hook)
            if not manifest.enclave.debug and argv not in [list(entry) for entry in manifest.process.hooks]:
                raise PolicyError(
                    f"the {name} hook runs in the enclave's namespaces and the manifest does not allow it",
                    id="admission.hook.refused",
                    found=argv,
                    expected=[list(entry) for entry in manifest.process.hooks] or "no hooks",
                    remedy="leave it out, use a createRuntime hook, or add it to [process] hooks in enclave.toml",
                )


def admit_exec(args: list[str], manifest: Manifest) -> None:
    """Whether ``exec`` may start this command in the enclave.

    Raises:
        PolicyError: the manifest's exec policy does not name it, and the enclave is not a debug enclave.
    """
    if manifest.enclave.debug:
        return
    for allowed in manifest.exec.commands:
        if isinstance(allowed, str):
            if allowed == "*" or (args and args[0] == allowed):
                return
        elif list(allowed) == args:
            return
    raise PolicyError(
        "exec into this enclave is not allowed by its measured manifest",
        id="admission.exec.refused",
        found=args,
        expected=[c if isinstance(c, str) else list(c) for c in manifest.exec.commands] or "no commands",
        remedy="add the command to [exec] commands in enclave.toml and build again, or run a debug enclave "
        "(ENCLAVE_DEBUG=true for images that are measured at first use)",
    )
