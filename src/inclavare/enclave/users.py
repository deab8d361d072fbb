"""Resolving an image's ``User`` by the image's own ``/etc/passwd`` and ``/etc/group``."""

from __future__ import annotations

from ..errors import UsageError
from .paths import read_in_root

#: An image's account files larger than this are refused.
_LIMIT = 4 << 20


def resolve(root_fd: int, user: str) -> str:
    """Numeric form of a user, as container engines resolve it.

    Args:
        root_fd: the image's root directory; the account files are never looked up outside it.
        user: empty, ``name``, ``uid``, ``name:group``, ``uid:gid`` or already ``uid:gid,extra,…``.

    Returns:
        ``uid:gid`` or ``uid:gid,extra,…``. Where no group is given it is the user's own, with the groups that name
        the user as member; a uid without an account gets group 0.

    Raises:
        UsageError: a name that the image does not know.
        IntegrityError: an account file is not a regular file inside the image.
    """
    name, colon, group = user.partition(":")
    name = name or "0"
    accounts = _lines(root_fd, "/etc/passwd", 4)
    by_name = next((fields for fields in accounts if fields[0] == name), None)
    number = _number(name)
    account = by_name or next(
        (fields for fields in accounts if number is not None and _number(fields[2]) == number), None
    )
    if account is not None:
        uid = _number(account[2])
        if uid is None:
            raise _unknown("/etc/passwd", f"a malformed entry for {name!r}")
    elif number is not None:
        uid = number
    else:
        raise _unknown("/etc/passwd", f"no user {name!r}")
    if colon and group:
        first, *extra = group.split(",")
        ids = [_group(root_fd, first), *(_group(root_fd, part) for part in extra)]
        return f"{uid}:{','.join(map(str, ids))}"
    if account is None:
        return f"{uid}:0"
    gid = _number(account[3])
    if gid is None:
        raise _unknown("/etc/passwd", f"a malformed entry for {name!r}")
    extras = sorted(
        {
            member_of
            for fields in _lines(root_fd, "/etc/group", 4)
            if account[0] in fields[3].split(",") and (member_of := _number(fields[2])) is not None
        }
        - {gid}
    )
    return f"{uid}:{','.join(map(str, [gid, *extras]))}"


def _group(root_fd: int, name: str) -> int:
    for fields in _lines(root_fd, "/etc/group", 3):
        number = _number(fields[2])
        if fields[0] == name and number is not None:
            return number
    number = _number(name)
    if number is None:
        raise _unknown("/etc/group", f"no group {name!r}")
    return number


def _number(text: str) -> int | None:
    if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= 0xFFFFFFFE:
        return int(text)
    return None


def _lines(root_fd: int, path: str, least: int) -> list[list[str]]:
    content = read_in_root(root_fd, path, _LIMIT) or b""
    rows = [line.strip().split(":") for line in content.decode(errors="surrogateescape").splitlines()]
    return [row for row in rows if len(row) >= least and row[0]]


def _unknown(file: str, found: str) -> UsageError:
    return UsageError(
        "the process's user cannot be resolved",
        id="enclave.users.unknown",
        found=f"{found} in the image's {file}",
        expected="a user and group that the image knows, or numbers",
        remedy='correct [process] user in enclave.toml, for example user = "1000:1000"',
    )
