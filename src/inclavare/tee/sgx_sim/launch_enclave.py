"""The platform's launch enclave (LE): it permits the start of enclaves whose signer is not the authorised one.

Its signer's hash is what IA32_SGXLEPUBKEYHASH holds on a new platform. It permits every enclave but those that ask for
the provisioning or launch key, which are the platform's own.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

from ...errors import IntegrityError, PlatformError, PolicyError
from ...sgx import sigstruct
from ...sgx.image import EnclaveImage
from ...sgx.launch import EinitToken
from ...sgx.measure import measure
from ...sgx.structs import (
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_MODE64BIT,
    ATTRIBUTE_PROVISIONKEY,
    ATTRIBUTES_KNOWN,
    Attributes,
    Sigstruct,
)
from ...sgx.tokens import make_token
from . import architectural, files
from .cpu import Processor, identity

#: Its SIGSTRUCT in the platform's directory, made at first use.
FILE = "launch"
#: Intel's has this product id, too.
LE = architectural.Architectural("launch enclave", isv_prod_id=0x20, isv_svn=1)
_FLAGS = ATTRIBUTE_MODE64BIT | ATTRIBUTE_EINITTOKENKEY


@cache
def image() -> EnclaveImage:
    """Its pages."""
    return replace(architectural.image(LE), attributes=_FLAGS)


def signature(directory: Path) -> bytes:
    """Its SIGSTRUCT, 1808 bytes; signed by the first of all processes that ask, with a key that nobody keeps.

    Raises:
        PlatformError: the file is damaged, or the directory cannot be used.
    """
    path = directory / FILE
    data = files.read(path)
    if data is None:
        files.private_directory(directory)
        with files.locked(directory):
            data = files.read(path)
            if data is None:
                data = _sign()
                files.write(path, data)
    try:
        signed = Sigstruct.from_bytes(data)
        sigstruct.verify(signed)
        if signed.enclave_hash != measure(image()):
            raise IntegrityError("the SIGSTRUCT is over another launch enclave", found=signed.enclave_hash.hex())
    except IntegrityError as error:
        raise PlatformError(
            f"the simulated platform's launch enclave in {path} is damaged",
            id="tee.launch.damaged",
            found=error.message,
            remedy=f"remove {path}: another launch enclave is signed, and tokens of this one lose their force",
        ) from None
    return data


def key_hash(directory: Path) -> bytes:
    """IA32_SGXLEPUBKEYHASH as the platform's manufacturer set it: the launch enclave's MRSIGNER, 32 bytes."""
    return architectural.mrsigner(signature(directory))


def get_token(
    directory: Path, processor: Processor, *, mrenclave: bytes, mrsigner: bytes, attributes: Attributes
) -> EinitToken:
    """Ask it for a token.

    Args:
        mrenclave: of the enclave that is to start, 32 bytes; ``mrsigner`` likewise.
        attributes: its SECS.ATTRIBUTES before EINIT.

    Raises:
        PolicyError: ``tee.launch.attributes``: it permits no enclave with these.
    """
    if attributes.flags & (ATTRIBUTE_PROVISIONKEY | ATTRIBUTE_EINITTOKENKEY):
        raise PolicyError(
            "the launch enclave permits the provisioning and launch keys to the platform's own enclaves only",
            id="tee.launch.attributes",
            found=f"flags {attributes.flags:#x}",
            remedy="sign the enclave without ATTRIBUTES.PROVISIONKEY and EINITTOKENKEY",
        )
    if attributes.flags & ~ATTRIBUTES_KNOWN or attributes.flags & ATTRIBUTE_INIT:
        raise PolicyError(
            "no enclave has these attributes before EINIT",
            id="tee.launch.attributes",
            found=f"flags {attributes.flags:#x}",
        )
    secs = processor.load(image(), signature(directory), architectural=True)
    try:
        return make_token(
            lambda request: processor.egetkey(secs, request),
            identity(secs),
            processor.cpusvn,
            os.urandom(32),
            mrenclave=mrenclave,
            mrsigner=mrsigner,
            attributes=attributes,
        )
    finally:
        processor.eremove(secs)


def _sign() -> bytes:
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

    pages = image()
    return sigstruct.sign(
        measure(pages),
        generate_private_key(public_exponent=3, key_size=3072),
        attributes=pages.attributes,
        attribute_mask=(1 << 64) - 1,
        xfrm=pages.xfrm,
        xfrm_mask=(1 << 64) - 1,
        miscselect=0,
        misc_mask=0xFFFFFFFF,
        isv_prod_id=LE.isv_prod_id,
        isv_svn=LE.isv_svn,
        date=0x20250101,
    ).to_bytes()
