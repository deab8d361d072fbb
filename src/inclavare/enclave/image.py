"""The enclave image of the ``native`` runtime: which pages ECREATE, EADD and EEXTEND see.

In order of offsets: one header page, the manifest, one TCS page per thread, two SSA frames per thread, and the rest of
``enclave.size`` as heap. MRENCLAVE thereby covers the enclave runtime's own code (as a digest), the manifest and the
root of the file tree. The exact layout is in ``docs/formats.md``.
"""

from __future__ import annotations

import os
import struct
from functools import cache
from hashlib import sha256

from ..errors import UsageError
from ..sgx.image import PAGE_SIZE, PT_REG, PT_TCS, SECINFO_R, SECINFO_W, EnclaveImage, PageRun
from .manifest import Manifest

MAGIC = b"inclavare.image\0"
VERSION = 1
#: magic, version, manifest length, manifest pages, threads, runtime name, then three 32-byte digests: enclave
#: runtime, manifest, root of the file tree.
HEADER = struct.Struct("<16sIIII32s32s32s32s")

#: SECS.SSAFRAMESIZE in pages: XSAVE's legacy area, header and GPRSGX fit into one.
SSA_FRAME_SIZE = 1
SSA_FRAMES = 2
ATTRIBUTE_DEBUG = 1 << 1
ATTRIBUTE_MODE64BIT = 1 << 2
#: x87 and SSE, which every enclave has.
XFRM_LEGACY = 0b11

#: The fields of a TCS that are not zero (SDM vol. 3D, 38.8): OSSA, CSSA, NSSA, OENTRY, AEP, OFSBASE, OGSBASE, FSLIMIT,
#: GSLIMIT, from byte 16.
_TCS = struct.Struct("<16xQIIQQQQII")

#: Directories of the package whose modules decide what an enclave does; ``errors.py`` is the one file beside them.
_TRUSTED_CODE = (
    "attestation",
    "attestation/verifiers",
    "enclave",
    "runelet",
    "runtimes",
    "sgx",
    "shield",
    "tee",
    "tee/sgx_sim",
    "tee/sgx_sim/processor",
)


@cache
def runtime_digest() -> bytes:
    """What stands for the enclave runtime in MRENCLAVE: 32 bytes over this package's trusted source files.

    SHA-256 over, for each file in bytewise order of its name: the name's length (u32, little-endian), the name
    relative to the package, the content's length (u64) and the content.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    names = ["errors.py"]
    for directory in _TRUSTED_CODE:
        names += [f"{directory}/{name}" for name in os.listdir(f"{package}/{directory}") if name.endswith(".py")]
    running = sha256()
    for name in sorted(names):
        with open(f"{package}/{name}", "rb", buffering=0) as file:
            content = file.read()
        running.update(len(name).to_bytes(4, "little") + name.encode() + len(content).to_bytes(8, "little"))
        running.update(content)
    return running.digest()


def native_image(manifest: Manifest, tree_root: bytes, runtime_digest: bytes) -> EnclaveImage:
    """The pages of a native enclave.

    Args:
        manifest: complete, with its user resolved.
        tree_root: root of the measured file tree, 32 bytes.
        runtime_digest: :func:`runtime_digest`, 32 bytes.

    Raises:
        UsageError: ``enclave.size`` has no room for the manifest and the threads, or the user is not resolved.
    """
    if len(tree_root) != 32 or len(runtime_digest) != 32:
        raise ValueError(f"digests of {len(tree_root)} and {len(runtime_digest)} bytes, not 32")
    canonical = manifest.canonical()
    threads = manifest.enclave.threads
    manifest_pages = -(-len(canonical) // PAGE_SIZE)
    header = HEADER.pack(
        MAGIC,
        VERSION,
        len(canonical),
        manifest_pages,
        threads,
        manifest.enclave.runtime.encode(),
        runtime_digest,
        sha256(canonical).digest(),
        tree_root,
    )
    readable, writable = PT_REG | SECINFO_R, PT_REG | SECINFO_R | SECINFO_W
    tcs_offset = (1 + manifest_pages) * PAGE_SIZE
    ssa_offset = tcs_offset + threads * PAGE_SIZE
    ssa_pages = threads * SSA_FRAMES * SSA_FRAME_SIZE
    heap_offset = ssa_offset + ssa_pages * PAGE_SIZE
    heap_pages = (manifest.enclave.size - heap_offset) // PAGE_SIZE
    if heap_pages < 1:
        raise UsageError(
            "enclave.size is too small for the manifest and the threads",
            id="enclave.image.size",
            found=f"{manifest.enclave.size} bytes",
            expected=f"at least {heap_offset + PAGE_SIZE} bytes for {threads} threads",
            remedy="raise enclave.size or lower enclave.threads",
        )
    runs = (
        PageRun(0, readable, 1, header.ljust(PAGE_SIZE, b"\0")),
        PageRun(PAGE_SIZE, readable, manifest_pages, canonical.ljust(manifest_pages * PAGE_SIZE, b"\0")),
        PageRun(tcs_offset, PT_TCS, threads, b"".join(_tcs(ssa_offset, thread) for thread in range(threads))),
        PageRun(ssa_offset, writable, ssa_pages),
        # Fresh heap is zeroed by EADD's source page and its content means nothing, so it is not extended.
        PageRun(heap_offset, writable, heap_pages, measured=False),
    )
    return EnclaveImage(
        size=1 << (manifest.enclave.size - 1).bit_length(),
        ssa_frame_size=SSA_FRAME_SIZE,
        attributes=ATTRIBUTE_MODE64BIT | (ATTRIBUTE_DEBUG if manifest.enclave.debug else 0),
        xfrm=XFRM_LEGACY,
        miscselect=0,
        runs=runs,
    )


def _tcs(ssa_offset: int, thread: int) -> bytes:
    ossa = ssa_offset + thread * SSA_FRAMES * SSA_FRAME_SIZE * PAGE_SIZE
    return _TCS.pack(ossa, 0, SSA_FRAMES, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF).ljust(PAGE_SIZE, b"\0")
