"""The measured file tree: what it covers, its bytes, and what damage does to them."""

from __future__ import annotations

import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import recompute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inclavare.enclave.tree import BLOCK_SIZE, MAX_DEPTH, RESERVED_NAME, DigestCache, Tree, build, content_root
from inclavare.errors import IntegrityError, ResourceError, UsageError

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="changing owners and making devices needs root")


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    (root / "bin").mkdir(parents=True)
    (root / "etc").mkdir()
    (root / "empty").mkdir()
    (root / "bin/app").write_bytes(b"\x7fELF" + bytes(3 * BLOCK_SIZE))
    (root / "bin/app").chmod(0o755)
    (root / "bin/sh").symlink_to("app")
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (root / "etc/nothing").touch()
    (root / "etc/a-b").write_text("sorts between")
    (root / "etc/a").mkdir()
    (root / "etc/a/z").write_text("ä")
    os.mkfifo(root / "fifo")
    return root


# --- what it covers


def test_agrees_with_the_documented_format(rootfs: Path) -> None:
    assert build(rootfs).root == recompute.tree_root(rootfs)


@root_only
def test_agrees_with_the_documented_format_for_devices_and_owners(rootfs: Path) -> None:
    os.mknod(rootfs / "null", 0o020666, os.makedev(1, 3))
    os.mknod(rootfs / "loop", 0o060660, os.makedev(259, 70000))
    os.chown(rootfs / "bin/sh", 70000, 4, follow_symlinks=False)
    tree = build(rootfs)
    assert tree.root == recompute.tree_root(rootfs)
    found = tree.find("/loop")
    assert found is not None
    assert tree.node(found).rdev == (259, 70000)


def _flip(path: Path) -> None:
    with path.open("r+b") as handle:
        handle.seek(2 * BLOCK_SIZE + 17)
        handle.write(b"\x01")


CHANGES: dict[str, Callable[[Path], object]] = {
    "one byte": lambda root: _flip(root / "bin/app"),
    "one mode bit": lambda root: (root / "bin/app").chmod(0o754),
    "a setuid bit": lambda root: (root / "bin/app").chmod(0o4755),
    "the mode of the root": lambda root: root.chmod(0o711),
    "a link's target": lambda root: ((root / "bin/sh").unlink(), (root / "bin/sh").symlink_to("apq")),
    "a link in place of a file": lambda root: ((root / "etc/a-b").unlink(), (root / "etc/a-b").symlink_to("passwd")),
    "a new empty file": lambda root: (root / "new").touch(),
    "a file removed": lambda root: (root / "etc/nothing").unlink(),
    "a file renamed": lambda root: (root / "etc/a-b").rename(root / "etc/a-c"),
    "a zero byte appended": lambda root: (root / "etc/nothing").write_bytes(b"\0"),
    "a file moved up": lambda root: (root / "etc/a/z").rename(root / "etc/z"),
    "a directory removed": lambda root: (root / "empty").rmdir(),
    "a file in place of a FIFO": lambda root: ((root / "fifo").unlink(), (root / "fifo").touch()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_another_root(rootfs: Path, change: str) -> None:
    before = build(rootfs).root
    CHANGES[change](rootfs)
    assert build(rootfs).root != before


@root_only
@pytest.mark.parametrize(("uid", "gid"), [(1, -1), (-1, 1)])
def test_an_owner_is_another_root(rootfs: Path, uid: int, gid: int) -> None:
    before = build(rootfs).root
    os.chown(rootfs / "etc/passwd", uid, gid)
    assert build(rootfs).root != before


def test_times_are_carried_but_not_measured(rootfs: Path) -> None:
    before = build(rootfs)
    os.utime(rootfs / "etc/passwd", ns=(5, 1_234_567_890_123_456_789))
    after = build(rootfs)
    assert after.root == before.root
    index = after.find("/etc/passwd")
    assert index is not None
    assert after.node(index).mtime_ns == 1_234_567_890_123_456_789


def test_what_the_enclave_stores_about_itself_is_left_out_only_at_the_top(rootfs: Path) -> None:
    before = build(rootfs)
    (rootfs / ".inclavare").mkdir()
    (rootfs / ".inclavare/tree").write_bytes(before.to_bytes())
    assert build(rootfs).root == before.root
    (rootfs / "etc/.inclavare").mkdir()
    assert build(rootfs).root != before.root


def test_links_are_not_followed(rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (rootfs / "out").symlink_to(tmp_path / "outside")
    (rootfs / "up").symlink_to("../..")
    before = build(rootfs)
    (tmp_path / "outside/file").write_text("not of the image")
    after = build(rootfs)
    assert after.root == before.root
    assert after.find("/out/file") is None


def test_only_trusted_paths_exist(rootfs: Path) -> None:
    tree = build(rootfs, trusted=("/etc/a", "/bin"))
    assert {path for path, _ in tree.walk()} == {
        b"/",
        b"/bin",
        b"/bin/app",
        b"/bin/sh",
        b"/etc",
        b"/etc/a",
        b"/etc/a/z",
    }
    before = tree.root
    (rootfs / "etc/passwd").write_text("changed, but not covered")
    assert build(rootfs, trusted=("/etc/a", "/bin")).root == before
    assert build(rootfs, trusted=("/etc/a/z", "/etc/a", "/bin", "/bin/app")).root == before


def test_allowed_paths_are_not_measured(rootfs: Path) -> None:
    allowed = ("/etc/a", "/etc/passwd", "/not/there")
    tree = build(rootfs, allowed=allowed)
    paths = {path for path, _ in tree.walk()}
    assert b"/etc/a" in paths and b"/etc/a/z" not in paths and b"/etc/passwd" not in paths
    (rootfs / "etc/a/z").write_text("changed")
    (rootfs / "etc/passwd").write_text("changed")
    assert build(rootfs, allowed=allowed).root == tree.root


def test_content_root_depends_on_the_size_and_not_only_on_blocks() -> None:
    assert content_root(1, bytes(32)) != content_root(2, bytes(32))


@pytest.mark.parametrize("size", [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 8 * BLOCK_SIZE, 9 * BLOCK_SIZE + 5])
def test_block_boundaries(tmp_path: Path, size: int) -> None:
    root = tmp_path / "r"
    root.mkdir()
    (root / "f").write_bytes(os.urandom(size))
    tree = build(root)
    assert tree.root == recompute.tree_root(root)
    assert len(tree.node(1).blocks) == 32 * -(-size // BLOCK_SIZE)


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    root = tmp_path / "r"
    root.mkdir()
    name = b"caf\xe9\n"
    with open(os.fsencode(root) + b"/" + name, "wb") as handle:
        handle.write(b"x")
    os.symlink(b"\xff\xfe", os.fsencode(root) + b"/link")
    tree = Tree.from_bytes(build(root).to_bytes())
    tree.verify_root(recompute.tree_root(root))
    assert set(tree.node(0).children) == {name, b"link"}
    assert tree.node(tree.node(0).children[b"link"]).target == b"\xff\xfe"


# --- wrong inputs


def test_a_missing_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be measured"):
        build(tmp_path / "missing")


def test_too_deep_is_refused(tmp_path: Path) -> None:
    here = tmp_path / "r"
    here.mkdir()
    fd = os.open(here, os.O_RDONLY)
    for _ in range(MAX_DEPTH + 1):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceError, match="nested too deeply"):
        build(here)
    assert len(os.listdir("/proc/self/fd")) == opened
    shutil.rmtree(here)


@root_only
def test_another_file_system_below_is_refused(rootfs: Path) -> None:
    import subprocess

    if subprocess.run(["mount", "-t", "tmpfs", "none", rootfs / "empty"], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        with pytest.raises(UsageError, match="another file system is mounted at /empty"):
            build(rootfs)
    finally:
        subprocess.run(["umount", rootfs / "empty"], check=True)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "r"
    root.mkdir()
    (root / "log").write_bytes(bytes(6 << 20))

    def grow(_: int) -> None:
        with (root / "log").open("ab") as handle:
            handle.write(b"more")

    with pytest.raises(IntegrityError, match="changed while it was measured"):
        build(root, progress=grow)


def test_an_unreadable_file_is_refused(rootfs: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (rootfs / "etc/passwd").chmod(0)
    with pytest.raises(UsageError, match="etc/passwd cannot be measured"):
        build(rootfs)


def test_progress_counts_every_byte(rootfs: Path) -> None:
    done: list[int] = []
    totals: list[int] = []
    build(rootfs, progress=done.append, total=totals.append)
    size = sum(path.stat().st_size for path in rootfs.rglob("*") if path.is_file() and not path.is_symlink())
    assert sum(done) == size == totals[0]


# --- reading


def test_nothing_comes_out_of_an_unverified_tree(rootfs: Path) -> None:
    tree = Tree.from_bytes(build(rootfs).to_bytes())
    with pytest.raises(IntegrityError, match="has not been compared"):
        tree.node(0)
    with pytest.raises(IntegrityError, match="not the measured one"):
        tree.verify_root(bytes(32))
    with pytest.raises(IntegrityError):
        tree.child(0, b"bin")


def test_round_trip(rootfs: Path) -> None:
    made = build(rootfs)
    read = Tree.from_bytes(made.to_bytes())
    read.verify_root(made.root)
    assert list(read.walk()) == list(made.walk())
    read.check()
    bin_ = read.child(0, b"bin")
    assert bin_ is not None and read.child(bin_, b"nothing") is None
    app = read.child(bin_, b"app")
    assert app is not None
    node = read.node(app)
    assert (node.kind, node.mode, node.size, len(node.blocks)) == ("f", 0o755, 3 * BLOCK_SIZE + 4, 4 * 32)
    assert read.find("/bin/app") == app
    assert read.find("/bin/app/below") is None


def _recrc(data: bytearray) -> bytes:
    data[32:36] = zlib.crc32(data[36:], zlib.crc32(data[:32])).to_bytes(4, "little")
    return bytes(data)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    root = tmp_path_factory.mktemp("sample")
    (root / "dir").mkdir()
    (root / "dir/file").write_bytes(b"content")
    (root / "dir/link").symlink_to("file")
    (root / "other").write_bytes(bytes(BLOCK_SIZE + 1))
    os.mkfifo(root / "pipe")
    return build(root)


def _see_everything(data: bytes, root: bytes) -> list[object]:
    tree = Tree.from_bytes(data)
    tree.verify_root(root)
    # Times are not measured.
    return [(path, node._replace(mtime_ns=0)) for path, node in tree.walk()]


def test_every_flipped_byte_is_noticed(sample: Tree) -> None:
    data = sample.to_bytes()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x40
        with pytest.raises(IntegrityError):
            Tree.from_bytes(bytes(damaged))


def test_every_byte_flipped_by_someone_who_corrects_the_checksum(sample: Tree) -> None:
    """Either the damage is refused, or it touches nothing but a time or a byte that is not looked at."""
    data = sample.to_bytes()
    expected = _see_everything(data, sample.root)
    unnoticed = 0
    for at in range(len(data)):
        for bit in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[at] ^= bit
            try:
                seen = _see_everything(_recrc(damaged), sample.root)
            except IntegrityError:
                continue
            assert seen == expected
            unnoticed += 1
    # Times and padding of 6 records, and the root's own unused name: a small part.
    assert unnoticed <= 2 * 6 * 20


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_truncated_or_prolonged(sample: Tree, data: st.DataObject) -> None:
    raw = sample.to_bytes()
    cut = (
        raw[: data.draw(st.integers(0, len(raw) - 1))]
        if data.draw(st.booleans())
        else raw + data.draw(st.binary(min_size=1, max_size=100))
    )
    with pytest.raises(IntegrityError):
        Tree.from_bytes(cut)


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_noise_never_crashes(noise: bytes) -> None:
    with pytest.raises(IntegrityError):
        _see_everything(_recrc(bytearray(b"INCLTREE\x01\0\0\0" + noise.ljust(40, b"\0"))), bytes(32))


_name = st.binary(min_size=1, max_size=12).filter(lambda name: not {0, 47} & set(name) and name not in (b".", b".."))
_content = st.one_of(st.binary(max_size=40), st.sampled_from([0, 3]).map(lambda rest: bytes(BLOCK_SIZE + rest)))
_entry = st.recursive(
    st.one_of(st.tuples(st.just("file"), _content), st.tuples(st.just("link"), _name)),
    lambda below: st.tuples(st.just("dir"), st.dictionaries(_name, below, max_size=4)),
    max_leaves=12,
)


def _make(path: bytes, entry: object, mode: int) -> None:
    kind, value = entry  # type: ignore[misc]
    if kind == "file":
        with open(path, "wb") as handle:
            handle.write(value)
        os.chmod(path, mode | 0o600)
    elif kind == "link":
        os.symlink(value, path)
    else:
        os.mkdir(path)
        for name, below in value.items():
            _make(path + b"/" + name, below, mode)


@given(st.dictionaries(_name.filter(lambda name: name != RESERVED_NAME), _entry, max_size=5), st.integers(0, 0o777))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_round_trips_and_agrees(tmp_path: Path, entries: dict[bytes, object], mode: int) -> None:
    root = tmp_path / "any"
    shutil.rmtree(root, ignore_errors=True)
    _make(os.fsencode(root), ("dir", entries), mode)
    made = build(root)
    assert made.root == recompute.tree_root(root)
    read = Tree.from_bytes(made.to_bytes())
    read.verify_root(made.root)
    assert list(read.walk()) == list(made.walk())


def _record(kind: str, first: int, count: int, digest: bytes, name: tuple[int, int] = (0, 0)) -> bytes:
    return struct.pack("<BxHIIIIIQqQ32s", ord(kind), 0o755, 0, 0, *name, count, 0, 0, first, digest)


def test_a_directory_cannot_contain_itself() -> None:
    """A cycle needs no digest to be refused: the records' order forbids it."""
    body = _record("d", 0, 1, bytes(32), (0, 1))
    data = bytearray(struct.pack("<8sIIQQII", b"INCLTREE", 1, 1, 1, 0, 0, 0) + body + b"a")
    with pytest.raises(IntegrityError, match="entries lie outside"):
        _see_everything(_recrc(data), bytes(32))


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b"])
def test_names_that_could_lead_elsewhere_are_refused(name: bytes) -> None:
    body = _record("d", 1, 1, bytes(32)) + _record("p", 0, 0, bytes(32), (0, len(name)))
    data = bytearray(struct.pack("<8sIIQQII", b"INCLTREE", 1, 2, len(name), 0, 0, 0) + body + name)
    with pytest.raises(IntegrityError, match="impossible entry"):
        _see_everything(_recrc(data), bytes(32))


def test_threads_share_a_tree(sample: Tree) -> None:
    tree = Tree.from_bytes(sample.to_bytes())
    tree.verify_root(sample.root)
    seen: list[int] = []
    workers = [threading.Thread(target=lambda: seen.append(len(list(tree.walk())))) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [len(sample)] * 8


# --- the digest cache


def _settle(root: Path) -> None:
    """Make every file's last change old enough for the cache to trust it."""
    newest = max(path.lstat().st_ctime_ns for path in root.rglob("*"))
    while time.time_ns() < newest + 150_000_000:
        time.sleep(0.01)


def test_a_warm_cache_hashes_nothing_and_notices_changes(rootfs: Path, tmp_path: Path) -> None:
    _settle(rootfs)
    first = build(rootfs, cache=DigestCache(tmp_path / "cache"))
    hashed: list[int] = []
    assert build(rootfs, cache=DigestCache(tmp_path / "cache"), progress=hashed.append).root == first.root
    assert hashed == []
    stamp = (rootfs / "bin/app").stat()
    _flip(rootfs / "bin/app")
    os.utime(rootfs / "bin/app", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    # Same size, same modification time: ctime gives the change away.
    changed = build(rootfs, cache=DigestCache(tmp_path / "cache"))
    assert changed.root == recompute.tree_root(rootfs) != first.root


def test_files_that_just_changed_are_not_cached(rootfs: Path, tmp_path: Path) -> None:
    (rootfs / "bin/app").write_bytes(b"fresh")
    cache = DigestCache(tmp_path / "cache")
    build(rootfs, cache=cache)
    info = (rootfs / "bin/app").stat()
    assert cache.get((info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)) is None


@pytest.mark.parametrize("damage", [b"", b"noise", None, b"inclavare.digests.v1\0\0\0\0\0"])
def test_a_damaged_cache_is_an_empty_one(rootfs: Path, tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "cache"
    _settle(rootfs)
    first = build(rootfs, cache=DigestCache(path))
    good = path.read_bytes()
    path.write_bytes(good[:-5] + b"xxxxx" if damage is None else damage)
    assert build(rootfs, cache=DigestCache(path)).root == first.root
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_no_error(rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _settle(rootfs)
    assert build(rootfs, cache=DigestCache(tmp_path / "file/cache")).root == build(rootfs).root
