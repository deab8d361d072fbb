"""Gramine enclaves: their pages, from a manifest and Gramine's loader, and the manifest's trusted files.

The memory layout is that of Gramine 1.5 to 1.9 (``python/graminelibos/sgx_sign.py``, ``pal/src/host/linux-sgx/``):
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
from . import gramine_toml
from .paths import open_in_root

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
#: What Gramine adds to section ``sgx``, in its order.
_DEFAULTS: dict[str, Any] = {
    "trusted_files": [],
    "max_threads": 4,
    "isvprodid": 0,
    "isvsvn": 0,
    "remote_attestation": "none",
    "debug": False,
    "enable_stats": False,
    "edmm_enable": False,
    "enclave_size": "256M",
    "use_exinfo": False,
    "cpu_features": {},
}
_EDMM_SIZE = "1024G"
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
        document = _document(data)
        if not {"libos", "loader", "sgx"} & document.keys():
            raise _refusal("it is no manifest of Gramine's", ", ".join(document) or "nothing", "libos, loader and sgx")
        sgx = complete(document)["sgx"]
        xfrm, mask = _features(sgx, named="cpu_features" in document.get("sgx", {}))
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
            miscselect=_MISC_EXINFO if _flag(sgx, "use_exinfo") or sgx.get("require_exinfo") is True else 0,
            isv_prod_id=_number(sgx, "isvprodid", 0, 0xFFFF),
            isv_svn=_number(sgx, "isvsvn", 0, 0xFFFF),
        )


def _features(sgx: dict[str, Any], *, named: bool) -> tuple[int, int]:
    """XFRM and its mask.

    Gramine 1.5 has the keys ``sgx.require_…`` instead, and writes all of them; 1.6 and 1.7 read them where the manifest
    has not ``named`` any ``sgx.cpu_features``.
    """
    xfrm, mask = XFRM_LEGACY, XFRM_MASK
    every = _CPU_FEATURES | _HARDENED_FEATURES
    old = [f"require_{name}" in sgx for name in every]
    if all(old) or (any(old) and not named):
        for name, bits in every.items():
            xfrm |= bits if sgx.get(f"require_{name}") is True else 0
        return xfrm, mask
    for name, bits in every.items():
        wanted = sgx["cpu_features"][name]
        if wanted == "required":
            xfrm, mask = xfrm | bits, mask | bits
        elif wanted == "disabled":
            xfrm, mask = xfrm & ~bits, mask | bits
        elif name in _HARDENED_FEATURES or wanted != "unspecified":
            raise _refusal(f"sgx.cpu_features.{name} is wrong", wanted, "required or disabled")
    return xfrm, mask


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
    sgx = sgx | {key: value for key, value in _DEFAULTS.items() if key not in sgx}
    if "enclave_size" not in document.get("sgx", {}) and sgx["edmm_enable"] is True:
        sgx["enclave_size"] = _EDMM_SIZE
    given = sgx["cpu_features"]
    sgx["cpu_features"] = given | {key: value for key, value in _DEFAULT_FEATURES.items() if key not in given}
    return document | {"sgx": sgx}


def with_hashes(
    manifest: bytes,
    *,
    libos: Path | None = None,
    chroot: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> bytes:
    """What ``gramine-sgx-sign`` of Gramine 1.8 and 1.9 writes as ``.manifest.sgx``, byte for byte.

    Directories of ``sgx.trusted_files`` are expanded, and every file gets its SHA-256, as does the loader's entry point
    (``loader.entrypoint``). Files are hashed in several threads.

    Args:
        libos: the entry point if the manifest names none, Gramine's ``libsysdb.so``.
        chroot: the directory that trusted files are in, instead of ``/``; links in it do not lead out of it.
        progress: told about bytes that were hashed, from several threads.

    Raises:
        UsageError: ``gramine.manifest``, ``gramine.trusted``: an entry that Gramine would refuse, a file that cannot be
            read.
    """
    document = complete(_document(manifest))
    loader = document.get("loader", {})
    entrypoint = _entrypoint(loader, libos)
    files = _trusted_files(document["sgx"], chroot)
    wanted = [file for file in files.values() if file.sha256 is None]
    if "sha256" not in entrypoint:
        # The host's own, even with a chroot.
        wanted.append(TrustedFile(entrypoint["uri"], None, _path(entrypoint["uri"])))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(lambda file: _digest(file.path, progress), wanted))
    if "sha256" not in entrypoint:
        entrypoint = entrypoint | {"sha256": digests.pop()}
    hashed = {file.uri: digest for file, digest in zip(wanted, digests, strict=False)}
    sgx = document["sgx"] | {
        "trusted_files": [{"uri": uri, "sha256": hashed.get(uri, file.sha256)} for uri, file in files.items()]
    }
    return gramine_toml.dumps(document | {"sgx": sgx, "loader": loader | {"entrypoint": entrypoint}}).encode()


def check_trusted_files(manifest: bytes) -> None:
    """Compare the files on this machine with the hashes of a ``.manifest.sgx``.

    Raises:
        IntegrityError: ``gramine.trusted``: the first file that differs, or that has no hash.
        UsageError: ``gramine.trusted``: one cannot be read.
    """
    for file in _trusted_files(complete(_document(manifest))["sgx"], None).values():
        found = _digest(file.path, None)
        if found != file.sha256:
            raise IntegrityError(
                f"{file.uri} differs from what was signed", id="gramine.trusted", found=found, expected=file.sha256
            )


def require_hashes(manifest: bytes) -> None:
    """Refuse a manifest whose trusted files have no hashes yet: Gramine runs what its signing tool makes of it.

    Raises:
        UsageError: ``gramine.manifest``, ``gramine.unsigned``.
    """
    entries = complete(_document(manifest))["sgx"]["trusted_files"]
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict) or "sha256" not in entry:
            raise UsageError(
                "the manifest's trusted files have no hashes: it is not the one that Gramine will run",
                id="gramine.unsigned",
                found=entry if isinstance(entry, str) else entry.get("uri") if isinstance(entry, dict) else None,
                expected="a .manifest.sgx, with sha256 for each file",
                remedy="name the .manifest.sgx, or have `inclavare sgx sign` write it with --manifest-out",
            )


def _entrypoint(loader: Any, libos: Path | None) -> dict[str, Any]:
    entrypoint = loader.get("entrypoint", {}) if isinstance(loader, dict) else None
    if isinstance(entrypoint, str):
        entrypoint = {"uri": entrypoint}
    if isinstance(entrypoint, dict) and "uri" not in entrypoint and libos is not None:
        entrypoint = entrypoint | {"uri": f"file:{libos}"}
    if not isinstance(entrypoint, dict) or not isinstance(entrypoint.get("uri"), str):
        raise _refusal(
            "loader.entrypoint.uri is missing", None, "the URI of Gramine's libsysdb.so", "file:…/libsysdb.so"
        )
    return entrypoint


@dataclass(frozen=True, slots=True)
class TrustedFile:
    """One of ``sgx.trusted_files``.

    Attributes:
        uri: as in the manifest.
        sha256: in hexadecimal, if the manifest has it.
        path: where the file is on this machine.
    """

    uri: str
    sha256: str | None
    path: Path


def _trusted_files(sgx: dict[str, Any], chroot: Path | None) -> dict[str, TrustedFile]:
    """The files that the manifest names, each once; directories expanded, in Gramine's order."""
    entries = sgx["trusted_files"]
    if not isinstance(entries, list):
        raise _refusal("sgx.trusted_files is no list", type(entries).__name__, "a list")
    root = None if chroot is None else chroot.resolve()
    files: dict[str, TrustedFile] = {}
    for entry in entries:
        if isinstance(entry, str):
            entry = {"uri": entry}
        if (
            not isinstance(entry, dict)
            or set(entry) - {"uri", "sha256"}
            or not isinstance(entry.get("uri"), str)
            or not isinstance(entry.get("sha256", ""), str)
        ):
            raise UsageError(f"trusted file {entry!r} is malformed", id="gramine.trusted", expected="uri and sha256")
        for file in _readable(entry["uri"], entry.get("sha256"), root):
            known = files.get(file.uri)
            if known is None or known.sha256 is None:
                files[file.uri] = file
            elif file.sha256 is not None and file.sha256 != known.sha256:
                raise UsageError(
                    f"trusted file {file.uri} has two hashes",
                    id="gramine.trusted",
                    found=file.sha256,
                    expected=known.sha256,
                )
    return files


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
    if not uri.startswith("file:") or "\0" in uri:
        raise UsageError(f"trusted file {uri!r} is no file", id="gramine.trusted", expected="file:PATH")
    return Path(uri.removeprefix("file:"))


def _readable(uri: str, digest: str | None, root: Path | None) -> Iterator[TrustedFile]:
    try:
        yield from _expanded(uri, digest, root)
    except OSError as error:
        raise _unreadable(_path(uri), error) from None
    except RecursionError:
        raise UsageError(f"trusted file {uri} has too many directories in another", id="gramine.trusted") from None


def _expanded(uri: str, digest: str | None, root: Path | None) -> Iterator[TrustedFile]:
    """The file, or the files of the directory, that an entry names."""
    path = _path(uri)
    try:
        path = path if root is None else _in_root(root, path)
    except OSError as error:
        if digest is None:
            raise _unreadable(path, error) from None
    if not uri.endswith("/"):
        if path.is_dir():
            raise UsageError(f"trusted file {uri} is a directory", id="gramine.trusted", remedy="end its URI with /")
        yield TrustedFile(uri, digest, path)
        return
    if digest is not None or not path.is_dir():
        raise UsageError(f"trusted file {uri} is no directory without hash", id="gramine.trusted")
    for child in sorted(path.glob("*")):
        if not os.access(child, os.R_OK) or not (child.is_file() or child.is_dir()):
            continue
        name = child if root is None else Path("/") / child.relative_to(root)
        if not child.is_dir():
            yield from _expanded(f"file:{name}", None, root)
        elif not child.is_symlink():
            yield from _expanded(f"file:{name}/", None, root)


def _in_root(root: Path, path: Path) -> Path:
    """Where a path leads for a process whose root directory is ``root``."""
    if not path.is_absolute():
        raise UsageError(
            f"trusted file {path} is not absolute", id="gramine.trusted", expected="with --chroot, file:/…"
        )
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = open_in_root(root_fd, os.fspath(path), os.O_PATH)
        try:
            return Path(os.readlink(f"/proc/self/fd/{found}"))
        finally:
            os.close(found)
    finally:
        os.close(root_fd)


def _digest(path: Path, progress: Callable[[int], None] | None) -> str:
    running, buffer = hashlib.sha256(), bytearray(_HASH_PIECE)
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                running.update(memoryview(buffer)[:size])
                if progress is not None:
                    progress(size)
    except OSError as error:
        raise _unreadable(path, error) from None
    return running.hexdigest()


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"trusted file {path} cannot be read", id="gramine.trusted", found=error.strerror)


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
