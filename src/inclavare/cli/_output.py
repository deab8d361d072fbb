"""What commands print: tables and bars on a terminal, plain lines elsewhere, JSON where it is asked for.

Results go to standard output; progress, notes and errors to standard error.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import InclavareError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_F = TypeVar("_F", bound=Callable[..., Any])


def json_option(function: _F) -> _F:
    """The option ``--json`` as parameter ``as_json``; errors become JSON on standard output, too."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        ctx.meta["inclavare.json"] = value
        return value

    # Eager, so that what another option's callback refuses is told as JSON too.
    return click.option("--json", "as_json", is_flag=True, is_eager=True, callback=remember, help="Print JSON.")(
        function
    )


def print_json(value: object) -> None:
    """One JSON document on standard output; bytes as hexadecimal."""
    click.echo(json.dumps(value, indent=2, default=_jsonable, ensure_ascii=False))


def _jsonable(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else str(value)


def print_fields(fields: Iterable[tuple[str, object]], *, title: str = "") -> None:
    """Names and values, aligned."""
    rows = [(name, _text(value)) for name, value in fields]
    width = max((len(name) for name, _ in rows), default=0)
    if title:
        click.secho(title, bold=True)
    for name, value in rows:
        first, *more = value.split("\n")
        click.echo(f"  {name.ljust(width)}  {first}")
        for line in more:
            click.echo(f"  {' ' * width}  {line}")


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """A table; where standard output is no terminal, tab-separated lines without a header."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(_text(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(*headers, title=title or None, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        # Text, because an image's file names must not be read as markup.
        made.add_row(*(Text(_text(cell)) for cell in row))
    Console().print(made)


def printable(name: bytes) -> str:
    """A path of an image for a terminal: no control characters, undecodable bytes as ``\\xNN``."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def size(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def note(text: str) -> None:
    """Something worth knowing, on standard error."""
    click.echo(f"note: {text}", err=True)


def show_error(error: InclavareError, *, as_json: bool) -> None:
    """An error: a message with what was found, what was expected and what to do."""
    if as_json:
        print_json({"error": error.to_dict()})
        return
    click.secho(f"inclavare: {error.message}", fg="red", err=True)
    for label, value in (("found", error.found), ("expected", error.expected), ("remedy", error.remedy)):
        if value is not None:
            click.echo(f"  {label + ':':10}{value}", err=True)
    click.echo(f"  {'id:':10}{error.id}", err=True)


class Steps(AbstractContextManager["Steps"]):
    """Progress of long work: a bar on a terminal, one line per step elsewhere. Safe to call from several threads.

    Implements :class:`inclavare.enclave.oci.Progress`.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Steps:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                DownloadColumn(binary_units=True),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, text: str) -> None:
        """A new step begins."""
        if self._bar is None:
            click.echo(f"{text} …", err=True)
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(text, total=None)

    def total(self, size: int) -> None:
        """The current step will go through this many bytes."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=size)

    def advance(self, size: int) -> None:
        """That many more bytes are done."""
        if self._bar is not None and self._task is not None:
            with self._lock:
                self._bar.advance(self._task, size)
