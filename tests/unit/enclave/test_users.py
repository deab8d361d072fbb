"""Users by the image's own account files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inclavare.enclave.users import resolve
from inclavare.errors import IntegrityError, UsageError

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
app:x:1000:1001::/:/bin/sh
# comment
broken:x:what:1::/:
1234:x:55:56::/:
"""
GROUP = """\
root:x:0:
app:x:1001:
docker:x:27:someone,app
video:x:7:app
app2:x:8:app2
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


@pytest.fixture
def resolved(root: Path) -> Iterator[Callable[[str], str]]:
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    yield lambda user: resolve(fd, user)
    os.close(fd)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "0:0"),
        ("root", "0:0"),
        ("app", "1000:1001,7,27"),
        ("1000", "1000:1001,7,27"),
        ("app:docker", "1000:27"),
        ("app:99", "1000:99"),
        ("4711", "4711:0"),
        ("4711:4712", "4711:4712"),
        ("4711:4712,27,docker", "4711:4712,27,27"),
        ("1234", "55:56"),  # a name of digits is a name first
    ],
)
def test_resolves_as_container_engines_do(resolved: Callable[[str], str], user: str, expected: str) -> None:
    assert resolved(user) == expected


@pytest.mark.parametrize("user", ["nobody", "app:nogroup", "broken", "-1", "99999999999"])
def test_unknown_names_are_refused(resolved: Callable[[str], str], user: str) -> None:
    with pytest.raises(UsageError, match="cannot be resolved") as caught:
        resolved(user)
    assert "/etc/" in str(caught.value.found)


def test_without_account_files(root: Path, resolved: Callable[[str], str]) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/group").unlink()
    assert resolved("0") == "0:0"
    with pytest.raises(UsageError):
        resolved("root")


def test_the_hosts_accounts_are_never_read(root: Path, resolved: Callable[[str], str]) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("/../../../../etc/passwd")
    with pytest.raises((UsageError, IntegrityError)):
        resolved("daemon")


def test_a_fifo_does_not_hang(root: Path, resolved: Callable[[str], str]) -> None:
    (root / "etc/passwd").unlink()
    os.mkfifo(root / "etc/passwd")
    with pytest.raises(IntegrityError, match="not a regular file"):
        resolved("app")
