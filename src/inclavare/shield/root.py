"""The shielded root: measured tree below, encrypted layer above, joined by overlayfs.

All of it is mounted in the runelet's own mount namespace; the host sees three empty directories.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..enclave.tree import Tree
from ..errors import ResourceError
from . import mounts
from .encrypted import EncryptedDirectory
from .treefs import TreeFs


@dataclass(frozen=True, slots=True)
class Places:
    """Directories of one container, all made by :meth:`make`.

    Attributes:
        base: the container's directory under ``run_dir``.
        cipher: the encrypted layer's ciphertext on disk.
    """

    base: Path
    cipher: Path

    @property
    def tree(self) -> Path:
        """Mount point of the verified tree."""
        return self.base / "tree"

    @property
    def layer(self) -> Path:
        """Mount point of the encrypted layer."""
        return self.base / "layer"

    @property
    def root(self) -> Path:
        """Mount point of the joined root file system, the container's ``root.path``."""
        return self.base / "root"

    @property
    def attestation(self) -> Path:
        """Mount point of ``/dev/attestation``."""
        return self.base / "attestation"

    @property
    def volumes(self) -> Path:
        """Holds a mount point for each encrypted volume."""
        return self.base / "volumes"

    def make(self) -> None:
        """Create the directories, mode 0700.

        Raises:
            ResourceError: the disk is full or read-only.
        """
        try:
            for place in (self.tree, self.layer, self.root, self.attestation, self.volumes, self.cipher):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"cannot make {error.filename}: {error.strerror}",
                id="shield.root.directory",
                remedy="make room on the disk, or set state_dir and run_dir in /etc/inclavare/config.toml",
            ) from None


def join(places: Places, layer: EncryptedDirectory, mode: int, owner: tuple[int, int]) -> None:
    """Mount the overlay once tree and layer are there.

    Args:
        places: see :class:`Places`.
        layer: the encrypted layer, possibly still starting.
        mode: the root directory's permission bits.
        owner: the root directory's uid and gid.

    Raises:
        ResourceError: the layer or the overlay could not be mounted.
    """
    layer.wait()
    upper, work = places.layer / "upper", places.layer / "work"
    try:
        upper.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        os.chown(upper, *owner)
        upper.chmod(mode)
        mounts.mount(
            "inclavare-root",
            str(places.root),
            "overlay",
            0,
            f"lowerdir={_escape(places.tree)},upperdir={_escape(upper)},workdir={_escape(work)}",
        )
    except OSError as error:
        raise ResourceError(
            f"the shielded root could not be mounted: {error.strerror}",
            id="shield.root.overlay",
            remedy="see dmesg; overlayfs and FUSE must be in this kernel",
        ) from None


def _escape(path: Path) -> str:
    """Overlayfs separates layers by colons and options by commas."""
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


@dataclass(slots=True)
class ShieldedRoot:
    """A mounted shielded root."""

    places: Places
    tree: TreeFs
    layer: EncryptedDirectory

    @classmethod
    def mount(
        cls,
        places: Places,
        tree: Tree,
        contents: int,
        layer: EncryptedDirectory,
        *,
        on_violation: Callable[[str, str], None],
        on_fault: Callable[[BaseException], None],
    ) -> ShieldedRoot:
        """Serve the tree, join it with the layer.

        Args:
            places: directories, made.
            tree: its root digest has been checked.
            contents: file descriptor of the host's directory with the files' contents.
            layer: started.
            on_violation: see :class:`~inclavare.shield.treefs.TreeFs`.
            on_fault: likewise.

        Raises:
            ResourceError: something could not be mounted.
        """
        server = TreeFs(tree, contents, on_violation=on_violation, on_fault=on_fault)
        try:
            server.mount(str(places.tree))
        except OSError as error:
            raise ResourceError(
                f"the measured tree could not be mounted: {error.strerror}",
                id="shield.tree.mount",
                remedy="load the fuse module and make sure that /dev/fuse exists (inclavare doctor)",
            ) from None
        top = tree.node(0)
        join(places, layer, top.mode, (top.uid, top.gid))
        return cls(places, server, layer)

    def unmount(self) -> None:
        """Take everything apart, top first. Idempotent."""
        for point in mounts.mounted_below(str(self.places.root)):
            mounts.umount(point)
        self.layer.stop()
        mounts.umount(str(self.places.tree))
