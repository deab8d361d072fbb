"""Names, checked where they enter: everything behind trusts them."""

from __future__ import annotations

import json
import re
from typing import Any

import rfc8785

from .errors import Invalid

#: The tenant that the service itself acts as: its audit trail and its tokens. No tenant can be called so.
SYSTEM = "_system"

MAX_SECRET = 1 << 20
MAX_POLICY = 1 << 20
MAX_BUNDLE = 4 << 20
MAX_EVIDENCE = 1 << 20
MAX_DETAIL = 64 << 10
MAX_CLAIMS = 256 << 10
MAX_METADATA = 4 << 10

_TENANT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")
_IDENTIFIER = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._@+-]{0,127})?")
_HEX = re.compile(r"[0-9a-f]{2,128}")


def tenant(name: str, *, system: bool = False) -> str:
    """A tenant's name: a DNS label in lower case, 1 to 63 characters.

    Args:
        system: let :data:`SYSTEM` pass, too.

    Raises:
        Invalid: another name.
    """
    if (system and name == SYSTEM) or _TENANT.fullmatch(name):
        return name
    raise _bad("tenant", name, "1 to 63 of a-z, 0-9 and -, neither first nor last a -")


def path(value: str) -> str:
    """A secret's path ``repo/type/tag``, each part 1 to 128 of ``A-Za-z0-9._-``, no dot first or last.

    Raises:
        Invalid: another path.
    """
    parts = value.split("/")
    if len(parts) == 3 and all(map(_SEGMENT.fullmatch, parts)):
        return value
    raise _bad("path", value, "repo/type/tag, each of them 1 to 128 letters, digits and ._-, no dot at either end")


def identifier(value: str, what: str) -> str:
    """An id of a policy or signer, an actor or a token's name: 1 to 128 of ``A-Za-z0-9._@+-``, no sign first.

    Raises:
        Invalid: another one.
    """
    if _IDENTIFIER.fullmatch(value):
        return value
    raise _bad(what, value, "1 to 128 letters, digits and ._@+-, a letter, digit or _ first")


def version(number: int) -> int:
    """A version's number to look for; one that no column can hold becomes 0, which there is not."""
    return number if 0 < number < 1 << 31 else 0


def digest(value: str, what: str) -> str:
    """A digest in lower-case hexadecimal, 1 to 64 bytes.

    Raises:
        Invalid: something else.
    """
    if _HEX.fullmatch(value) and len(value) % 2 == 0:
        return value
    raise _bad(what, value, "a digest, hexadecimal in lower case")


def text(value: str, what: str, limit: int, *, least: int = 0) -> str:
    """Text without control characters.

    Args:
        limit: characters.

    Raises:
        Invalid: too short or too long, or with a control character or half a surrogate pair.
    """
    if least <= len(value) <= limit and value.isprintable():
        return value
    raise _bad(what, value, f"{least} to {limit} printable characters")


def size(value: bytes, what: str, limit: int) -> bytes:
    """Bytes, not more than a limit; their content is in no message.

    Raises:
        Invalid: too many.
    """
    if len(value) <= limit:
        return value
    raise Invalid(
        f"the {what} is too large",
        id=f"verdict.store.{what}.size",
        found=f"{len(value)} bytes",
        expected=f"at most {limit} bytes",
    )


def canonical(value: Any, what: str, limit: int) -> str:
    """JSON in its canonical form (RFC 8785).

    Args:
        limit: bytes.

    Raises:
        Invalid: not JSON (a float that is no number, an integer beyond 2^53, another type), or too large.
    """
    try:
        encoded = rfc8785.dumps(value)
        document = encoded.decode()
        # 2.0**53 is written as an integer that is not taken back: what is stored must stand a second reading.
        rfc8785.dumps(json.loads(document))
    except (rfc8785.CanonicalizationError, UnicodeError, RecursionError) as error:
        raise Invalid(
            f"the {what} cannot be written as canonical JSON",
            id=f"verdict.store.{what}.json",
            found=type(error).__name__,
            expected="strings, booleans, null, integers up to 2^53, finite floats, lists and objects",
        ) from None
    size(encoded, what, limit)
    return document


def _bad(what: str, found: str, expected: str) -> Invalid:
    return Invalid(
        f"not a {what} that the store takes", id=f"verdict.store.{what}.name", found=repr(found[:80]), expected=expected
    )
