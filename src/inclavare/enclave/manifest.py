"""The manifest: what an enclave measures and what it allows its host (``enclave.toml``, schema version 1).

People write TOML; every key has a default, and a wrong one is reported with its line. What is measured is the
canonical form (RFC 8785 JSON) of the complete manifest. Reading the canonical form is on the start path and imports
only ``json``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ..config import parse_size
from ..errors import InclavareError, IntegrityError, UsageError

SCHEMA = 1
#: Largest accepted canonical form in bytes.
MAX_CANONICAL = 1 << 20

_PAGE = 4096
# Compiled when they are first needed: most starts need none of them.
_RUNTIME = r"[a-z0-9][a-z0-9_-]{0,31}"
_RESOURCE = r"kbs(\+[a-z0-9_-]+)?://[^/\s]*/[^/\s]+/[^/\s]+/[^/\s]+"
_SEALED = ("sealed:mrenclave", "sealed:mrsigner")


class EnclaveSection(NamedTuple):
    """``[enclave]``: the enclave's own properties.

    Attributes:
        size: enclave memory in bytes, a multiple of 4096.
        threads: number of TCS pages.
        debug: ATTRIBUTES.DEBUG; a debug enclave protects nothing.
        isv_prod_id: 0 … 65535.
        isv_svn: 0 … 65535.
        tee: TEE platforms on which it may run.
        runtime: the enclave runtime.
    """

    size: int = 256 << 20
    threads: int = 64
    debug: bool = False
    isv_prod_id: int = 0
    isv_svn: int = 0
    tee: tuple[str, ...] = ("sgx",)
    runtime: str = "native"


class ProcessSection(NamedTuple):
    """``[process]``: what is started, and what the host may add.

    Attributes:
        args: argument vector; filled from the image's configuration where the file has none.
        env: environment.
        env_from_host: names of variables that the host may set.
        args_from_host: whether the host may choose the arguments.
        cwd: working directory, absolute.
        user: ``uid:gid`` or ``uid:gid,extra,…``; names are resolved when the image is built.
        hooks: argument vectors of OCI hooks that may run in the container's namespaces.
    """

    args: tuple[str, ...] = ()
    env: Mapping[str, str] = MappingProxyType({})
    env_from_host: tuple[str, ...] = ("HOSTNAME", "TERM", "container")
    args_from_host: bool = False
    cwd: str = "/"
    user: str = "0:0"
    hooks: tuple[tuple[str, ...], ...] = ()

    @property
    def ids(self) -> tuple[int, int, tuple[int, ...]]:
        """User id, group id and additional group ids.

        Raises:
            UsageError: the user is a name that has not been resolved yet.
        """
        ids = _numeric_ids(self.user)
        if ids is None:
            raise UsageError(
                f"user {self.user!r} is not resolved",
                id="enclave.manifest.user",
                expected="uid:gid[,extra,…] in decimal",
                remedy="build the image with inclavare build, which resolves names by the image's own /etc/passwd",
            )
        return ids[0], ids[1], tuple(ids[2:])


def _numeric_ids(user: str) -> list[int] | None:
    uid, colon, rest = user.partition(":")
    parts = [uid, *rest.split(",")]
    if not colon or not all(part.isascii() and part.isdigit() and len(part) <= 10 for part in parts):
        return None
    return [int(part) for part in parts]


class EncryptedVolume(NamedTuple):
    """``[[files.encrypted]]``: a directory kept encrypted.

    Attributes:
        path: absolute path in the container.
        key: ``kbs:///repo/type/tag``, ``sealed:mrenclave`` or ``sealed:mrsigner``.
    """

    path: str
    key: str


class FilesSection(NamedTuple):
    """``[files]``: which files are verified, and which are not. All paths are absolute and normalised."""

    trusted: tuple[str, ...] = ("/",)
    allowed: tuple[str, ...] = ()
    tmpfs: tuple[str, ...] = ()
    encrypted: tuple[EncryptedVolume, ...] = ()


class Secret(NamedTuple):
    """``[[secrets]]``: a secret fetched after attestation.

    Attributes:
        uri: ``kbs:///repo/type/tag``.
        path: file that receives it, or empty.
        env: environment variable that receives it, or empty. Exactly one of the two is set.
        required: whether the container may not start without it.
    """

    uri: str
    path: str = ""
    env: str = ""
    required: bool = True


class AttestationSection(NamedTuple):
    """``[attestation]``: the relying party.

    Attributes:
        verdictd: its URL, or empty.
        trust_anchor: what its certificate is checked against, or empty.
        policy: the policy id to ask for, or empty.
    """

    verdictd: str = ""
    trust_anchor: str = ""
    policy: str = ""


class ExecSection(NamedTuple):
    """``[exec]``: commands that ``exec`` may start in the enclave.

    Attributes:
        commands: a string is the absolute path of a program with any arguments, or ``*`` for anything; a tuple is an
            exact argument vector.
    """

    commands: tuple[str | tuple[str, ...], ...] = ()


class Manifest(NamedTuple):
    """A complete manifest."""

    enclave: EnclaveSection = EnclaveSection()
    process: ProcessSection = ProcessSection()
    files: FilesSection = FilesSection()
    secrets: tuple[Secret, ...] = ()
    attestation: AttestationSection = AttestationSection()
    exec: ExecSection = ExecSection()

    @classmethod
    def parse(cls, text: str, name: str = "enclave.toml", base: Manifest | None = None) -> Manifest:
        """Read a manifest that a person wrote.

        Args:
            text: TOML.
            name: the file's name, for errors.
            base: what keys that are absent take their values from (by default the schema's defaults); ``process.env``
                is added to the base's, key by key.

        Raises:
            UsageError: not TOML, an unknown key, a wrong type or an impossible value; names file, line and key.
        """
        import tomllib

        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(
                f"{name}: {error}",
                id="enclave.manifest.syntax",
                remedy="correct the file; it is TOML (https://toml.io)",
            ) from None
        try:
            return _build(document, base or cls(), complete=False)
        except _Wrong as wrong:
            raise wrong.usage_error(name, text) from None

    @classmethod
    def from_canonical(cls, data: bytes) -> Manifest:
        """Read the measured form.

        Raises:
            IntegrityError: not the canonical form of a manifest of this schema version.
        """
        import json

        def refuse(found: object) -> IntegrityError:
            return IntegrityError(
                "the stored manifest is damaged",
                id="enclave.manifest.damaged",
                found=found,
                expected=f"a canonical manifest of schema version {SCHEMA}",
                remedy="build the enclave image again with this version of inclavare",
            )

        if len(data) > MAX_CANONICAL:
            raise refuse(f"{len(data)} bytes")
        try:
            document = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise refuse(error) from None
        if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
            raise refuse("another schema version or no manifest")
        try:
            manifest = _build(document, cls(), complete=True)
            canonical = manifest.canonical()
        except _Wrong as wrong:
            raise refuse(f"{wrong.label}: {wrong.problem}") from None
        except InclavareError as error:
            raise refuse(error.message) from None
        if canonical != data:
            raise refuse("it is not in canonical form")
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, every key present."""
        enclave, process, files = self.enclave, self.process, self.files
        return {
            "schema": SCHEMA,
            "enclave": {
                "size": enclave.size,
                "threads": enclave.threads,
                "debug": enclave.debug,
                "isv_prod_id": enclave.isv_prod_id,
                "isv_svn": enclave.isv_svn,
                "tee": list(enclave.tee),
                "runtime": enclave.runtime,
            },
            "process": {
                "args": list(process.args),
                "env": dict(process.env),
                "env_from_host": list(process.env_from_host),
                "args_from_host": process.args_from_host,
                "cwd": process.cwd,
                "user": process.user,
                "hooks": [list(argv) for argv in process.hooks],
            },
            "files": {
                "trusted": list(files.trusted),
                "allowed": list(files.allowed),
                "tmpfs": list(files.tmpfs),
                "encrypted": [{"path": volume.path, "key": volume.key} for volume in files.encrypted],
            },
            "secrets": [
                {
                    "uri": secret.uri,
                    **({"path": secret.path} if secret.path else {"env": secret.env}),
                    "required": secret.required,
                }
                for secret in self.secrets
            ],
            "attestation": {
                "verdictd": self.attestation.verdictd,
                "trust_anchor": self.attestation.trust_anchor,
                "policy": self.attestation.policy,
            },
            "exec": {
                "commands": [entry if isinstance(entry, str) else list(entry) for entry in self.exec.commands],
            },
        }

    def canonical(self) -> bytes:
        """The measured form: RFC 8785 JSON, UTF-8.

        Raises:
            UsageError: the user is not resolved, a string is not Unicode, or the manifest is too large.
        """
        import json

        _ = self.process.ids
        document = self.to_dict()
        try:
            if all(name.isascii() for name in self.process.env):
                # With ASCII keys and integers only, json's sorted compact output is RFC 8785's.
                data = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
            else:
                import rfc8785

                data = rfc8785.dumps(document)
        except ValueError as error:
            raise UsageError(
                "the manifest holds text that is not Unicode", id="enclave.manifest.unicode", found=error
            ) from None
        if len(data) > MAX_CANONICAL:
            raise UsageError(
                "the manifest is too large",
                id="enclave.manifest.size",
                found=f"{len(data)} bytes",
                expected=f"at most {MAX_CANONICAL}",
            )
        return data

    def require_args(self, name: str = "enclave.toml") -> None:
        """Refuse a manifest that says neither what to start nor that the host may choose it.

        Raises:
            UsageError: ``process.args`` is empty.
        """
        if not self.process.args and not self.process.args_from_host:
            raise UsageError(
                f"{name}: process.args is empty and the image names no command",
                id="enclave.manifest.args",
                expected="the argument vector to start, program first",
                remedy='add args = ["/path/to/program", …] under [process]',
            )

    def with_process(self, **changes: Any) -> Manifest:
        """A copy with some of ``[process]`` replaced."""
        return self._replace(process=self.process._replace(**changes))

    def with_enclave(self, **changes: Any) -> Manifest:
        """A copy with some of ``[enclave]`` replaced."""
        return self._replace(enclave=self.enclave._replace(**changes))


# --- reading -----------------------------------------------------------------------------------------------------


class _Wrong(Exception):
    """A key that cannot be accepted; ``path`` leads to it from the document's top."""

    def __init__(self, path: tuple[str | int, ...], problem: str, *, found: object = None, expected: str = "") -> None:
        super().__init__(problem)
        self.path = path
        self.problem = problem
        self.found = found
        self.expected = expected

    @property
    def label(self) -> str:
        text = ""
        for part in self.path:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        return text

    def usage_error(self, name: str, text: str) -> UsageError:
        from .toml_lines import line_of

        line = line_of(text, self.path)
        unknown = self.problem == "unknown key"
        return UsageError(
            f"{name}:{line}: {self.label}: {self.problem}",
            id="enclave.manifest.key" if unknown else "enclave.manifest.value",
            found=self.found,
            expected=self.expected or None,
            remedy="remove the key or correct its name" if unknown else "correct the value",
        )


_Path = tuple[str | int, ...]
_Reader = Callable[[_Path, Any], Any]


def _text(path: _Path, value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong(path, "wrong type", found=_shown(value), expected="a string")
    if "\0" in value:
        raise _Wrong(path, "holds a NUL character", found=_shown(value), expected="a string without NUL")
    return value


def _flag(path: _Path, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(path, "wrong type", found=_shown(value), expected="true or false")
    return value


def _number(low: int, high: int) -> _Reader:
    def read(path: _Path, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _Wrong(path, "wrong type", found=_shown(value), expected=f"a number from {low} to {high}")
        if not low <= value <= high:
            raise _Wrong(path, "out of range", found=value, expected=f"{low} to {high}")
        return value

    return read


def _size(path: _Path, value: Any) -> int:
    try:
        size = parse_size(value)
    except ValueError:
        raise _Wrong(path, "wrong type", found=_shown(value), expected='a size such as "256M" or "1G"') from None
    if size % _PAGE or not 1 << 20 <= size <= 1 << 40:
        raise _Wrong(path, "out of range", found=_shown(value), expected="a multiple of 4096 from 1M to 1T")
    return size


def _list(read: _Reader, what: str) -> _Reader:
    def all_of(path: _Path, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _Wrong(path, "wrong type", found=_shown(value), expected=f"a list of {what}")
        return tuple(read((*path, at), item) for at, item in enumerate(value))

    return all_of


def _path(path: _Path, value: Any) -> str:
    text = _text(path, value)
    parts = text.split("/")
    if not text.startswith("/") or (text != "/" and any(part in ("", ".", "..") for part in parts[1:])):
        raise _Wrong(
            path,
            "not a clean absolute path",
            found=_shown(text),
            expected="an absolute path without '..', '//' or a final '/'",
        )
    if len(parts) > 1 and parts[1] == ".inclavare":
        raise _Wrong(path, "reserved path", found=_shown(text), expected="a path outside /.inclavare")
    return text


def _path_below(path: _Path, value: Any) -> str:
    text = _path(path, value)
    if text == "/":
        raise _Wrong(path, "the whole file system", found="/", expected="a path below /")
    return text


def _env_name(path: _Path, value: Any) -> str:
    text = _text(path, value)
    if not text or "=" in text:
        raise _Wrong(path, "not a variable's name", found=_shown(text), expected="a name without '='")
    return text


def _env(path: _Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Wrong(path, "wrong type", found=_shown(value), expected="a table of strings")
    return {_env_name((*path, name), name): _text((*path, name), item) for name, item in value.items()}


def _argv(path: _Path, value: Any) -> tuple[str, ...]:
    argv: tuple[str, ...] = _list(_text, "strings")(path, value)
    if not argv or not argv[0]:
        raise _Wrong(path, "empty command", found=_shown(value), expected="a program and its arguments")
    return argv


def _hook(path: _Path, value: Any) -> tuple[str, ...]:
    argv = _argv(path, value)
    _path((*path, 0), argv[0])
    return argv


def _command(path: _Path, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, list):
        return _argv(path, value)
    if value == "*":
        return "*"
    if not isinstance(value, str):
        raise _Wrong(
            path, "wrong type", found=_shown(value), expected="an absolute program path, a list of arguments or '*'"
        )
    return _path(path, value)


def _tee(path: _Path, value: Any) -> str:
    from ..tee.base import canonical_name

    try:
        return canonical_name(_text(path, value))
    except UsageError as error:
        raise _Wrong(path, "unknown TEE platform", found=_shown(value), expected=str(error.expected)) from None


def _tees(path: _Path, value: Any) -> tuple[str, ...]:
    tees: tuple[str, ...] = _list(_tee, "TEE platforms")(path, value)
    if not tees:
        raise _Wrong(path, "empty list", expected="one TEE platform or more")
    return tuple(dict.fromkeys(tees))


def _runtime(path: _Path, value: Any) -> str:
    text = _text(path, value)
    if not re.fullmatch(_RUNTIME, text):
        raise _Wrong(
            path, "not a runtime's name", found=_shown(text), expected="an enclave runtime, for example native"
        )
    return text


def _user(path: _Path, value: Any) -> str:
    text = _text(path, value)
    if not text or text != text.strip() or text.count(":") > 1:
        raise _Wrong(
            path, "not a user", found=_shown(value), expected='"uid:gid", "uid:gid,extra" or a name of /etc/passwd'
        )
    if any(number > 0xFFFFFFFE for number in _numeric_ids(text) or ()):
        raise _Wrong(path, "out of range", found=text, expected="ids up to 4294967294")
    return text


def _resource(path: _Path, value: Any) -> str:
    text = _text(path, value)
    if not re.fullmatch(_RESOURCE, text):
        raise _Wrong(path, "not a resource", found=_shown(text), expected="kbs:///repository/type/tag")
    return text


def _volume_key(path: _Path, value: Any) -> str:
    text = _text(path, value)
    if text in _SEALED:
        return text
    if not re.fullmatch(_RESOURCE, text):
        raise _Wrong(
            path, "not a key", found=_shown(text), expected=f"kbs:///repository/type/tag, {' or '.join(_SEALED)}"
        )
    return text


_VOLUME: dict[str, _Reader] = {"path": _path_below, "key": _volume_key}


def _need(path: _Path, fields: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in fields:
            raise _Wrong(path, f"{name} is missing", expected=f"a value for {name}")


def _fields(path: _Path, value: Any, readers: dict[str, _Reader]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(path, "wrong type", found=_shown(value), expected="a table")
    for key in value:
        if key not in readers:
            raise _Wrong((*path, key), "unknown key", expected="one of " + ", ".join(readers))
    return {key: readers[key]((*path, key), item) for key, item in value.items()}


def _volume(path: _Path, value: Any) -> EncryptedVolume:
    fields = _fields(path, value, _VOLUME)
    _need(path, fields, ("path", "key"))
    return EncryptedVolume(**fields)


_SECTIONS: dict[str, dict[str, _Reader]] = {
    "enclave": {
        "size": _size,
        "threads": _number(1, 4096),
        "debug": _flag,
        "isv_prod_id": _number(0, 0xFFFF),
        "isv_svn": _number(0, 0xFFFF),
        "tee": _tees,
        "runtime": _runtime,
    },
    "process": {
        "args": _list(_text, "strings"),
        "env": _env,
        "env_from_host": _list(_env_name, "names"),
        "args_from_host": _flag,
        "cwd": _path,
        "user": _user,
        "hooks": _list(_hook, "argument lists"),
    },
    "files": {
        "trusted": _list(_path, "paths"),
        "allowed": _list(_path_below, "paths"),
        "tmpfs": _list(_path_below, "paths"),
        "encrypted": _list(_volume, "tables"),
    },
    "attestation": {"verdictd": _text, "trust_anchor": _text, "policy": _text},
    "exec": {"commands": _list(_command, "commands")},
}
_SECRET: dict[str, _Reader] = {"uri": _resource, "path": _path_below, "env": _env_name, "required": _flag}


def _secret(path: _Path, value: Any) -> Secret:
    fields = _fields(path, value, _SECRET)
    _need(path, fields, ("uri",))
    if ("path" in fields) == ("env" in fields):
        raise _Wrong(path, "a secret needs exactly one destination", expected="either path or env")
    return Secret(**fields)


def _build(document: dict[str, Any], base: Manifest, *, complete: bool) -> Manifest:
    readers = {*_SECTIONS, "secrets"}
    for key in document:
        if key not in readers:
            raise _Wrong((key,), "unknown key", expected="one of " + ", ".join((*_SECTIONS, "secrets")))
    if complete:
        _need((), document, sorted(readers))
    changes: dict[str, Any] = {}
    for section, known in _SECTIONS.items():
        if section not in document:
            continue
        fields = _fields((section,), document[section], known)
        if complete:
            _need((section,), fields, sorted(known))
        if section == "process" and "env" in fields and not complete:
            fields["env"] = {**base.process.env, **fields["env"]}
        changes[section] = getattr(base, section)._replace(**fields)
    if "secrets" in document:
        changes["secrets"] = _list(_secret, "tables")(("secrets",), document["secrets"])
    return base._replace(**changes)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
