"""What an enclave image carries in ``/.inclavare/``: the manifest, the file tree and the SIGSTRUCT.

Nothing here is trusted for being there: the manifest and the tree's root are pages of the enclave, and the SIGSTRUCT is
checked by EINIT.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import IntegrityError, ResourceError, UsageError
from .manifest import MAX_CANONICAL, Manifest
from .tree import Tree

DIRECTORY = ".inclavare"
MANIFEST = "manifest.json"
TREE = "tree"
SIGSTRUCT = "sigstruct"
SOURCE = "enclave.toml"
BUILD = "build.json"

SIGSTRUCT_SIZE = 1808
MAX_TREE = 1 << 30
MAX_SOURCE = 1 << 20


class Stored:
    """The contents of ``/.inclavare/``.

    Attributes:
        manifest_json: the canonical manifest.
        tree_bytes: the serialised file tree.
        sigstruct: 1808 bytes, or ``None`` for an image that has not been signed.
        source: ``enclave.toml`` as its author wrote it, informative.
        build: ``build.json``, informative: which inclavare built the image.
    """

    __slots__ = ("_manifest", "_tree", "build", "manifest_json", "sigstruct", "source", "tree_bytes")

    def __init__(
        self, manifest_json: bytes, tree_bytes: bytes, sigstruct: bytes | None, source: bytes = b"", build: bytes = b""
    ) -> None:
        self.manifest_json = manifest_json
        self.tree_bytes = tree_bytes
        self.sigstruct = sigstruct
        self.source = source
        self.build = build
        self._manifest: Manifest | None = None
        self._tree: Tree | None = None

    @property
    def manifest(self) -> Manifest:
        """The parsed manifest.

        Raises:
            IntegrityError: damaged.
        """
        if self._manifest is None:
            self._manifest = Manifest.from_canonical(self.manifest_json)
        return self._manifest

    @property
    def tree(self) -> Tree:
        """The file tree, not yet verified (:meth:`Tree.verify_root`).

        Raises:
            IntegrityError: damaged.
        """
        if self._tree is None:
            self._tree = Tree.from_bytes(self.tree_bytes)
        return self._tree


def read(rootfs: Path | int) -> Stored | None:
    """Read ``/.inclavare/`` of a root file system, following no link.

    Args:
        rootfs: the root directory, as a path or an open descriptor (which stays open).

    Returns:
        ``None`` if the image has no such directory.

    Raises:
        IntegrityError: it is incomplete, has a link or another oddity where a file should be, or is too large.
        UsageError: ``rootfs`` cannot be opened.
    """
    with _directory(rootfs) as root:
        try:
            fd = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _odd(f"/{DIRECTORY}", error.strerror, "a directory") from None
        try:
            manifest = _read(fd, MANIFEST, MAX_CANONICAL)
            tree = _read(fd, TREE, MAX_TREE)
            if manifest is None or tree is None:
                raise _odd(f"/{DIRECTORY}/{MANIFEST if manifest is None else TREE}", "nothing", "a file")
            sigstruct = _read(fd, SIGSTRUCT, SIGSTRUCT_SIZE)
            if sigstruct is not None and len(sigstruct) != SIGSTRUCT_SIZE:
                raise _odd(f"/{DIRECTORY}/{SIGSTRUCT}", f"{len(sigstruct)} bytes", f"{SIGSTRUCT_SIZE} bytes")
            return Stored(
                manifest, tree, sigstruct, _read(fd, SOURCE, MAX_SOURCE) or b"", _read(fd, BUILD, MAX_SOURCE) or b""
            )
        finally:
            os.close(fd)


def write(rootfs: Path | int, stored: Stored) -> None:
    """Write ``/.inclavare/``, replacing what was there; a failure leaves the old contents.

    Raises:
        ResourceError: the disk is full.
        UsageError: ``rootfs`` cannot be opened or written.
    """
    files = {MANIFEST: stored.manifest_json, TREE: stored.tree_bytes}
    if stored.sigstruct is not None:
        files[SIGSTRUCT] = stored.sigstruct
    if stored.source:
        files[SOURCE] = stored.source
    if stored.build:
        files[BUILD] = stored.build
    with _directory(rootfs) as root:
        new, old = f"{DIRECTORY}.new.{os.getpid()}", f"{DIRECTORY}.old.{os.getpid()}"
        try:
            _remove(root, new)
            _remove(root, old)
            os.mkdir(new, 0o755, dir_fd=root)
            fd = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
            try:
                os.fchmod(fd, 0o755)
                for name, content in files.items():
                    _write(fd, name, content)
                os.utime(fd, (0, 0))
            finally:
                os.close(fd)
            with _missing_ok():
                os.rename(DIRECTORY, old, src_dir_fd=root, dst_dir_fd=root)
            os.rename(new, DIRECTORY, src_dir_fd=root, dst_dir_fd=root)
            _remove(root, old)
        except OSError as error:
            with _missing_ok():
                _remove(root, new)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    f"no space left for /{DIRECTORY}",
                    id="enclave.stored.full",
                    found=error.strerror,
                    expected=f"{sum(map(len, files.values()))} bytes",
                    remedy="free some space and try again",
                ) from None
            raise UsageError(
                f"/{DIRECTORY} cannot be written", id="enclave.stored.write", found=error.strerror
            ) from None


@contextmanager
def _directory(rootfs: Path | int) -> Iterator[int]:
    if isinstance(rootfs, int):
        yield rootfs
        return
    try:
        fd = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"{rootfs} cannot be opened",
            id="enclave.stored.rootfs",
            found=error.strerror,
            expected="a root file system directory",
        ) from None
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _missing_ok() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        pass


def _odd(what: str, found: object, expected: object) -> IntegrityError:
    return IntegrityError(
        f"{what} of the image is damaged",
        id="enclave.stored.damaged",
        found=found,
        expected=expected,
        remedy="build the enclave image again, or fetch it again from where it was published",
    )


def _read(directory: int, name: str, limit: int) -> bytes | None:
    from .paths import read_regular

    try:
        # O_NONBLOCK: a FIFO in the image must not hang its reader.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _odd(f"/{DIRECTORY}/{name}", error.strerror, "a regular file") from None
    try:
        return read_regular(fd, f"/{DIRECTORY}/{name}", limit)
    finally:
        os.close(fd)


def _write(directory: int, name: str, content: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=directory)
    with os.fdopen(fd, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fchmod(fd, 0o644)
        # Constant times, so that the same build gives the same layer.
        os.utime(fd, (0, 0))


def _remove(root: int, name: str) -> None:
    """Remove a file, a link or a directory of files; never follows a link."""
    try:
        info = os.stat(name, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(info.st_mode):
        os.unlink(name, dir_fd=root)
        return
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
    try:
        for entry in os.listdir(fd):
            _remove(fd, entry)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=root)
