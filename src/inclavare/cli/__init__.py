"""The ``inclavare`` command: one file per command in this package (see :mod:`inclavare.cli._group`)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ._group import Commands

if TYPE_CHECKING:
    from ..errors import InclavareError


class _Main(Commands):
    """Turns errors into messages and exit codes."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; where ``--json`` was given, wrong usage is told as JSON too."""
        words = [str(word) for word in (args[0] if args else kwargs.get("args") or sys.argv[1:])]
        if "--json" not in words or kwargs.get("standalone_mode") is False:
            return super().main(*args, **kwargs)
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.UsageError as error:
            from ..errors import UsageError
            from ._output import show_error

            command = error.ctx.command_path if error.ctx else "inclavare"
            show_error(UsageError(error.format_message(), id="cli.usage", remedy=f"see {command} --help"), as_json=True)
            sys.exit(UsageError.exit_code)
        except click.Abort:
            click.echo("Aborted!", err=True)
            sys.exit(1)
        sys.exit(result if isinstance(result, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; refusals end with their own exit code (``inclavare --help`` lists them)."""
        from ..errors import InclavareError

        try:
            return super().invoke(ctx)
        except InclavareError as error:
            if ctx.params.get("debug"):
                raise
            from ._output import show_error

            show_error(error, as_json=bool(ctx.meta.get("inclavare.json")))
            ctx.exit(error.exit_code)
        except OSError as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            from ._output import show_error

            known = _from_system(error)
            show_error(known, as_json=bool(ctx.meta.get("inclavare.json")))
            ctx.exit(known.exit_code)
        except (click.exceptions.Exit, click.Abort, click.ClickException, BrokenPipeError, KeyboardInterrupt):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"inclavare: unexpected {type(error).__name__}: {error}", err=True)
            click.echo("  this is a defect; run again with inclavare --debug … and report what it prints", err=True)
            ctx.exit(1)


def _from_system(error: OSError) -> InclavareError:
    """What the kernel refused, with what to do about it."""
    import errno

    from ..errors import PlatformError, ResourceError, UsageError

    what = f"{error.filename or 'a file'} cannot be used"
    if error.errno in (errno.EACCES, errno.EPERM):
        return PlatformError(
            what, id="cli.system.permission", found=error.strerror, remedy="run as root, for example with sudo"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(what, id="cli.system.full", found=error.strerror, remedy="make room on that disk")
    return UsageError(what, id="cli.system.file", found=error.strerror, remedy="correct the path")


@click.group(
    cls=_Main,
    package=__name__,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 1 error, 2 usage, 3 refused by a verifier's policy, 4 bad evidence, 5 something is missing on "
    "this machine, 6 resource used up, 7 integrity, 8 not allowed by the manifest.",
)
@click.version_option(__version__, prog_name="inclavare")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def main(debug: bool) -> None:
    """Confidential containers: ordinary container images inside enclaves."""
    if debug:
        sys.tracebacklimit = 1000
