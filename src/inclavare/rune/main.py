"""Entry point: read the command line as runc does, find out whether an enclave is meant, forward if not."""

from __future__ import annotations

import os
import sys

from . import low_level, settings

TYPE_CHECKING = False  # the typing module costs 3 ms here
if TYPE_CHECKING:
    from typing import Any

#: Global options of runc (and crun) that take a value.
VALUE_OPTIONS = {"--root", "--log", "--log-format", "--criu", "--rootless", "--cgroup-manager"}
FLAG_OPTIONS = {"--debug", "--systemd-cgroup"}

#: Options of ``create``, ``run`` and ``restore`` that take a value, runc's and crun's together.
CREATE_VALUES = {"--bundle", "-b", "--console-socket", "--pid-file", "--preserve-fds", "--config", "-f"}

#: Commands whose first positional argument is a container id → options that take a value.
COMMANDS: dict[str, set[str]] = {
    "create": CREATE_VALUES,
    "run": CREATE_VALUES,
    "start": set(),
    "state": set(),
    "kill": set(),
    "delete": {"--regex"},
    "exec": {
        "--console-socket", "--cwd", "--env", "-e", "--user", "-u", "--additional-gids", "-g", "--process", "-p",
        "--pid-file", "--process-label", "--apparmor", "--cap", "-c", "--preserve-fds", "--cgroup", "--console",
    },
    "ps": {"--format", "-f"},
    "pause": set(),
    "resume": set(),
    "update": {
        "--resources", "-r", "--blkio-weight", "--cpu-period", "--cpu-quota", "--cpu-share", "--cpu-rt-period",
        "--cpu-rt-runtime", "--cpuset-cpus", "--cpuset-mems", "--kernel-memory", "--kernel-memory-tcp", "--memory",
        "--memory-reservation", "--memory-swap", "--pids-limit", "--l3-cache-schema", "--mem-bw-schema",
        "--cpu-burst", "--cpu-idle",
    },
    "events": {"--interval"},
    "checkpoint": {"--image-path", "--work-path", "--parent-path", "--manage-cgroups-mode", "--empty-ns",
                   "--page-server", "--status-fd"},
    "restore": CREATE_VALUES | {"--image-path", "--work-path", "--manage-cgroups-mode", "--empty-ns", "--lsm-profile",
                                "--lsm-mount-context"},
}  # fmt: skip
OTHER_COMMANDS = {"list", "spec", "features", "help"}
#: One option in two spellings: whichever is given last counts.
_ALIASES = {"--bundle": "-b", "--config": "-f", "--env": "-e", "--user": "-u", "--process": "-p", "--cap": "-c",
            "--additional-gids": "-g"}  # fmt: skip
_ALIASES |= {short: name for name, short in _ALIASES.items()}
_SHORT_FLAGS = frozenset("adfqt")
#: What differs for a container that is known to be an enclave; the rest is the low-level runtime's as it is.
ALTERED = {"create", "run", "state", "exec", "delete", "checkpoint", "restore"}


class Call:
    """One invocation, split but not changed.

    Attributes:
        root: ``--root``, absolute.
        log: ``--log``, absolute, or ``None``.
        log_format: ``text`` or ``json``.
        options: the other global options as given (``--log`` among them).
        command: the command's name, empty if none was given.
        rest: everything after the command.
        values: the command's value options, the last of each.
        given: the command's value options in their order, repetitions included.
        flags: the command's other options.
        positional: what remains; the container id first.
        usage_error: what is wrong with the line, if anything is.
        config_path: the configuration of an ordinary container that is to be created.
        oci_version: the runtime-spec version that it says.
        unclear: an option is not known here or is abbreviated, so that the low-level runtime may take another word for
            the container id.
    """

    __slots__ = (
        "command",
        "config_path",
        "flags",
        "given",
        "log",
        "log_format",
        "oci_version",
        "options",
        "positional",
        "rest",
        "root",
        "unclear",
        "usage_error",
        "values",
    )

    def __init__(self, argv: list[str]) -> None:
        self.root = "/run/rune"
        if os.geteuid() != 0 and "XDG_RUNTIME_DIR" in os.environ:
            self.root = os.environ["XDG_RUNTIME_DIR"] + "/rune"
        self.log: str | None = None
        self.log_format = "text"
        self.options: list[str] = []
        self.command = ""
        self.rest: list[str] = []
        self.values: dict[str, str] = {}
        self.given: list[tuple[str, str]] = []
        self.flags: set[str] = set()
        self.positional: list[str] = []
        self.usage_error = ""
        self.unclear = False
        self.config_path: str | None = None
        self.oci_version: object = None
        self._globals(argv)
        if self.command in COMMANDS:
            self._command(COMMANDS[self.command])

    @property
    def container(self) -> str | None:
        """The container id, if the command names one."""
        return self.positional[0] if self.positional else None

    def _globals(self, argv: list[str]) -> None:
        index = 0
        while index < len(argv):
            word = argv[index]
            index += 1
            if word == "--" and index < len(argv):
                word = argv[index]
                index += 1
                self.command, self.rest = word, argv[index:]
                return
            if not word.startswith("-"):
                self.command, self.rest = word, argv[index:]
                return
            if word in ("-h", "--help", "-v", "--version", "-V"):
                self.command, self.rest = word.lstrip("-"), argv[index:]
                return
            name, equals, value = word.partition("=")
            if name.startswith("-") and not name.startswith("--"):
                name = "-" + name  # runc's option parser takes -root as --root
            if name in VALUE_OPTIONS:
                if not equals:
                    if index == len(argv):
                        self.usage_error = f"option {name} needs a value"
                        return
                    value = argv[index]
                    index += 1
                self._global(name, value)
            elif name in FLAG_OPTIONS:
                if value.lower() not in ("false", "f", "0"):
                    self.options.append(name)
            else:
                self.usage_error = f"unknown option {word}"
                return

    def _global(self, name: str, value: str) -> None:
        if name == "--root":
            # One directory is one state, by whatever links it is reached.
            self.root = os.path.realpath(value)
            return
        if name == "--log":
            if value.startswith("file:"):
                value = value[5:]
            if ":" not in value or value.startswith("/"):
                value = os.path.abspath(value)  # enclave containers are created from another directory
            self.log = value
        elif name == "--log-format":
            self.log_format = value
        self.options += [name, value]

    def _command(self, with_value: set[str]) -> None:
        index = 0
        while index < len(self.rest):
            word = self.rest[index]
            index += 1
            if word == "--":
                self.positional += self.rest[index:]
                return
            if not word.startswith("-") or word == "-":
                self.positional.append(word)
                if self.command in ("exec", "kill"):
                    self.positional += self.rest[index:]
                    return
                continue
            name, equals, value = word.partition("=")
            if name in with_value:
                if not equals:
                    if index == len(self.rest):
                        self.usage_error = f"option {name} needs a value"
                        return
                    value = self.rest[index]
                    index += 1
                self._value(name, value)
            elif not name.startswith("--") and name[:2] in with_value:
                self._value(name[:2], word[2:])
                self.unclear = self.unclear or f"-{name}" in with_value
            else:
                self.flags.add(word)
                self.unclear = self.unclear or word.startswith("--") or not _SHORT_FLAGS.issuperset(word[1:])

    def _value(self, name: str, value: str) -> None:
        self.values.pop(_ALIASES.get(name, ""), None)
        self.values[name] = value
        self.given.append((name, value))


def read_config(path: str) -> object:
    """The bundle's configuration; ``None`` if it cannot be read, so that the slow path says why.

    CPython's own JSON scanner is used without the ``json`` package, whose import costs more than the whole parse.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            chunks = []
            while chunk := os.read(fd, 1 << 20):
                chunks.append(chunk)
        finally:
            os.close(fd)
        text = b"".join(chunks).decode()
    except (OSError, UnicodeDecodeError):
        return None
    try:
        from _json import make_scanner

        scanner: Any = make_scanner(_Scanner)  # type: ignore[arg-type]
    except (ImportError, TypeError, AttributeError):
        from json import JSONDecoder

        scanner = JSONDecoder().scan_once  # type: ignore[attr-defined]
    # JSON's white space; str.lstrip would take Unicode's.
    start = len(text) - len(text.lstrip(" \t\n\r"))
    try:
        value, end = scanner(text, start)
    except (StopIteration, ValueError, SystemError, RecursionError):  # the bare scanner reports some errors oddly
        return None
    return value if not text[end:].strip(" \t\n\r") else None


class _Scanner:
    """What ``_json.make_scanner`` reads its settings from."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo: dict[str, str] = {}  # noqa: RUF012


def wants_enclave(config: object, bundle: str) -> bool:
    """Whether a bundle asks for an enclave: environment, annotation, or an image that was built as an enclave image.

    A configuration of a wrong shape is answered with yes: the slow path refuses it with a clear error, whereas a
    lenient low-level runtime would skip the part that asked for the enclave.
    """
    if not isinstance(config, dict):
        return True
    try:
        for entry in (config.get("process") or {}).get("env") or ():
            if entry.startswith("ENCLAVE_TYPE="):
                return True
        annotations = config.get("annotations") or {}
        if annotations.get("enclave.type"):
            return True
        root = config.get("root")
        if root is None or root.get("path") is None:
            return False  # the low-level runtime says that it is missing
        rootfs = root["path"]
        if not rootfs.startswith("/"):
            rootfs = f"{bundle}/{rootfs}"
        return "\0" in rootfs or os.path.lexists(f"{rootfs}/.inclavare/manifest.json")
    except (AttributeError, TypeError):
        return True


def quote(root: str) -> str:
    """A file name that stands for a ``--root`` directory, one to one."""
    return root.replace("%", "%25").replace("/", "%2F")


def enclave_directory(run_dir: str, root: str, container: str) -> str:
    """Where rune keeps what it knows of an enclave container."""
    return f"{run_dir}/enclaves/{quote(root)}/{container}"


def is_safe_id(container: str) -> bool:
    """Whether an id can be a file name (crun and runc check theirs themselves)."""
    return container not in ("", ".", "..") and "/" not in container and "\0" not in container


def config_file(call: Call, bundle: str) -> str:
    """The file that ``create`` and ``run`` read; crun takes its default name from the bundle even where it is given."""
    name = call.values.get("--config") or call.values.get("-f") or "config.json"
    return f"{bundle}/config.json" if name == "config.json" else name


def concerns_enclave(call: Call, run_dir: str) -> bool:
    """Whether the slow path has to handle this call."""
    if call.usage_error or call.command not in COMMANDS:
        return call.command != "spec"
    container = call.container
    if container is None:
        return call.command in ("create", "run")  # says which argument is missing
    if call.command == "events" or not is_safe_id(container):
        return True  # crun has no events
    if call.command not in ALTERED:
        return False
    if call.command in ("create", "run"):
        bundle = call.values.get("--bundle") or call.values.get("-b") or "."
        name = config_file(call, bundle)
        config = read_config(name)
        if wants_enclave(config, bundle):
            return True
        call.config_path, call.oci_version = name, config.get("ociVersion")  # type: ignore[attr-defined]
    # Which word the low-level runtime will take for the id is not certain where an option is unclear.
    words = call.rest if call.unclear else [container]
    return any(is_safe_id(word) and os.path.lexists(enclave_directory(run_dir, call.root, word)) for word in words)


def main(site_packages: str | None = None) -> None:
    """Run one command and leave the process.

    Args:
        site_packages: where third-party packages are, for a launcher that started Python without them.
    """
    call = Call(sys.argv[1:])
    try:
        run_dir, setting = settings.load()
        if not concerns_enclave(call, run_dir):
            path = low_level.select(setting, call.root, call.container)
            rest = call.rest
            if call.config_path is not None:
                rest = low_level.with_known_version(path, call.config_path, call.oci_version, rest)
            argv = low_level.arguments(path, call.root, call.options, [call.command, *rest])
            os.execv(path, argv)
    except low_level.NoRuntimeError as error:
        from .report import fail

        fail(call, str(error))
    except OSError as error:
        from .report import fail

        fail(call, f"{error} [rune.forward.failed]")
    except Exception as error:
        from .report import fail, one_line

        fail(call, one_line(error))
    if site_packages is not None and site_packages not in sys.path:
        sys.path.append(site_packages)
    from .dispatch import dispatch

    dispatch(call)


def console_main() -> None:
    """Entry point of the ordinary console script; the launcher is quicker (:mod:`inclavare.rune.launcher`)."""
    main()
