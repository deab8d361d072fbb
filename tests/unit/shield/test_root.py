"""The joined root file system, and the mount helpers below it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from inclavare.enclave.tree import build
from inclavare.errors import ResourceError
from inclavare.shield import mounts
from inclavare.shield.encrypted import EncryptedDirectory
from inclavare.shield.root import Places, ShieldedRoot
from inclavare.shield.secrets import Secret

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse to mount"
)

#: Names that mountinfo and overlayfs write in their own ways.
ODD = ["plain", "a:b,c", "with space", "back\\slash", "ü", "tab\tnewline\n", "\\134"]


@pytest.fixture
def clean(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for point in mounts.mounted_below(str(tmp_path)):
        mounts.umount(point)


@pytest.mark.parametrize("name", [*ODD, os.fsdecode(b"not-utf8-\xff")], ids=ascii)
def test_mount_points_are_found_whatever_their_names(clean: Path, name: str) -> None:
    outer = clean / name
    outer.mkdir()
    mounts.mount("tmpfs", str(outer), "tmpfs", 0)
    (outer / "inner").mkdir()
    mounts.mount("tmpfs", str(outer / "inner"), "tmpfs", 0)
    (clean / f"{name}x").mkdir()
    mounts.mount("tmpfs", str(clean / f"{name}x"), "tmpfs", 0)
    assert list(mounts.mounted_below(str(outer))) == [str(outer / "inner"), str(outer)]
    for point in mounts.mounted_below(str(outer)):
        mounts.umount(point)
    assert list(mounts.mounted_below(str(clean))) == [str(clean / f"{name}x")]
    mounts.umount(str(outer))  # not mounted: no error
    mounts.umount(str(clean / "nowhere"))


def test_mount_errors_say_what_where_and_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mount tmpfs on .*nowhere"):
        mounts.mount("tmpfs", str(tmp_path / "nowhere"), "tmpfs", 0)


@pytest.mark.skipif(shutil.which("gocryptfs") is None, reason="needs gocryptfs")
@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_what_is_written_lies_encrypted_above_the_tree(clean: Path, name: str) -> None:
    rootfs = clean / "rootfs"
    (rootfs / "d").mkdir(parents=True)
    (rootfs / "d/file").write_text("measured")
    rootfs.chmod(0o751)
    os.chown(rootfs, 7, 8)
    tree = build(rootfs)
    places = Places(clean / name / "base", clean / name / "cipher")
    places.make()
    places.make()
    contents = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY)
    violations: list[str] = []
    faults: list[BaseException] = []
    layer = EncryptedDirectory.start(places.cipher, places.layer, Secret(os.urandom(32)))
    root = ShieldedRoot.mount(
        places, tree, contents, layer, on_violation=lambda path, _: violations.append(path), on_fault=faults.append
    )
    try:
        status = places.root.stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o751, 7, 8)
        assert (places.root / "d/file").read_text() == "measured"
        (places.root / "d/file").write_text("changed by the application")
        (places.root / "new").write_text("new")
        assert (places.root / "d/file").read_text() == "changed by the application"
        assert (rootfs / "d/file").read_text() == "measured" and not (rootfs / "new").exists()
        written = [path for path in places.cipher.rglob("*") if path.is_file()]
        assert len(written) >= 2
        assert not [path for path in written if b"changed by" in path.read_bytes() or path.name in ("new", "file")]
    finally:
        root.unmount()
        os.close(contents)
    root.unmount()
    assert list(mounts.mounted_below(str(clean))) == []
    assert not Path(f"/proc/{layer.pid}").exists()
    assert (violations, faults) == ([], [])


def test_directories_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError) as caught:
        Places(tmp_path / "file" / "base", tmp_path / "cipher").make()
    assert caught.value.remedy
