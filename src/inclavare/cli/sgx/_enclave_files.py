"""Enclaves as files: .sgxs streams, shared objects of Intel's SDK, Gramine manifests."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import UsageError
from .._output import Steps

if TYPE_CHECKING:
    from ...sgx.image import EnclaveImage
    from ...sgx.structs import Sigstruct

libpal_option = click.option(
    "--libpal",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Gramine's libpal.so, for a Gramine manifest.",
)


@dataclass(slots=True)
class EnclaveFile:
    """One enclave.

    Attributes:
        path: the file.
        kind: ``sgxs``, ``sdk`` or ``gramine``.
        sigstruct: from within the file or from beside it.
        sigstruct_path: where it was found.
        libpal: Gramine's loader, for a manifest.
    """

    path: Path
    kind: str
    sigstruct: Sigstruct | None = None
    sigstruct_path: Path | None = None
    libpal: Path | None = None

    def image(self) -> EnclaveImage:
        """Its pages, in memory.

        Raises:
            InclavareError: the file is damaged.
        """
        from ...sgx.structs import ATTRIBUTE_INIT, ATTRIBUTE_MODE64BIT, XFRM_LEGACY, Attributes

        if self.kind == "sdk":
            from ...sgx.sdk import SdkEnclave

            return SdkEnclave(self.path.read_bytes()).image()
        if self.kind == "gramine":
            from ...enclave import gramine

            assert self.libpal is not None
            manifest = self.path.read_bytes()
            gramine.require_hashes(manifest)
            return gramine.image(manifest, self.libpal.read_bytes())
        from ...sgx import sgxs

        signed = self.sigstruct
        named = (
            Attributes(ATTRIBUTE_MODE64BIT, XFRM_LEGACY) if signed is None else Attributes.from_bytes(signed.attributes)
        )
        with self.path.open("rb") as file:
            return sgxs.read(
                file,
                attributes=named.flags & ~ATTRIBUTE_INIT,
                xfrm=named.xfrm,
                miscselect=0 if signed is None else signed.miscselect,
            )

    def measure(self, steps: Steps) -> bytes:
        """MRENCLAVE, 32 bytes; a stream is never in memory as a whole.

        Args:
            steps: told about the bytes of pages that there are, and that are done.

        Raises:
            InclavareError: the file is damaged.
        """
        from ...sgx.image import PAGE_SIZE

        if self.kind == "sgxs":
            from ...sgx.measure import PAGE_BLOCKS
            from ...sgx.sgxs import Stream

            if str(self.path) == "-":
                return Stream(sys.stdin.buffer).measure(steps.advance)
            steps.total(self.path.stat().st_size * PAGE_SIZE // PAGE_BLOCKS)
            with self.path.open("rb") as file:
                return Stream(file).measure(steps.advance)
        from ...sgx.measure import measure

        image = self.image()
        steps.total(sum(run.count for run in image.runs) * PAGE_SIZE)
        return measure(image, steps.advance)


def open_enclave(path: Path, sigstruct: Path | None = None, libpal: Path | None = None) -> EnclaveFile:
    """Recognise an enclave's file.

    Args:
        path: its name; ``-`` is an .sgxs stream on standard input, which can only be measured.
        sigstruct: a SIGSTRUCT's file; by default the one inside, or ``NAME.sig`` or ``NAME.sigstruct`` beside it.
        libpal: Gramine's loader, which a manifest needs.

    Raises:
        UsageError: it cannot be read, or a manifest without ``libpal``.
        InclavareError: it is damaged.
    """
    from ...sgx.structs import Sigstruct

    try:
        if str(path) == "-":
            head = b"ECREATE"
        else:
            with path.open("rb") as file:
                head = file.read(8)
    except OSError as error:
        raise UsageError(f"{path} cannot be read", id="cli.enclave.file", found=error.strerror) from None
    if head.startswith(b"\x7fELF"):
        from ...sgx.sdk import SdkEnclave

        found = EnclaveFile(path, "sdk", SdkEnclave(path.read_bytes()).chosen.sigstruct)
        found.sigstruct_path = None if found.sigstruct is None else path
    elif head.startswith(b"ECREATE"):
        found = EnclaveFile(path, "sgxs")
    elif path.name.endswith((".manifest.sgx", ".manifest", ".toml")):
        if libpal is None:
            raise UsageError(
                f"{path} is a Gramine manifest, which is measured together with Gramine's loader",
                id="cli.enclave.libpal",
                remedy="name the libpal.so of the Gramine that will run it with --libpal",
            )
        found = EnclaveFile(path, "gramine", libpal=libpal)
    else:
        raise UsageError(
            f"{path} is no enclave that is known here",
            id="cli.enclave.kind",
            found=head.hex() or "an empty file",
            expected="an .sgxs stream, a shared object of Intel's SDK, or a Gramine manifest (.manifest.sgx)",
            remedy="for an enclave image of containers use inclavare measure",
        )
    signed = sigstruct or next((file for file in beside(path) if file.is_file()), None)
    if signed is not None:
        found.sigstruct, found.sigstruct_path = Sigstruct.from_bytes(signed.read_bytes()), signed
    return found


def beside(path: Path) -> list[Path]:
    """Where an enclave's SIGSTRUCT is looked for."""
    stem = path.with_name(path.name.removesuffix(".manifest.sgx")) if path.name.endswith(".manifest.sgx") else path
    return [stem.with_suffix(".sig"), stem.with_suffix(".sigstruct"), path.with_name(f"{path.name}.sig")]
