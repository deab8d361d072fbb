"""What is not plainly forwarded: enclave containers, and what the low-level runtime lacks or would show wrongly."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from ..config import Config
from ..config import load as load_config
from ..errors import InclavareError, PlatformError, UsageError
from . import low_level
from .main import ALTERED, COMMANDS, OTHER_COMMANDS, enclave_directory, is_safe_id
from .report import fail, one_line

if TYPE_CHECKING:
    from pathlib import Path

    from .main import Call

#: Commands with a file of their own: command → module.
_MODULES = {
    "create": "create",
    "run": "create",
    "exec": "exec",
    "state": "state",
    "delete": "delete",
    "list": "list",
    "events": "events",
    "features": "features",
    "checkpoint": "checkpoint",
    "restore": "checkpoint",
    "help": "help",
    "h": "help",
    "version": "help",
    "v": "help",
    "V": "help",
    "": "help",
}


def dispatch(call: Call) -> NoReturn:
    """Run one command; errors go where container engines look for them."""
    # A runtime ends on SIGINT and SIGTERM as any program does; the guard takes back what was begun.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        if call.usage_error:
            raise UsageError(call.usage_error, id="rune.usage", remedy="see rune --help")
        if call.command not in COMMANDS and call.command not in OTHER_COMMANDS and call.command not in _MODULES:
            raise UsageError(f"unknown command {call.command!r}", id="rune.usage", remedy="see rune --help")
        if call.command in COMMANDS:
            check_id(call)
        module = _MODULES.get(call.command)
        if module is None:
            forward(call, load_config())
        if call.unclear and call.command in ALTERED and not os.path.lexists(directory_of(call, load_config())):
            _refuse_unclear(call)
        import_module(f".{module}", __package__).run(call)
    except InclavareError as error:
        fail(call, one_line(error), exit_code=error.exit_code)
    except low_level.NoRuntimeError as error:
        fail(call, str(error), exit_code=PlatformError.exit_code)
    except Exception as error:
        fail(call, f"{one_line(error)} [rune.fault]")
    os._exit(0)


def _refuse_unclear(call: Call) -> None:
    """Another word than the one taken for the id names an enclave: what the low-level runtime would do is uncertain."""
    run_dir = str(load_config().run_dir)
    for word in call.rest:
        if is_safe_id(word) and os.path.lexists(enclave_directory(run_dir, call.root, word)):
            raise UsageError(
                f"it is not clear whether {call.command} is for the enclave container {word}",
                id="rune.usage",
                remedy=f"write options in full, as rune {call.command} --help shows them, and values as --option=value",
            )


def check_id(call: Call) -> str:
    """The container id.

    Raises:
        UsageError: it is missing, or could name a file elsewhere.
    """
    container = call.container
    if container is None:
        raise UsageError(
            f"{call.command} needs a container id", id="rune.usage", remedy=f"see rune {call.command} --help"
        )
    if not is_safe_id(container) or len(container) > 200:
        raise UsageError(
            "not a container id",
            id="rune.id.malformed",
            found=repr(container[:80]),
            expected="1 to 200 characters without a slash, not . or ..",
            remedy="choose another id",
        )
    return container


def directory_of(call: Call, config: Config) -> Path:
    """Where rune keeps what it knows of the container."""
    from pathlib import Path

    return Path(enclave_directory(str(config.run_dir), call.root, check_id(call)))


def forward(call: Call, config: Config, rest: list[str] | None = None) -> NoReturn:
    """Become the low-level runtime."""
    path = low_level.select(config.low_level, call.root, call.container)
    argv = low_level.arguments(path, call.root, call.options, [call.command, *(call.rest if rest is None else rest)])
    os.execv(path, argv)


def low_level_status(call: Call, config: Config, words: list[str], *, quiet: bool = False) -> int:
    """Run the low-level runtime with these words in a child process; returns its exit code.

    Args:
        call: whose global options are passed on.
        config: the node's configuration.
        words: command and arguments.
        quiet: standard streams and log go nowhere.
    """
    child = os.fork()
    if child == 0:
        try:
            if quiet:
                null = os.open("/dev/null", os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(null, fd)
            path = low_level.select(config.low_level, call.root, call.container)
            os.execv(path, low_level.arguments(path, call.root, [] if quiet else call.options, words))
        except BaseException as error:
            os.write(2, f"rune: {error}\n".encode())
        finally:
            os._exit(127)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def low_level_output(call: Call, config: Config, words: list[str]) -> tuple[int, bytes]:
    """Like :func:`low_level_status`, with standard output returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(writer, 1)
            path = low_level.select(config.low_level, call.root, call.container)
            os.execv(path, low_level.arguments(path, call.root, call.options, words))
        except BaseException as error:
            os.write(2, f"rune: {error}\n".encode())
        finally:
            os._exit(127)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        data = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), data


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    import json

    os.write(1, (json.dumps(document, indent=2) + "\n").encode())
