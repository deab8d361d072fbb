"""Bytes in and out of commands: a file, or standard input and output."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click

from ..errors import UsageError

_PIECE = 1 << 20
#: An output option's or argument's type: a file that may be there or not.
FILE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)

output_option = click.option(
    "-o", "--output", "output_path", type=FILE, help="Where to write it. [default: standard output]"
)


def read_input(path: str | Path, limit: int) -> bytes:
    """A file's bytes, or standard input's for ``-``.

    Args:
        path: its name, as the user gave it.
        limit: bytes that make sense.

    Raises:
        UsageError: it cannot be read, or holds more.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if str(path) == "-" else Path(path).open("rb") as stream:
            # In pieces, for one large read would take memory for the whole limit first.
            data = b"".join(_pieces(stream, limit))
    except OSError as error:
        raise UsageError(f"{name} cannot be read", id="cli.input.file", found=error.strerror) from None
    if len(data) > limit:
        raise UsageError(
            f"{name} is too large", id="cli.input.size", found=f"over {limit} bytes", expected=f"at most {limit} bytes"
        )
    return data


def _pieces(stream: IO[bytes], limit: int) -> Iterator[bytes]:
    left = limit + 1
    while left > 0 and (piece := stream.read(min(left, _PIECE))):
        left -= len(piece)
        yield piece


def write_output(path: Path | None, data: bytes, *, mode: int = 0o600) -> None:
    """Write bytes to a file, which is then complete, or to standard output (``None`` or ``-``).

    Args:
        path: where to.
        data: what.
        mode: permission bits of a new file.

    Raises:
        UsageError: they would make a mess of a terminal.
        OSError: the file cannot be written; it stays as it was.
    """
    if path is None or str(path) == "-":
        if sys.stdout.isatty() and not _harmless(data):
            raise UsageError(
                "binary data are not written to a terminal",
                id="cli.output.terminal",
                remedy="name a file with -o, or send standard output elsewhere",
            )
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    elif path.exists() and not path.is_file():
        path.write_bytes(data)  # a device or a pipe must not be replaced
    else:
        from ..enclave.paths import write_atomically

        write_atomically(path, data, mode)


def _harmless(data: bytes) -> bool:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char in "\n\t" for char in text)
