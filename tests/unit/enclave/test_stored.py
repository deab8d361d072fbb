"""``/.inclavare/``: written whole or not at all, read without trusting its shape."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inclavare.enclave import stored
from inclavare.enclave.manifest import Manifest
from inclavare.enclave.stored import Stored
from inclavare.enclave.tree import build
from inclavare.errors import IntegrityError, ResourceError, UsageError


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    root = tmp_path / "r"
    root.mkdir()
    (root / "file").write_text("x")
    return root


@pytest.fixture
def contents(rootfs: Path) -> Stored:
    return Stored(Manifest().canonical(), build(rootfs).to_bytes(), bytes(1808), b"# mine", b"{}")


def test_round_trip(rootfs: Path, contents: Stored) -> None:
    assert stored.read(rootfs) is None
    stored.write(rootfs, contents)
    found = stored.read(rootfs)
    assert found is not None
    for name in ("manifest_json", "tree_bytes", "sigstruct", "source", "build"):
        assert getattr(found, name) == getattr(contents, name)
    assert found.manifest == Manifest()
    assert found.tree.root == build(rootfs).root
    fd = os.open(rootfs, os.O_RDONLY)
    assert stored.read(fd) is not None
    os.close(fd)


def test_writing_replaces_everything(rootfs: Path, contents: Stored) -> None:
    stored.write(rootfs, contents)
    (rootfs / ".inclavare/left-over").mkdir()
    stored.write(rootfs, Stored(contents.manifest_json, contents.tree_bytes, None))
    assert sorted(os.listdir(rootfs / ".inclavare")) == ["manifest.json", "tree"]
    assert sorted(os.listdir(rootfs)) == [".inclavare", "file"]
    found = stored.read(rootfs)
    assert found is not None and found.sigstruct is None


def test_the_same_contents_give_the_same_files(rootfs: Path, contents: Stored) -> None:
    stored.write(rootfs, contents)
    for path in (rootfs / ".inclavare", *(rootfs / ".inclavare").iterdir()):
        assert path.stat().st_mtime_ns == 0
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def test_writing_never_follows_a_link(rootfs: Path, contents: Stored, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (rootfs / ".inclavare").symlink_to(tmp_path / "elsewhere")
    stored.write(rootfs, contents)
    assert os.listdir(tmp_path / "elsewhere") == []
    assert not (rootfs / ".inclavare").is_symlink()


def test_reading_never_follows_a_link(rootfs: Path, contents: Stored, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    stored.write(other, contents)
    (rootfs / ".inclavare").symlink_to(other / ".inclavare")
    with pytest.raises(IntegrityError, match="damaged"):
        stored.read(rootfs)
    (rootfs / ".inclavare").unlink()
    stored.write(rootfs, contents)
    (rootfs / ".inclavare/tree").unlink()
    (rootfs / ".inclavare/tree").symlink_to(other / ".inclavare/tree")
    with pytest.raises(IntegrityError, match="damaged"):
        stored.read(rootfs)


@pytest.mark.parametrize("name", ["manifest.json", "tree"])
def test_incomplete(rootfs: Path, contents: Stored, name: str) -> None:
    stored.write(rootfs, contents)
    (rootfs / ".inclavare" / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        stored.read(rootfs)


@pytest.mark.parametrize("name", ["manifest.json", "tree", "sigstruct", "enclave.toml", "build.json"])
def test_a_fifo_or_directory_in_a_files_place(rootfs: Path, contents: Stored, name: str) -> None:
    stored.write(rootfs, contents)
    path = rootfs / ".inclavare" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(IntegrityError, match="not a regular file"):
        stored.read(rootfs)
    path.unlink()
    path.mkdir()
    with pytest.raises(IntegrityError, match="not a regular file"):
        stored.read(rootfs)


@pytest.mark.parametrize("size", [0, 1807, 1809])
def test_a_sigstruct_of_another_size(rootfs: Path, contents: Stored, size: int) -> None:
    stored.write(rootfs, contents)
    (rootfs / ".inclavare/sigstruct").write_bytes(bytes(size))
    with pytest.raises(IntegrityError, match="sigstruct"):
        stored.read(rootfs)


def test_a_sparse_giant_is_not_read(rootfs: Path, contents: Stored) -> None:
    stored.write(rootfs, contents)
    os.truncate(rootfs / ".inclavare/manifest.json", 1 << 40)
    with pytest.raises(IntegrityError, match="too large"):
        stored.read(rootfs)


def test_no_such_root(tmp_path: Path, contents: Stored) -> None:
    with pytest.raises(UsageError, match="cannot be opened"):
        stored.read(tmp_path / "missing")
    with pytest.raises(UsageError, match="cannot be opened"):
        stored.write(tmp_path / "missing", contents)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_old_contents(tmp_path: Path, rootfs: Path, contents: Stored) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        stored.write(small, contents)
        with pytest.raises(ResourceError, match="no space left"):
            stored.write(small, Stored(contents.manifest_json, bytes(1 << 20), None))
        assert os.listdir(small) == [".inclavare"]
        found = stored.read(small)
        assert found is not None and found.tree_bytes == contents.tree_bytes
    finally:
        subprocess.run(["umount", small], check=True)
