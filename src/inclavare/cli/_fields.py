"""Fields of SGX structures on the command line."""

from __future__ import annotations

from collections.abc import Callable

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
