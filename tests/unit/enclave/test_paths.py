"""Opening files of an image without leaving it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from inclavare.enclave.paths import (
    full_disk,
    open_beneath,
    open_in_root,
    read_in_root,
    write_atomically,
)
from inclavare.errors import IntegrityError


@pytest.fixture
def image(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    yield root, fd
    os.close(fd)


@pytest.mark.parametrize(
    "target", ["../../../../../../../../secret", "/secret", "{top}/secret", "/proc/self/root{top}/secret"]
)
def test_no_link_leads_out(image: tuple[Path, int], tmp_path: Path, target: str) -> None:
    root, fd = image
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to(target.format(top=tmp_path))
    assert (read_in_root(fd, "/etc/passwd") or b"") != b"outside"
    (root / "secret").write_text("the image's own")
    assert read_in_root(fd, "/etc/passwd") in (None, b"the image's own")


def test_dots_stop_at_the_root(image: tuple[Path, int]) -> None:
    _, fd = image
    assert read_in_root(fd, "../../etc/passwd") == b"inside"


def test_absolute_links_resolve_inside(image: tuple[Path, int]) -> None:
    root, fd = image
    (root / "usr").symlink_to("/etc")
    assert read_in_root(fd, "/usr/passwd") == b"inside"


def test_magic_links_are_refused(image: tuple[Path, int]) -> None:
    root, fd = image
    # The image's own /proc could be a directory of links that look like the kernel's; only the kernel's jump.
    (root / "loop").symlink_to("loop")
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_in_root(fd, "/loop")
    proc = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(OSError) as caught:
            open_in_root(proc, "/proc/self/root/etc")
        assert caught.value.errno == errno.ELOOP
    finally:
        os.close(proc)


def test_missing_is_none(image: tuple[Path, int]) -> None:
    _, fd = image
    assert read_in_root(fd, "/etc/group") is None
    assert read_in_root(fd, "/etc/passwd/below") is None


def test_only_small_regular_files(image: tuple[Path, int]) -> None:
    root, fd = image
    os.mkfifo(root / "etc/group")
    with pytest.raises(IntegrityError, match="not a regular file"):
        read_in_root(fd, "/etc/group")
    with pytest.raises(IntegrityError, match="not a regular file"):
        read_in_root(fd, "/etc")
    with pytest.raises(IntegrityError, match="too large"):
        read_in_root(fd, "/etc/passwd", limit=5)
    assert read_in_root(fd, "/etc/passwd", limit=6) == b"inside"


def test_beneath_takes_no_links(image: tuple[Path, int]) -> None:
    root, fd = image
    (root / "usr").symlink_to("etc")
    os.close(open_beneath(fd, b"etc/passwd"))
    for path, code in ((b"usr/passwd", errno.ELOOP), (b"etc/../../root", errno.EXDEV), (b"/etc/passwd", errno.EXDEV)):
        with pytest.raises(OSError) as caught:
            open_beneath(fd, path)
        assert caught.value.errno == code


def test_descriptors_are_close_on_exec(image: tuple[Path, int]) -> None:
    _, fd = image
    opened = open_in_root(fd, "/etc/passwd")
    assert not os.get_inheritable(opened)
    os.close(opened)


def test_a_null_byte_is_an_error(image: tuple[Path, int]) -> None:
    with pytest.raises(OSError):
        open_in_root(image[1], "etc\0/passwd")


def test_atomic_write_leaves_nothing_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"one", 0o600)
    assert target.stat().st_mode & 0o777 == 0o600
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/x").touch()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "directory", b"two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


def test_a_full_disk_has_a_remedy() -> None:
    error = full_disk("/x", OSError(errno.ENOSPC, "No space left on device"))
    assert error.exit_code == 6
    assert "TMPDIR" in (error.remedy or "")
