"""How images, root file systems and bundles are named on a command line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from . import stored

TRANSPORTS = ("oci", "oci-archive", "docker-archive", "docker", "docker-daemon", "containers-storage")
_FORMS = "oci:DIR[:TAG], docker-archive:FILE[:NAME], docker://REGISTRY/NAME, docker-daemon:NAME:TAG or a directory"


@dataclass(frozen=True, slots=True)
class Reference:
    """An image, a root file system or an OCI bundle, as named on a command line.

    Attributes:
        kind: ``image``, ``rootfs`` or ``bundle``.
        text: as given.
        transport: of an image, one of :data:`TRANSPORTS`.
        path: of a directory, or of an image's layout or archive.
        tag: rest of an image's name.
    """

    kind: str
    text: str
    transport: str = ""
    path: Path = Path()
    tag: str = ""

    @classmethod
    def parse(cls, text: str, *, destination: bool = False) -> Reference:
        """Read a command line argument.

        Args:
            text: the argument.
            destination: whether the directory that it may name need not exist.

        Raises:
            UsageError: it names no image.
        """
        if "\0" in text:
            raise _not_image(repr(text), "a NUL character", _FORMS)
        transport, colon, rest = text.partition(":")
        if colon and transport in TRANSPORTS:
            if transport == "docker" and not rest.startswith("//"):
                raise _not_image(text, "docker: without //", "docker://REGISTRY/NAME")
            if not rest.strip("/"):
                raise _not_image(text, "no name", _FORMS)
            if transport in ("oci", "oci-archive", "docker-archive"):
                path, _, tag = rest.partition(":")
                return cls("image", text, transport, Path(path), tag)
            return cls("image", text, transport, tag=rest.removeprefix("//"))
        where = Path(text)
        if destination:
            if where.exists() and not where.is_dir():
                raise _not_image(text, "a file", _FORMS)
            if not where.exists() and colon:
                raise _not_image(text, f"unknown transport {transport!r}", _FORMS)
            return cls("rootfs", text, path=where)
        return cls(_directory_kind(where, text), text, path=where)

    @property
    def registry(self) -> str:
        """Host of a ``docker://`` image, else empty."""
        return self.tag.partition("/")[0].rpartition("@")[2] if self.transport == "docker" else ""


def _not_image(text: str, found: str, expected: str, remedy: str | None = None) -> UsageError:
    return UsageError(
        f"{text} is not an image", id="enclave.oci.reference", found=found, expected=expected, remedy=remedy
    )


def _directory_kind(path: Path, text: str) -> str:
    try:
        names = set(os.listdir(path))
    except FileNotFoundError:
        raise _not_image(
            text,
            "no such directory",
            _FORMS,
            f"for an image of the local docker write docker-daemon:{text}" if "/" not in text else None,
        ) from None
    except NotADirectoryError:
        raise _not_image(text, "a file", _FORMS, f"for an archive write docker-archive:{text}") from None
    except OSError as error:
        raise UsageError(
            f"{text} cannot be read",
            id="enclave.oci.unreadable",
            found=error.strerror,
            remedy="run as a user who may read it (usually root)",
        ) from None
    if "oci-layout" in names:
        raise _not_image(text, "an OCI layout", _FORMS, f"write oci:{text}")
    if "config.json" in names:
        return "bundle"
    if not names - {stored.DIRECTORY}:
        raise _not_image(text, "an empty directory", "a root file system")
    return "rootfs"
