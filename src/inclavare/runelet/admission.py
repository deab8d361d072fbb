"""What the host may ask of an enclave: its configuration against the measured manifest.

Arguments, environment, mounts, hooks, user and working directory come from the host, which is not trusted. Each is
either what the manifest says, or allowed by it, or known to be harmless and dropped, or refused with the reason.
"""

from __future__ import annotations

import copy
import fnmatch
import os
import posixpath
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..enclave.manifest import Manifest
from ..errors import PolicyError, UsageError

if TYPE_CHECKING:
    from ..enclave.tree import Tree

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
_ATTESTATION = "/dev/attestation"
_MAX_ID = 0xFFFFFFFE
#: Names under /proc, numbers apart, whose ``root`` and ``cwd`` are links out of it.
_PROCESSES = ("self", "thread-self")


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


def wants_debug(config: dict[str, Any]) -> bool:
    """Whether ``ENCLAVE_DEBUG`` asks for a debug enclave."""
    return (requested(config, "ENCLAVE_DEBUG") or "").lower() in ("1", "true", "yes")


def with_absolute_sources(config: dict[str, Any], bundle: str) -> dict[str, Any]:
    """The configuration with the sources of bind mounts from ``bundle``, where the runtime-spec says they start.

    The low-level runtime gets another bundle, so that a relative one would lead it elsewhere.
    """
    mounts = []
    for mount in config.get("mounts") or []:
        source = mount.get("source")
        if _kind(mount) == "bind" and source and not source.startswith("/"):
            mount = {**mount, "source": posixpath.join(bundle, source)}
        mounts.append(mount)
    return {**config, "mounts": mounts}


def check_shape(config: object) -> dict[str, Any]:
    """An enclave container's configuration has the parts that rune reads, with the types that the runtime-spec gives.

    Raises:
        UsageError: names the first part that is missing or of a wrong type.
    """

    def wrong(label: str, found: str, expected: str) -> UsageError:
        return UsageError(
            f"config.json: {label} is missing or has the wrong type",
            id="config.oci.shape",
            found=found,
            expected=expected,
            remedy="write it as the OCI runtime-spec says (rune spec makes an example)",
        )

    def need(value: object, kind: type, label: str) -> Any:
        if not isinstance(value, kind):
            raise wrong(label, type(value).__name__, kind.__name__)
        return value

    def text(value: object, label: str) -> str:
        found: str = need(value, str, label)
        if "\0" in found or not _is_unicode(found):
            raise wrong(label, repr(found[:80]), "text without NUL and lone surrogates")
        return found

    def each(holder: dict[str, Any], key: str, label: str) -> list[Any]:
        """A list that may be absent or null, as Go's and crun's parsers take it."""
        found: list[Any] = need(holder.get(key) or [], list, label)
        return found

    document: dict[str, Any] = need(config, dict, "the document")
    text(need(document.get("root"), dict, "root").get("path"), "root.path")
    process = need(document.get("process"), dict, "process")
    for entry in need(process.get("args"), list, "process.args"):
        text(entry, "process.args[]")
    for entry in each(process, "env", "process.env"):
        if text(entry, "process.env[]").find("=") < 1:
            raise wrong("process.env[]", repr(entry[:80]), "NAME=value")
    if not text(process.get("cwd"), "process.cwd").startswith("/"):
        raise wrong("process.cwd", repr(process["cwd"][:80]), "an absolute path")
    user = need(process.get("user") or {}, dict, "process.user")
    groups = each(user, "additionalGids", "process.user.additionalGids")
    for number in (user.get("uid", 0), user.get("gid", 0), *groups):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _MAX_ID:
            raise wrong("process.user", repr(number)[:80], f"ids from 0 to {_MAX_ID}")
    for mount in each(document, "mounts", "mounts"):
        text(need(mount, dict, "mounts[]").get("destination"), "mounts[].destination")
        for key in ("type", "source"):
            text(mount.get(key) or "", f"mounts[].{key}")
        for option in each(mount, "options", "mounts[].options"):
            text(option, "mounts[].options[]")
    need(document.get("annotations") or {}, dict, "annotations")
    hooks = need(document.get("hooks") or {}, dict, "hooks")
    for name in _CONTAINER_HOOKS:
        for hook in each(hooks, name, f"hooks.{name}"):
            path = text(need(hook, dict, f"hooks.{name}[]").get("path"), f"hooks.{name}[].path")
            if not path.startswith("/") or path != posixpath.normpath(path) or path.startswith("//"):
                raise wrong(f"hooks.{name}[].path", repr(path[:80]), "a clean absolute path")
            for key in ("args", "env"):
                for entry in each(hook, key, f"hooks.{name}[].{key}"):
                    text(entry, f"hooks.{name}[].{key}[]")
    linux = need(document.get("linux") or {}, dict, "linux")
    for key in ("maskedPaths", "readonlyPaths"):
        for path in each(linux, key, f"linux.{key}"):
            text(path, f"linux.{key}[]")
    for device in each(linux, "devices", "linux.devices"):
        text(need(device, dict, "linux.devices[]").get("path"), "linux.devices[].path")
    namespaces = [need(n, dict, "linux.namespaces[]") for n in each(linux, "namespaces", "linux.namespaces")]
    own = [namespace for namespace in namespaces if namespace.get("type") == "mount"]
    # Of two entries the low-level runtime would take the last, and that could be the host's own namespace.
    if len(own) != 1 or own[0].get("path"):
        raise UsageError(
            "an enclave container needs a mount namespace of its own",
            id="config.oci.namespace",
            remedy='add {"type": "mount"} without a path to linux.namespaces in config.json',
        )
    return document


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _clean(path: str) -> str:
    """An absolute path without ``.``, ``..`` and doubled slashes; a relative one is taken from the root."""
    return posixpath.normpath("/" + path.lstrip("/"))


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
    for name, value in _variables(process.get("env") or []).items():
        if name not in ENCLAVE_VARIABLES and not _matches(name, template.process.env_from_host):
            env[name] = value
    allowed, tmpfs = list(template.files.allowed), list(template.files.tmpfs)
    encrypted = {entry.path for entry in template.files.encrypted}
    for mount in config.get("mounts") or []:
        destination, kind = _clean(mount["destination"]), _kind(mount)
        if _is_standard(destination, kind) or (kind == "bind" and destination in encrypted):
            continue
        target = tmpfs if kind == "tmpfs" else allowed
        if destination not in target:
            target.append(destination)
    groups = [user.get("gid", 0), *(user.get("additionalGids") or [])]
    hooks = [hook_argv(hook) for name in _CONTAINER_HOOKS for hook in (config.get("hooks") or {}).get(name) or []]
    return {
        "args": list(process["args"]),
        "env": env,
        "cwd": _clean(process["cwd"]),
        "user": f"{user.get('uid', 0)}:{','.join(map(str, groups))}",
        "hooks": hooks,
        "allowed": sorted(allowed),
        "tmpfs": sorted(tmpfs),
    }


def _variables(entries: list[str]) -> dict[str, str]:
    """Name → value; of a name that is there twice the last counts."""
    return {name: value for name, _, value in (entry.partition("=") for entry in entries)}


def hook_argv(hook: dict[str, Any]) -> list[str]:
    """A hook as one list: its path, then its arguments without argv[0]."""
    return [str(hook.get("path", "")), *(str(word) for word in (hook.get("args") or [])[1:])]


def _is_measured(entry: str, known: Mapping[str, str]) -> bool:
    name, _, value = entry.partition("=")
    return known.get(name) == value


def _matches(name: str, patterns: Any) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def admit(
    config: dict[str, Any], manifest: Manifest, *, resolve: Callable[[str], str] = lambda path: path
) -> dict[str, Any]:
    """The configuration that may run in the enclave; the given one is not changed.

    Args:
        config: shape checked.
        manifest: what was measured.
        resolve: follows the image's links (:func:`follow_links`), as the low-level runtime will do for mounts.

    Raises:
        PolicyError: the host asks for something that the manifest does not allow; names it, what was expected, and how
            to allow it.
    """
    out = copy.deepcopy(config)
    process = out["process"]
    process["env"] = admit_env(process.get("env") or [], manifest)
    process["args"] = _admit_args(process["args"], manifest)
    _admit_identity(process, manifest)
    out["mounts"] = out.get("mounts") or []
    _admit_mounts(out["mounts"], manifest, resolve)
    _admit_masks(out.get("linux") or {})
    _admit_devices((out.get("linux") or {}).get("devices") or [], out["mounts"], resolve)
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
    # A variable that is to hold a secret is never the host's, or withholding the secret would replace it.
    secrets = {secret.env for secret in manifest.secrets}
    for name, value in _variables(entries).items():
        if name in ENCLAVE_VARIABLES or measured.get(name) == value:
            continue
        if name not in secrets and _matches(name, manifest.process.env_from_host):
            out[name] = value
        elif _matches(name, INJECTED):
            continue
        elif name in secrets:
            raise PolicyError(
                f"the environment variable {name} comes from the host, and is to hold a secret",
                id="admission.env.secret",
                found=name,
                expected="the value that the key broker releases",
                remedy="leave it out: who runs the container must not replace a secret",
            )
        else:
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
    user = process["user"] = process.get("user") or {}
    found = f"{user.get('uid', 0)}:{user.get('gid', 0)}"
    uid, gid, groups = manifest.process.ids
    expected = f"{uid}:{gid}"
    process["cwd"] = _clean(process["cwd"])
    for label, have, want in (("user", found, expected), ("cwd", process["cwd"], manifest.process.cwd)):
        if have != want:
            raise PolicyError(
                f"process.{label} comes from the host and differs from the measured one",
                id=f"admission.{label}.refused",
                found=have,
                expected=want,
                remedy=f"leave it out, or set [process] {label} in enclave.toml and build again",
            )
    # Engines look additional groups up in the image's /etc/group; what counts is what was measured.
    user["additionalGids"] = list(groups)


def _below(path: str, roots: Any) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def follow_links(tree: Tree, path: str) -> str:
    """Where a path of the image leads, its links followed inside the image as a chrooted process would.

    Raises:
        PolicyError: more than 40 links.
    """
    todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    done: list[tuple[str, int | None]] = []
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            done = done[:-1]
            continue
        parent = done[-1][1] if done else 0
        child = None
        if parent is not None and tree.node(parent).kind == "d":
            child = tree.child(parent, os.fsencode(part))
        node = None if child is None else tree.node(child)
        if node is None or node.kind != "l":
            done.append((part, child))
            continue
        links += 1
        if links > 40:
            raise PolicyError(
                "a mount goes through a circle of links",
                id="admission.mount.links",
                found=path,
                remedy="mount it elsewhere, or correct the links in the image",
            )
        target = os.fsdecode(node.target)
        if target.startswith("/"):
            done = []
        todo += [piece for piece in reversed(target.split("/")) if piece not in ("", ".")]
    return "/" + "/".join(name for name, _ in done)


def _admit_mounts(mounts: list[dict[str, Any]], manifest: Manifest, resolve: Callable[[str], str]) -> None:
    """Check the mounts, and write each destination as it was checked, so that nobody reads it in another way."""
    encrypted = {resolve(entry.path): entry.path for entry in manifest.files.encrypted}
    secrets = {resolve(secret.path) for secret in manifest.secrets if secret.path}
    protected = {_ATTESTATION, *encrypted, *secrets}
    foreign: set[str] = set()
    for mount in mounts:
        destination, kind = resolve(_clean(mount["destination"])), _kind(mount)
        mount["destination"] = encrypted.get(destination, destination)
        if _below(destination, (_ATTESTATION,)):
            raise PolicyError(
                "a mount of the host would hide /dev/attestation",
                id="admission.mount.attestation",
                found=destination,
                remedy="mount it elsewhere",
            )
        if _below(destination, secrets):
            raise PolicyError(
                "a mount of the host would take the place of a secret of the manifest",
                id="admission.mount.secret",
                found=destination,
                remedy="mount it elsewhere",
            )
        _refuse_followed(f"the mount on {destination}", destination, foreign)
        volume = kind == "bind" and destination in encrypted
        standard = _is_standard(destination, kind)
        allowed = manifest.files.tmpfs if kind == "tmpfs" else manifest.files.allowed
        if not (standard or volume or _below(destination, allowed)) or _below(destination, ("/.inclavare",)):
            key = "tmpfs" if kind == "tmpfs" else "allowed"
            raise PolicyError(
                f"the mount on {destination} comes from the host and the manifest does not allow it",
                id="admission.mount.refused",
                found=f"{kind} on {destination}",
                expected=", ".join(allowed) or f"no path in [files] {key}",
                remedy=f"leave it out, or add the path to [files] {key} in enclave.toml and build again"
                + ("; for confidential data use [[files.encrypted]]" if kind == "bind" else ""),
            )
        if volume or (standard and kind != "bind") or kind == "tmpfs":
            continue
        # A link of the host's on the way to what is protected would have it mounted elsewhere.
        inside = next((path for path in sorted(protected - {destination}) if _below(path, (destination,))), None)
        if inside is not None or destination == "/":
            raise PolicyError(
                f"the mount on {destination} would put the host's files above {inside or 'the measured tree'}",
                id="admission.mount.covers",
                found=f"{kind} on {destination}",
                remedy="mount it elsewhere",
            )
        foreign.add(destination)


def _refuse_followed(what: str, path: str, foreign: set[str]) -> None:
    """Nothing is mounted or made below a mount with the host's files.

    A link there, which the host can set at any time, would lead the low-level runtime to any measured file.
    """
    above = next((root for root in sorted(foreign) if path != root and _below(path, (root,))), None)
    if above is not None:
        raise PolicyError(
            f"{what} lies below another mount with the host's files, where a link could lead it anywhere",
            id="admission.mount.nested",
            found=f"{path} below {above}",
            remedy="mount it elsewhere, or have the host arrange its files in one directory",
        )
    if path.startswith("/proc/") and (path.split("/")[2].isdigit() or path.split("/")[2] in _PROCESSES):
        raise PolicyError(
            f"{what} goes through a process's directory, whose links lead anywhere",
            id="admission.mount.process",
            found=path,
            remedy="leave it out",
        )


def _admit_devices(devices: list[dict[str, Any]], mounts: list[dict[str, Any]], resolve: Callable[[str], str]) -> None:
    foreign = {mount["destination"] for mount in mounts if _kind(mount) == "bind"}
    for device in devices:
        path = device["path"] = resolve(_clean(device["path"]))
        _refuse_followed(f"the device {path}", path, foreign)
        if not _below(path, ("/dev",)) or path == "/dev" or _below(path, (_ATTESTATION,)):
            raise PolicyError(
                f"the device {path} would stand among the measured files",
                id="admission.device.refused",
                found=path,
                expected="paths below /dev, /dev/attestation excepted",
                remedy="leave it out",
            )


def _admit_masks(linux: dict[str, Any]) -> None:
    for key in ("maskedPaths", "readonlyPaths"):
        for path in linux.get(key) or []:
            clean = _clean(path)
            _refuse_followed(f"linux.{key}", clean, set())
            if clean != path.rstrip("/") or not _below(clean, ("/proc", "/sys")):
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
            if not manifest.enclave.debug:
                # Neither is measured, and LD_PRELOAD or the name of another applet would make it another program.
                hook["args"] = argv
                known = manifest.process.env
                hook["env"] = [entry for entry in hook.get("env") or [] if _is_measured(entry, known)]


def admit_exec(args: list[str], user: str | None, manifest: Manifest) -> None:
    """Whether ``exec`` may start this command in the enclave.

    Args:
        args: the argument vector.
        user: ``uid`` or ``uid:gid`` that the host names; ``None`` for the container's own user.
        manifest: what was measured.

    Raises:
        PolicyError: the manifest's exec policy does not name the command, or the user is another than the measured one,
            and the enclave is not a debug enclave.
    """
    if manifest.enclave.debug:
        return
    measured = [str(number) for number in manifest.process.ids[:2]]
    if user is not None and user.split(":") not in (measured, measured[:1]):
        raise PolicyError(
            "exec as another user than the measured one is not allowed",
            id="admission.exec.user",
            found=user,
            expected=":".join(measured),
            remedy="leave the user out, or run a debug enclave",
        )
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
