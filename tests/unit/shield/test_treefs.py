"""The shielded tree over a real FUSE mount: what was measured reads back, and nothing else does."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from inclavare.enclave import tree as tree_format
from inclavare.enclave.tree import BLOCK_SIZE, RESERVED_NAME, Tree, build
from inclavare.shield import mounts
from inclavare.shield.treefs import TreeFs

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse to mount"
)


@contextmanager
def shielded(rootfs: Path, tree: Tree | None = None) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
    """A mount of the tree, and the violations that it reports."""
    reported: list[tuple[str, str]] = []
    faults: list[BaseException] = []
    point = Path(tempfile.mkdtemp(prefix="shield-"))
    root = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY)
    server = TreeFs(
        tree or build(rootfs),
        root,
        on_violation=lambda path, reason: reported.append((path, reason)),
        on_fault=faults.append,
    )
    try:
        server.mount(str(point))
        yield point, reported
    finally:
        mounts.umount(str(point))
        os.close(root)
        point.rmdir()
    assert faults == []


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that ``stat`` and reading show, by path."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(os.fsencode(root)):
        for name in [b".", *names, *files]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content: object = None
            if kind == stat.S_IFREG:
                content = Path(os.fsdecode(path)).read_bytes()
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            relative = os.path.normpath(os.path.relpath(path, os.fsencode(root)))
            size = status.st_size if kind in (stat.S_IFREG, stat.S_IFLNK) else 0
            found[repr(relative)] = (
                status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns, status.st_rdev, content,
            )  # fmt: skip
    return found


# Neither what no file system takes, nor the one name that the measurement leaves out.
names = st.binary(min_size=1, max_size=12).filter(
    lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..", RESERVED_NAME)
)
contents = st.sampled_from([0, 1, 4095, 4096, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE + 5])
entries = st.dictionaries(
    names,
    st.tuples(st.just("f"), contents, st.integers(0, 0o7777))
    | st.tuples(st.just("l"), names, st.just(0))
    | st.tuples(st.just("d"), names, st.integers(0, 0o777))
    | st.tuples(st.just("p"), st.just(0), st.integers(0, 0o777)),
    max_size=8,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(entries)
@example({RESERVED_NAME + b"2": ("d", RESERVED_NAME, 0o755)})
def test_any_tree_reads_back_as_it_was_measured(entries: dict[bytes, tuple[str, object, int]]) -> None:
    rootfs = Path(tempfile.mkdtemp(prefix="tree-"))
    try:
        for number, (name, (kind, value, mode)) in enumerate(entries.items()):
            path = os.path.join(os.fsencode(rootfs), name)
            if kind == "f":
                assert isinstance(value, int)
                with open(path, "wb") as handle:
                    handle.write(random.Random(number).randbytes(value))
            elif kind == "l":
                os.symlink(value, path)  # type: ignore[arg-type]
                continue
            elif kind == "d":
                os.mkdir(path)
                with open(os.path.join(path, value), "wb") as handle:  # type: ignore[arg-type]
                    handle.write(b"inside")
            else:
                os.mkfifo(path)
            os.chown(path, number, number + 1)
            os.chmod(path, mode)
        os.mknod(rootfs / "device-of-the-test", stat.S_IFCHR | 0o600, os.makedev(10, 300))
        with shielded(rootfs) as (point, reported):
            assert snapshot(point) == snapshot(rootfs)
        assert reported == []
    finally:
        shutil.rmtree(rootfs)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[BLOCK_SIZE + 7] ^= 1
    path.write_bytes(data)


def _replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def _replace_parent_by_link(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.symlink_to("moved")


CHANGES: dict[str, Callable[[Path], object]] = {
    "one bit": _flip,
    "cut": lambda path: os.truncate(path, BLOCK_SIZE + 1),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "deleted": lambda path: path.unlink(),
    "a link to the same content": lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
    "a directory": _replace(lambda path: path.mkdir()),
    "a FIFO": _replace(os.mkfifo),
    "a device": _replace(lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))),
    "its directory a link": _replace_parent_by_link,
}


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_changed_file_reads_as_an_error_and_is_reported(tmp_path: Path, change: str) -> None:
    rootfs = tmp_path / "rootfs"
    (rootfs / "d").mkdir(parents=True)
    data = os.urandom(2 * BLOCK_SIZE + 100)
    (rootfs / "d/file").write_bytes(data)
    (rootfs / "d/other").write_bytes(b"untouched")
    tree = build(rootfs)
    CHANGES[change](rootfs / "d/file")
    with shielded(rootfs, tree) as (point, reported):
        before = (point / "d/file").stat()
        assert before.st_size == len(data)
        with pytest.raises(OSError, match="Input/output error") as caught:
            (point / "d/file").read_bytes()
        assert caught.value.errno == errno.EIO
        if change != "its directory a link":
            assert (point / "d/other").read_bytes() == b"untouched"
    assert {path for path, _ in reported} >= {"/d/file"}


def test_a_good_block_of_a_changed_file_still_reads(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(2 * BLOCK_SIZE))
    expected = (tmp_path / "file").read_bytes()[:100]
    tree = build(tmp_path)
    _flip(tmp_path / "file")
    with shielded(tmp_path, tree) as (point, _):
        fd = os.open(point / "file", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(fd, 100, 0) == expected
        with pytest.raises(OSError):
            os.pread(fd, 100, BLOCK_SIZE)
        os.close(fd)


def test_what_is_not_in_the_tree_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    tree = build(tmp_path)
    (tmp_path / "planted").write_bytes(b"x")
    (tmp_path / ".inclavare").mkdir()
    with shielded(tmp_path, tree) as (point, reported):
        assert os.listdir(point) == ["file"]
        for name in ("planted", ".inclavare"):
            assert not (point / name).exists()
        with pytest.raises(OSError, match="Read-only"):
            (point / "new").write_bytes(b"x")
    assert reported == []


@pytest.mark.parametrize("with_digest", [False, True], ids=["its fields", "its fields and its digest"])
def test_a_damaged_tree_file_shows_nothing_that_was_not_measured(tmp_path: Path, with_digest: bool) -> None:
    """The stored node of a file is exchanged for one with another mode; its parents stay as they were measured."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/file").write_bytes(b"x")
    (tmp_path / "other").write_bytes(b"y")
    good = build(tmp_path)
    (tmp_path / "d/file").chmod(0o777)
    other = build(tmp_path)
    index = good.find("/d/file")
    assert index is not None and index == other.find("/d/file")
    start = tree_format._HEADER.size + index * tree_format._RECORD.size
    end = start + (tree_format._RECORD.size if with_digest else tree_format._DIGEST_OFFSET)
    data = bytearray(good.to_bytes())
    data[start:end] = other.to_bytes()[start:end]
    assert data != good.to_bytes()
    forged = Tree(bytes(data), trusted=True)  # past the checksum, which anybody can correct
    forged._verified = False
    forged.verify_root(good.root)
    with shielded(tmp_path, forged) as (point, reported):
        assert (point / "other").read_bytes() == b"y"
        with pytest.raises(OSError, match="Input/output error"):
            (point / "d/file").stat()
    assert reported


def test_concurrent_random_reads(tmp_path: Path) -> None:
    data = os.urandom(20 << 20)
    (tmp_path / "big").write_bytes(data)
    wrong: list[int] = []
    lock = threading.Lock()

    def reader(seed: int) -> None:
        source = random.Random(seed)
        fd = os.open(point / "big", os.O_RDONLY)
        for _ in range(150):
            offset, length = source.randrange(len(data)), source.randrange(1, 300_000)
            if os.pread(fd, length, offset) != data[offset : offset + length]:
                with lock:
                    wrong.append(offset)
        os.close(fd)

    with shielded(tmp_path) as (point, reported), ThreadPoolExecutor(8) as pool:
        list(pool.map(reader, range(8)))
    assert wrong == []
    assert reported == []


def test_large_directories_list_completely(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"a-rather-long-name-for-a-file-{number}").touch()
    with shielded(tmp_path) as (point, _):
        assert sorted(os.listdir(point)) == sorted(os.listdir(tmp_path))
        assert len({entry.inode() for entry in os.scandir(point)}) == 3000
