"""Fields of SGX structures on the command line, and binary results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click


def number(bits: int) -> Callable[[str], int]:
    """An option's type: an unsigned number of so many bits, decimal or with ``0x``."""

    def convert(text: str) -> int:
        try:
            found = int(text, 0)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a number") from None
        if not 0 <= found < 1 << bits:
            raise click.BadParameter(f"{text} does not fit into {bits} bits")
        return found

    convert.__name__ = "number"
    return convert


def hexadecimal(size: int) -> Callable[[str], bytes]:
    """An option's type: so many bytes in hexadecimal."""

    def convert(text: str) -> bytes:
        try:
            found = bytes.fromhex(text)
        except ValueError:
            found = b""
        if len(found) != size:
            raise click.BadParameter(f"{text!r} is not {size} bytes in hexadecimal")
        return found

    convert.__name__ = "hex"
    return convert


def write_binary(content: bytes, output: Path | None) -> None:
    """Bytes to a file, or to standard output unless that is a terminal.

    Raises:
        UsageError: it is a terminal, or the file cannot be written.
    """
    from ..errors import UsageError

    if output is not None and str(output) != "-":
        from ..enclave.paths import write_atomically

        try:
            write_atomically(output, content)
        except OSError as error:
            raise UsageError(f"{output} cannot be written", id="cli.output", found=error.strerror) from None
        return
    if sys.stdout.isatty():
        raise UsageError(
            "binary data is not written to a terminal",
            id="cli.output",
            found=f"{len(content)} bytes",
            remedy="name a file with -o, or redirect the output",
        )
    sys.stdout.buffer.write(content)
