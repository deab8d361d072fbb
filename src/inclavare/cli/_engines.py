"""rune in the configuration of docker, containerd and podman: put in, taken out, nothing else touched.

The functions that compute take a file's text and return the new text; :class:`Change` writes it: atomically, with a
backup made once, keeping mode and owner.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PlatformError, UsageError

BACKUP_SUFFIX = ".inclavare-backup"
PREFIX = Path("/usr/local")
#: The wrapper that containerd looks for when a container's runtime type is ``io.containerd.rune.v2``.
SHIM_NAME = "containerd-shim-rune-v2"
#: Below the prefix: holds a link named ``runc`` to rune. rune never takes its low-level runtime from here.
SHIM_DIRECTORY = Path("lib/inclavare/shim")

Edit = Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class Engine:
    """A container engine that can be told of rune.

    Attributes:
        config: its configuration file.
        add: ``(text, path of rune) -> text``; an empty text stands for a file that is missing.
        remove: ``(text, "") -> text``; an empty text means that nothing but ours was in it.
        current: the path of rune that a text names, or ``None``.
        reload: what the user has to do afterwards.
        use: how a container is then started.
    """

    name: str
    config: Path
    add: Edit
    remove: Edit
    current: Callable[[str], str | None]
    reload: str
    use: str


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """One file's change, not yet written. ``None`` stands for a file that is missing; a link's
    text is where it leads.
    """

    path: Path
    before: str | None
    after: str | None
    mode: int = 0o644
    backup: bool = True
    link: bool = False

    @property
    def needed(self) -> bool:
        """Whether the file would differ."""
        return self.before != self.after

    def diff(self) -> str:
        """A unified diff, empty if nothing changes."""
        old, new = self.before or "", self.after or ""
        names = (
            "/dev/null" if self.before is None else str(self.path),
            "/dev/null" if self.after is None else str(self.path),
        )
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm="")
        return "".join(line + "\n" for line in lines)

    def write(self) -> None:
        """Make it so.

        Raises:
            PlatformError: the file cannot be written; the old one is unharmed.
        """
        if not self.needed:
            return
        if self.link:
            self._write_link()
            return
        # A link stays a link: what it points to is replaced.
        target = Path(os.path.realpath(self.path))
        try:
            if self.after is None:
                target.unlink()
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            saved = _backup_path(target)
            if self.backup and self.before is not None and not saved.exists():
                _write_atomically(saved, self.before, self.mode, like=target)
            _write_atomically(target, self.after, self.mode, like=target if self.before is not None else None)
        except OSError as error:
            raise _unwritable(target, error) from None

    def _write_link(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            if self.after is None:
                self.path.unlink()
                _remove_empty(self.path.parent, levels=2)
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.symlink_to(self.after)
            temporary.replace(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from None


def _unwritable(path: Path, error: OSError) -> PlatformError:
    return PlatformError(
        f"cannot write {path}: {error.strerror}",
        id="cli.install.write",
        remedy="run this as root" if os.geteuid() else "make the file system writable, or name another --config",
    )


def _remove_empty(directory: Path, *, levels: int) -> None:
    for path in [directory, *directory.parents][:levels]:
        try:
            path.rmdir()
        except OSError:
            return


def _backup_path(path: Path) -> Path:
    return path.with_name(path.name + BACKUP_SUFFIX)


def _write_atomically(path: Path, text: str, mode: int, *, like: Path | None) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as handle:
            handle.write(text)
            handle.flush()
            if like is not None:
                status = like.stat()
                os.fchown(handle.fileno(), status.st_uid, status.st_gid)
                os.fchmod(handle.fileno(), status.st_mode & 0o7777)
            else:
                os.fchmod(handle.fileno(), mode)
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise _malformed(path, "not UTF-8") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", id="cli.install.read") from None


def _malformed(path: Path | str, what: str) -> UsageError:
    return UsageError(
        f"{path}: {what}",
        id="cli.install.malformed",
        remedy="correct the file; nothing was written",
    )


class _TextError(ValueError):
    """What is wrong with a text; the caller knows the file's name."""


# --- docker -----------------------------------------------------------------------------------------------------------


def _json_object(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise _TextError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(document, dict):
        raise _TextError("not a JSON object")
    if not isinstance(document.get("runtimes", {}), dict):
        raise _TextError("runtimes is not a JSON object")
    return document


def _json_text(document: dict[str, Any], like: str) -> str:
    found = re.search(r"^([ \t]+)\"", like, re.MULTILINE)
    return json.dumps(document, indent=found[1] if found else 4, ensure_ascii=False) + "\n"


def docker_add(text: str, rune: str) -> str:
    """``daemon.json`` with ``runtimes.rune``."""
    document = _json_object(text)
    wanted = {"path": rune}
    if document.get("runtimes", {}).get("rune") == wanted:
        return text
    document.setdefault("runtimes", {})["rune"] = wanted
    return _json_text(document, text)


def docker_remove(text: str, _: str = "") -> str:
    """``daemon.json`` without ``runtimes.rune``; empty if nothing is left."""
    document = _json_object(text)
    if "rune" not in document.get("runtimes", {}):
        return text
    del document["runtimes"]["rune"]
    if not document["runtimes"]:
        del document["runtimes"]
    return _json_text(document, text) if document else ""


def docker_current(text: str) -> str | None:
    """The path of rune in ``daemon.json``."""
    entry = _json_object(text).get("runtimes", {}).get("rune")
    path = entry.get("path") if isinstance(entry, dict) else None
    return path if isinstance(path, str) else None


# --- TOML -------------------------------------------------------------------------------------------------------------


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _TextError(str(error)) from None


def _table(document: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The value at a path, or ``None``."""
    value: Any = document
    for done, key in enumerate(path):
        if not isinstance(value, dict):
            raise _TextError(f"{'.'.join(path[:done])} is not a table")
        if key not in value:
            return None
        value = value[key]
    return value


def _toml_set(text: str, path: tuple[str, ...], value: Any) -> str:
    """The text with a table set at a path; comments, order and everything else stay.

    Appended where TOML allows that, else edited in place; either way the result is read again and must say what is
    wanted, and nothing else.
    """
    before = _toml(text)
    _table(before, path)
    wanted = _merged(before, path, value)
    for edit in (_appended, _edited):
        try:
            new = edit(text, path, value)
            if tomllib.loads(new) == wanted:
                return new
        except ValueError:
            continue
    raise _TextError(f"{'.'.join(path)} cannot be added without changing something else")


def _merged(document: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    merged = deepcopy(document)
    at = merged
    for key in path[:-1]:
        at = at.setdefault(key, {})
    at[path[-1]] = value
    return merged


def _appended(text: str, path: tuple[str, ...], value: Any) -> str:
    table = _plain_toml(path, value) if isinstance(value, dict) else _plain_toml(path[:-1], {path[-1]: value})
    return text.rstrip("\n") + "\n\n" + table if text.strip() else table


def _edited(text: str, path: tuple[str, ...], value: Any) -> str:
    import tomlkit

    document = tomlkit.parse(text)
    at: Any = document
    for key in path[:-1]:
        if key not in at:
            at[key] = tomlkit.table(is_super_table=True)
        at = at[key]
    at[path[-1]] = value
    return tomlkit.dumps(document)


def _plain_toml(path: tuple[str, ...], value: dict[str, Any]) -> str:
    lines = ["[" + ".".join(json.dumps(key) if not re.fullmatch(r"[\w-]+", key) else key for key in path) + "]"]
    tables = []
    for key, item in value.items():
        if isinstance(item, dict):
            tables.append(_plain_toml((*path, key), item))
        else:
            lines.append(f"{key} = {json.dumps(item)}")
    return "\n".join(lines) + "\n" + "".join("\n" + table for table in tables)


def _toml_drop(text: str, path: tuple[str, ...]) -> str:
    """The text without the table at a path, and without the tables above it that this leaves empty."""
    import tomlkit

    before = _toml(text)
    if _table(before, path) is None:
        return text
    document = tomlkit.parse(text)
    wanted = deepcopy(before)
    for depth in range(len(path), 0, -1):
        parent, plain = _table(document, path[: depth - 1]), _table(wanted, path[: depth - 1])
        if depth < len(path) and plain[path[depth - 1]]:
            break
        del parent[path[depth - 1]]
        del plain[path[depth - 1]]
    new = tomlkit.dumps(document).rstrip("\n")
    new += "\n" if new else ""
    if tomllib.loads(new) != wanted:
        raise _TextError(f"{'.'.join(path)} cannot be removed without changing something else")
    return new


# --- containerd -------------------------------------------------------------------------------------------------------

_CONTAINERD_NEW = "version = 2\n"
#: A table of runtimes replaces containerd's default table, and CRI does not start without its default runtime.
_DEFAULT_RUNC = {"runtime_type": "io.containerd.runc.v2"}
_DEFAULT_COMMENT = "# containerd's own default, which any entry in this table would replace; added together with rune"
_CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime", 4: "io.containerd.cri.v1.runtime"}


def _containerd_runtimes(document: dict[str, Any]) -> tuple[str, ...]:
    version = document.get("version", 1)
    if version not in _CRI:
        raise _TextError(
            f"configuration version {version} is not one of {', '.join(map(str, _CRI))} "
            "(`containerd config migrate` prints it in a newer one)"
        )
    return ("plugins", _CRI[version], "containerd", "runtimes")


def containerd_add(text: str, rune: str) -> str:
    """``config.toml`` with the runtime ``rune`` for CRI: the stock shim, its ``BinaryName`` being rune."""
    document = _toml(text)
    if not document:
        text = text.rstrip("\n") + "\n" + _CONTAINERD_NEW if text.strip() else _CONTAINERD_NEW
        document = _toml(text)
    return _with_runtime(text, document, rune)


def _with_runtime(text: str, main: dict[str, Any], rune: str) -> str:
    """The text with our runtime, given what the main configuration says."""
    runtimes = _containerd_runtimes(main)
    wanted = _containerd_entry(main, runtimes, rune)
    if _table(_toml(text), (*runtimes, "rune")) == wanted:
        return text
    if _table(main, runtimes) is None and _table(_toml(text), runtimes) is None:
        text = _toml_set(text, (*runtimes, "runc"), _DEFAULT_RUNC)
        head = _plain_toml((*runtimes, "runc"), _DEFAULT_RUNC).splitlines()[0]
        text = text.replace(head, f"{_DEFAULT_COMMENT}\n{head}")
    return _toml_set(text, (*runtimes, "rune"), wanted)


def _containerd_entry(document: dict[str, Any], runtimes: tuple[str, ...], rune: str) -> dict[str, Any]:
    options: dict[str, Any] = {"BinaryName": rune}
    # The kubelet's cgroup driver is one for all runtimes of a node.
    of_runc = _table(document, (*runtimes, "runc", "options"))
    if isinstance(of_runc, dict) and isinstance(of_runc.get("SystemdCgroup"), bool):
        options["SystemdCgroup"] = of_runc["SystemdCgroup"]
    return {"runtime_type": "io.containerd.runc.v2", "options": options}


def containerd_remove(text: str, _: str = "") -> str:
    """``config.toml`` without the runtime ``rune``; empty if nothing is left but what :func:`containerd_add` made."""
    document = _toml(text)
    if not document:
        return text
    runtimes = _containerd_runtimes(document)
    new = _toml_drop(text, (*runtimes, "rune"))
    if new != text and _DEFAULT_COMMENT in new and _table(_toml(new), runtimes) == {"runc": _DEFAULT_RUNC}:
        new = _toml_drop(new.replace(_DEFAULT_COMMENT + "\n", ""), (*runtimes, "runc"))
    return "" if new != text and re.fullmatch(r"\s*version = \d+\s*", new) else new


def containerd_current(text: str) -> str | None:
    """The path of rune in ``config.toml``."""
    document = _toml(text)
    if not document:
        return None
    path = _table(document, (*_containerd_runtimes(document), "rune", "options", "BinaryName"))
    return path if isinstance(path, str) else None


def containerd_drop_in(config: Path) -> Path | None:
    """The drop-in file to write instead of ``config``, where containerd merges drop-ins table by table.

    containerd 1.x replaces a plugin's whole section by an imported one, so there the main file is edited; 2.x (version
    3 and later) merges, and reads ``conf.d`` if the main file's ``imports`` name it.
    """
    document = _toml(_read(config) or "")
    imports = document.get("imports", [])
    if document.get("version", 1) < 3 or not isinstance(imports, list):
        return None
    for pattern in imports:
        if isinstance(pattern, str) and pattern.endswith("/*.toml"):
            return Path(config.parent / pattern).parent / "50-rune.toml"
    return None


def containerd_drop_in_add(text: str, rune: str, *, main: str) -> str:
    """The drop-in's text, of the main file's version and cgroup driver."""
    document = _toml(main)
    return _with_runtime(text if text.strip() else f"version = {document['version']}\n", document, rune)


# --- podman -----------------------------------------------------------------------------------------------------------

_PODMAN_PATH = ("engine", "runtimes")


def podman_add(text: str, rune: str) -> str:
    """``containers.conf`` or a file of its ``.d`` directory, with ``engine.runtimes.rune``."""
    path = (*_PODMAN_PATH, "rune")
    if _table(_toml(text), path) == [rune]:
        return text
    return _toml_set(text, path, [rune])


def podman_remove(text: str, _: str = "") -> str:
    """The same without ``engine.runtimes.rune``; empty if nothing is left."""
    new = _toml_drop(text, (*_PODMAN_PATH, "rune"))
    return new if new.strip() else ""


def podman_current(text: str) -> str | None:
    """The path of rune in ``containers.conf``."""
    paths = _table(_toml(text), (*_PODMAN_PATH, "rune"))
    return paths[0] if isinstance(paths, list) and paths and isinstance(paths[0], str) else None


# --- the three --------------------------------------------------------------------------------------------------------

ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="docker",
            config=Path("/etc/docker/daemon.json"),
            add=docker_add,
            remove=docker_remove,
            current=docker_current,
            reload="systemctl reload docker   (without systemd: kill -HUP $(pidof dockerd))",
            use="docker run --runtime rune -e ENCLAVE_TYPE=sgx-sim IMAGE",
        ),
        Engine(
            name="containerd",
            config=Path("/etc/containerd/config.toml"),
            add=containerd_add,
            remove=containerd_remove,
            current=containerd_current,
            reload="systemctl restart containerd   (containers go on running)",
            use="ctr run --runtime io.containerd.rune.v2 --env ENCLAVE_TYPE=sgx-sim IMAGE ID, "
            "or in Kubernetes a RuntimeClass with handler rune",
        ),
        Engine(
            name="podman",
            config=Path("/etc/containers/containers.conf.d/50-rune.conf"),
            add=podman_add,
            remove=podman_remove,
            current=podman_current,
            reload="nothing: podman reads its configuration at each start",
            use="podman --runtime rune run -e ENCLAVE_TYPE=sgx-sim IMAGE",
        ),
    )
}


def rune_path(given: Path | None) -> Path:
    """The rune that the engines are to call: the one given, else this installation's, else the one on PATH.

    Raises:
        UsageError: it is not there or not executable.
    """
    candidates = [given] if given else [Path(sys.prefix) / "bin" / "rune", Path(shutil.which("rune") or "/nonexistent")]
    for candidate in candidates:
        absolute = candidate.absolute()
        if absolute.is_file() and os.access(absolute, os.X_OK):
            return absolute
    raise UsageError(
        "rune is not an executable file" if given else "rune is not installed",
        id="cli.install.rune",
        found=given,
        expected="an executable file",
        remedy="name it with --rune",
    )


def install(engine: Engine, rune: Path, *, config: Path | None = None, prefix: Path = PREFIX) -> list[Change]:
    """What has to be written so that the engine knows rune; nothing is written yet.

    Raises:
        UsageError: a file that exists is malformed.
    """
    path = config or engine.config
    add = engine.add
    with _naming(path):
        if engine.name == "containerd":
            drop_in = containerd_drop_in(path)
            if drop_in is not None:
                main = _read(path) or ""
                path, add = drop_in, lambda text, value: containerd_drop_in_add(text, value, main=main)
    with _naming(path):
        before = _read(path)
        changes = [Change(path, before, add(before or "", str(rune)))]
    if engine.name == "containerd":
        changes += _shim(rune, prefix)
    return [change for change in changes if change.needed]


def uninstall(engine: Engine, *, config: Path | None = None, prefix: Path = PREFIX) -> list[Change]:
    """What has to be written so that the engine no longer knows rune; nothing is written yet.

    A file that is still as :func:`install` left it becomes what it was; from one that was changed since, only our
    keys go.

    Raises:
        UsageError: a file that exists is malformed.
    """
    paths = [config or engine.config]
    with _naming(paths[0]):
        if engine.name == "containerd":
            drop_in = containerd_drop_in(paths[0])
            paths += [drop_in] if drop_in else []
    changes = []
    for path in paths:
        with _naming(path):
            text = _read(path)
            if text is not None:
                changes.append(_restored(engine, path, text))
                saved = _backup_path(Path(os.path.realpath(path)))
                if changes[-1].needed and saved.exists():
                    changes.append(Change(saved, _read(saved), None, backup=False))
    if engine.name == "containerd":
        changes += _shim(None, prefix)
    return [change for change in changes if change.needed]


def _restored(engine: Engine, path: Path, text: str) -> Change:
    rune = engine.current(text)
    saved = _read(_backup_path(Path(os.path.realpath(path))))
    if rune is not None and saved is not None and engine.add(saved, rune) == text:
        return Change(path, text, saved, backup=False)
    rest = engine.remove(text, "")
    return Change(path, text, rest or None if rest != text else text, backup=False)


class _naming:
    """Turns what is wrong with a text into an error that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _TextError):
            raise _malformed(self._path, str(error)) from None


# --- the shim ---------------------------------------------------------------------------------------------------------


def shim_text(prefix: Path = PREFIX) -> str:
    """The wrapper around containerd's own shim: there, the program called ``runc`` is rune."""
    return f"""#!/bin/sh
# containerd's own runc shim, with rune in runc's place. Written by `inclavare install containerd`.
PATH={prefix / SHIM_DIRECTORY}:${{PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}}
export PATH
exec containerd-shim-runc-v2 "$@"
"""


def _shim(rune: Path | None, prefix: Path) -> list[Change]:
    wrapper, link = prefix / "bin" / SHIM_NAME, prefix / SHIM_DIRECTORY / "runc"
    leads_to = str(link.readlink()) if link.is_symlink() else _read(link)
    return [
        Change(wrapper, _read(wrapper), shim_text(prefix) if rune else None, mode=0o755, backup=False),
        Change(link, leads_to, str(rune) if rune else None, backup=False, link=True),
    ]


def configured(engine: Engine) -> str | None:
    """The rune that the engine's configuration names, or ``None``.

    Raises:
        UsageError: the configuration is malformed.
    """
    paths = [engine.config]
    with _naming(engine.config):
        if engine.name == "containerd" and (drop_in := containerd_drop_in(engine.config)):
            paths.append(drop_in)
    for path in paths:
        with _naming(path):
            found = engine.current(_read(path) or "")
            if found:
                return found
    return None
