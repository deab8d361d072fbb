"""Gramine enclaves: their pages, from a manifest and Gramine's loader, and the manifest's trusted files.

The memory layout is that of Gramine 1.6 to 1.9 (``python/graminelibos/sgx_sign.py``, ``pal/src/host/linux-sgx/``):
from the end of the enclave downwards the manifest, then SSA frames, TCS pages, thread control blocks, stacks and signal
stacks of every thread, then the loader ``libpal.so``; what is left is the heap, added without being measured, or, with
EDMM, not added at all.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import IntegrityError, UsageError
from ..sgx.elf import PF_R, PF_W, PF_X, PT_LOAD, Elf, Segment
from ..sgx.image import EnclaveImage, PageRun
from ..sgx.paging import PAGE_SIZE, PT_REG, PT_TCS, SECINFO_R, SECINFO_W, SECINFO_X
from ..sgx.structs import ATTRIBUTE_DEBUG, ATTRIBUTE_MODE64BIT, XFRM_LEGACY

SSA_FRAMES = 2
SSA_FRAME_SIZE = 4 * PAGE_SIZE
STACK_SIZE = 64 * PAGE_SIZE
SIGNAL_STACK_SIZE = 16 * PAGE_SIZE
#: The heap begins here: Linux lets nobody map the addresses below.
HEAP_MIN = 0x10000
_STACK_CANARY = 0xBADBADBADBAD
_GPR_SIZE = 184
#: Offsets in the thread control block: PAL's common part, 256 bytes of the LibOS, then those of the SGX host.
_TCB = struct.Struct("<QQ256xQQQ8xQQ8xQQ72xQQQ")
_FS_GS_LIMIT = 0xFFF
_READ_WRITE = PT_REG | SECINFO_R | SECINFO_W
_ALL_ACCESS = _READ_WRITE | SECINFO_X

_MISC_EXINFO = 1
#: XFRM bits of ``sgx.cpu_features``; the second group must be ``required`` or ``disabled``.
_CPU_FEATURES = {"avx": 0x4, "avx512": 0xE4, "amx": 0x60000}
_HARDENED_FEATURES = {"mpx": 0x18, "pkru": 0x200}
#: XFRM bits that a SIGSTRUCT fixes if the manifest does not say otherwise.
XFRM_MASK = 0xFFFF_FFFF_FFF9_FF1B
_DEFAULTS: dict[str, Any] = {
    "trusted_files": [],
    "max_threads": 4,
    "isvprodid": 0,
    "isvsvn": 0,
    "remote_attestation": "none",
    "debug": False,
    "enable_stats": False,
    "edmm_enable": False,
    "use_exinfo": False,
}
_DEFAULT_FEATURES = {
    "avx": "unspecified",
    "avx512": "unspecified",
    "amx": "unspecified",
    "mpx": "disabled",
    "pkru": "disabled",
}
_HASH_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class GramineManifest:
    """What a manifest says about its enclave.

    Attributes:
        size: SECS.SIZE in bytes.
        threads: ``sgx.max_threads``.
        edmm: whether the heap is added at run time.
        attributes, xfrm, xfrm_mask, miscselect: what SECS and SIGSTRUCT have.
        isv_prod_id, isv_svn: numbers of SIGSTRUCT.
    """

    size: int
    threads: int
    edmm: bool
    attributes: int
    xfrm: int
    xfrm_mask: int
    miscselect: int
    isv_prod_id: int
    isv_svn: int

    @classmethod
    def parse(cls, data: bytes) -> GramineManifest:
        """Read a manifest (``.manifest.sgx`` or one that is not signed yet).

        Raises:
            UsageError: ``gramine.manifest``: not TOML, or a value that Gramine would refuse.
        """
        sgx = complete(_document(data))["sgx"]
        xfrm, mask = XFRM_LEGACY, XFRM_MASK
        for name, bits in {**_CPU_FEATURES, **_HARDENED_FEATURES}.items():
            wanted = sgx["cpu_features"][name]
            if wanted == "required":
                xfrm, mask = xfrm | bits, mask | bits
            elif wanted == "disabled":
                xfrm, mask = xfrm & ~bits, mask | bits
            elif name in _HARDENED_FEATURES or wanted != "unspecified":
                raise _refusal(f"sgx.cpu_features.{name} is wrong", wanted, "required or disabled")
        xfrm |= XFRM_LEGACY
        size = _size(sgx["enclave_size"])
        threads = _number(sgx, "max_threads", 1, 1 << 16)
        if size < 2 * PAGE_SIZE or size & (size - 1):
            raise _refusal("sgx.enclave_size is wrong", sgx["enclave_size"], "a power of two")
        return cls(
            size=size,
            threads=threads,
            edmm=_flag(sgx, "edmm_enable"),
            attributes=ATTRIBUTE_MODE64BIT | (ATTRIBUTE_DEBUG if _flag(sgx, "debug") else 0),
            xfrm=xfrm,
            xfrm_mask=mask,
            miscselect=_MISC_EXINFO if _flag(sgx, "use_exinfo") else 0,
            isv_prod_id=_number(sgx, "isvprodid", 0, 0xFFFF),
            isv_svn=_number(sgx, "isvsvn", 0, 0xFFFF),
        )


def image(manifest: bytes, libpal: bytes) -> EnclaveImage:
    """The pages that Gramine's loader adds, in its order.

    Args:
        manifest: the ``.manifest.sgx`` file, byte for byte.
        libpal: the ``libpal.so`` of the Gramine that will run it.

    Raises:
        UsageError: ``gramine.manifest``, ``gramine.libpal``; ``gramine.size``: the enclave is too small.
        StructureError: ``sgx.elf.…``: the loader is damaged.
    """
    settings = GramineManifest.parse(manifest)
    elf = Elf(libpal)
    loads = [segment for segment in elf.segments if segment.kind == PT_LOAD and segment.memory_size]
    _check_loads(loads, settings.size)
    low = min(_down(segment.address) for segment in loads)
    content = manifest + b"\0"
    n = settings.threads
    areas = _Areas(settings.size)
    manifest_at = areas.take(_up(len(content)))
    ssa = areas.take(n * SSA_FRAMES * SSA_FRAME_SIZE)
    tcs = areas.take(n * PAGE_SIZE)
    tls = areas.take(n * PAGE_SIZE)
    stacks = [areas.take(STACK_SIZE) for _ in range(n)]
    signal_stacks = [areas.take(SIGNAL_STACK_SIZE) for _ in range(n)]
    span = max(_up(segment.end) for segment in loads) - low
    # A loader that is linked to an address lies there; Gramine's own is linked to none.
    pal = low or areas.take(span)
    heap_end = areas.lowest
    tcs_pages, tls_pages = bytearray(n * PAGE_SIZE), bytearray(n * PAGE_SIZE)
    for thread in range(n):
        frames = ssa + thread * SSA_FRAMES * SSA_FRAME_SIZE
        at = thread * PAGE_SIZE
        struct.pack_into(
            "<16xQ4xIQ16xQII",
            tcs_pages,
            at,
            frames,
            SSA_FRAMES,
            pal + elf.entry,
            tls + at,
            _FS_GS_LIMIT,
            _FS_GS_LIMIT,
        )
        _TCB.pack_into(
            tls_pages,
            at,
            tls + at,
            _STACK_CANARY,
            settings.size,
            tcs + at,
            stacks[thread] + STACK_SIZE,
            signal_stacks[thread],
            signal_stacks[thread] + SIGNAL_STACK_SIZE,
            frames,
            frames + SSA_FRAME_SIZE - _GPR_SIZE,
            len(content),
            HEAP_MIN,
            pal,
        )
    runs = [
        _run(manifest_at, PT_REG | SECINFO_R, content.ljust(_up(len(content)), b"\0")),
        PageRun(ssa, _READ_WRITE, n * SSA_FRAMES * SSA_FRAME_SIZE // PAGE_SIZE),
        _run(tcs, PT_TCS, bytes(tcs_pages)),
        _run(tls, _READ_WRITE, bytes(tls_pages)),
        *(PageRun(at, _READ_WRITE, STACK_SIZE // PAGE_SIZE) for at in stacks),
        *(PageRun(at, _READ_WRITE, SIGNAL_STACK_SIZE // PAGE_SIZE) for at in signal_stacks),
        *_loaded(elf, loads, pal - low),
    ]
    if not settings.edmm and heap_end > HEAP_MIN:
        runs.append(PageRun(HEAP_MIN, _ALL_ACCESS, (heap_end - HEAP_MIN) // PAGE_SIZE, measured=False))
    return EnclaveImage(
        settings.size,
        SSA_FRAME_SIZE // PAGE_SIZE,
        settings.attributes,
        settings.xfrm,
        settings.miscselect,
        tuple(runs),
    )


def sigstruct_fields(manifest: bytes) -> dict[str, int]:
    """What Gramine's signing tool puts into a SIGSTRUCT, as arguments of :func:`inclavare.sgx.sigstruct.unsigned`.

    Raises:
        UsageError: ``gramine.manifest``.
    """
    settings = GramineManifest.parse(manifest)
    return {
        "attributes": settings.attributes,
        "attribute_mask": (1 << 64) - 1,
        "xfrm": settings.xfrm,
        "xfrm_mask": settings.xfrm_mask,
        "miscselect": settings.miscselect,
        "misc_mask": 0xFFFFFFFF,
        "isv_prod_id": settings.isv_prod_id,
        "isv_svn": settings.isv_svn,
    }


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """A manifest with Gramine's defaults in section ``sgx``; the document itself stays as it is.

    Raises:
        UsageError: ``gramine.manifest``: a section that is no table.
    """
    sgx = document.get("sgx", {})
    if not isinstance(sgx, dict) or not isinstance(sgx.get("cpu_features", {}), dict):
        raise _refusal("sgx is no table", type(sgx).__name__, "a table")
    sgx = {**_DEFAULTS, **sgx, "cpu_features": {**_DEFAULT_FEATURES, **sgx.get("cpu_features", {})}}
    sgx.setdefault("enclave_size", "1024G" if sgx["edmm_enable"] is True else "256M")
    return {**document, "sgx": sgx}


def with_hashes(manifest: bytes, progress: Callable[[int], None] | None = None) -> bytes:
    """What becomes ``.manifest.sgx``: directories of ``sgx.trusted_files`` expanded, every file with its SHA-256.

    Files are hashed in several threads. The loader's entry point (``loader.entrypoint.uri``) gets its hash, too.

    Args:
        progress: told about bytes that were hashed.

    Raises:
        UsageError: ``gramine.manifest``, ``gramine.trusted``: an entry that Gramine would refuse, a file that cannot be
            read.
    """
    import tomlkit

    document = complete(_document(manifest))
    entries = document["sgx"]["trusted_files"]
    if not isinstance(entries, list):
        raise _refusal("sgx.trusted_files is no list", type(entries).__name__, "a list")
    files = [file for entry in entries for file in _expanded(entry)]
    entrypoint = document.get("loader", {}).get("entrypoint")
    if isinstance(entrypoint, str):
        entrypoint = {"uri": entrypoint}
    if not isinstance(entrypoint, dict) or "uri" not in entrypoint:
        raise _refusal(
            "loader.entrypoint.uri is missing", None, "the URI of Gramine's libsysdb.so", "file:…/libsysdb.so"
        )
    wanted = [*files, (str(entrypoint["uri"]), entrypoint.get("sha256"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(lambda file: file[1] or _digest(_path(file[0]), progress), wanted))
    document["sgx"]["trusted_files"] = [
        {"uri": uri, "sha256": digest} for (uri, _), digest in zip(files, digests[:-1], strict=True)
    ]
    loader = {**document.get("loader", {}), "entrypoint": {"uri": wanted[-1][0], "sha256": digests[-1]}}
    return tomlkit.dumps({**document, "loader": loader}).encode()


def check_trusted_files(manifest: bytes) -> None:
    """Compare the files on this machine with the hashes of a ``.manifest.sgx``.

    Raises:
        IntegrityError: ``gramine.trusted``: the first file that differs.
        UsageError: ``gramine.trusted``: one cannot be read, or has no hash.
    """
    for entry in complete(_document(manifest))["sgx"]["trusted_files"]:
        for uri, expected in _expanded(entry):
            found = _digest(_path(uri), None)
            if expected is None or found != expected:
                raise IntegrityError(
                    f"{uri} differs from what was signed", id="gramine.trusted", found=found, expected=expected
                )


class _Areas:
    """Hands out addresses from the end of the enclave downwards."""

    def __init__(self, size: int) -> None:
        self.lowest = size

    def take(self, size: int) -> int:
        self.lowest -= size
        if self.lowest < HEAP_MIN:
            raise UsageError(
                "the enclave is too small for its threads and Gramine's loader",
                id="gramine.size",
                remedy="raise sgx.enclave_size, or lower sgx.max_threads",
            )
        return self.lowest


def _loaded(elf: Elf, loads: list[Segment], base: int) -> Iterator[PageRun]:
    for segment in loads:
        start = _down(segment.address)
        head = segment.address - start
        data = bytes(head) + bytes(elf.bytes_at(segment.offset, segment.file_size))
        flags = PT_REG
        for bit, permission in ((PF_R, SECINFO_R), (PF_W, SECINFO_W), (PF_X, SECINFO_X)):
            flags |= permission if segment.flags & bit else 0
        yield _run(base + start, flags, data.ljust(_up(segment.end) - start, b"\0"))


def _check_loads(loads: list[Segment], size: int) -> None:
    end = 0
    for segment in loads:
        if (
            segment.offset % PAGE_SIZE != segment.address % PAGE_SIZE
            or segment.file_size > segment.memory_size
            or _down(segment.address) < end
            or segment.end > size
        ):
            raise _no_loader(f"a segment of {segment.memory_size} bytes at {segment.address:#x}")
        end = _up(segment.end)
    if not loads:
        raise _no_loader("nothing to load")


def _no_loader(found: str) -> UsageError:
    return UsageError(
        "the loader is not Gramine's",
        id="gramine.libpal",
        found=found,
        expected="libpal.so of the Gramine that runs it",
    )


def _run(offset: int, flags: int, data: bytes) -> PageRun:
    return PageRun(offset, flags, len(data) // PAGE_SIZE, data)


def _document(data: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise _refusal("it is not TOML", str(error)) from None


def _size(value: Any) -> int:
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        number = int(value[:-1], 0) * scale[value[-1]] if value[-1:] in scale else int(value, 0)
    except (TypeError, ValueError):
        raise _refusal("sgx.enclave_size is wrong", value, 'a string such as "256M"') from None
    if not 0 < number <= 1 << 46:
        raise _refusal("sgx.enclave_size is wrong", value, "a power of two")
    return number


def _number(sgx: dict[str, Any], key: str, least: int, most: int) -> int:
    value = sgx[key]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _refusal(f"sgx.{key} is wrong", value, f"{least} to {most}")
    return value


def _flag(sgx: dict[str, Any], key: str) -> bool:
    if not isinstance(sgx[key], bool):
        raise _refusal(f"sgx.{key} is wrong", sgx[key], "true or false")
    return bool(sgx[key])


def _path(uri: str) -> Path:
    if not uri.startswith("file:"):
        raise UsageError(f"trusted file {uri!r} is no file", id="gramine.trusted", expected="file:PATH")
    return Path(uri.removeprefix("file:"))


def _expanded(entry: Any) -> Iterator[tuple[str, str | None]]:
    """URI and SHA-256 (where given) of the files that an entry names."""
    if isinstance(entry, str):
        entry = {"uri": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("uri"), str) or set(entry) - {"uri", "sha256"}:
        raise UsageError(f"trusted file {entry!r} is malformed", id="gramine.trusted", expected="uri and sha256")
    uri, digest = entry["uri"], entry.get("sha256")
    path = _path(uri)
    if not uri.endswith("/"):
        if path.is_dir():
            raise UsageError(f"trusted file {uri} is a directory", id="gramine.trusted", remedy="end its URI with /")
        yield uri, digest
        return
    if digest is not None or not path.is_dir():
        raise UsageError(f"trusted file {uri} is no directory without hash", id="gramine.trusted")
    for child in sorted(path.glob("*")):
        if not os.access(child, os.R_OK) or not (child.is_file() or child.is_dir()):
            continue
        if not child.is_dir():
            yield f"file:{child}", None
        elif not child.is_symlink():
            yield from _expanded(f"file:{child}/")


def _digest(path: Path, progress: Callable[[int], None] | None) -> str:
    running = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_HASH_PIECE):
                running.update(piece)
                if progress is not None:
                    progress(len(piece))
    except OSError as error:
        raise UsageError(f"trusted file {path} cannot be read", id="gramine.trusted", found=error.strerror) from None
    return running.hexdigest()


def _down(address: int) -> int:
    return address - address % PAGE_SIZE


def _up(address: int) -> int:
    return _down(address + PAGE_SIZE - 1)


def _refusal(what: str, found: object, expected: object = None, remedy: str | None = None) -> UsageError:
    return UsageError(
        f"the Gramine manifest cannot be used: {what}",
        id="gramine.manifest",
        found=found,
        expected=expected,
        remedy=remedy,
    )
