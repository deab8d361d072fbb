"""MRENCLAVE of an unpacked enclave image, written from docs/formats.md and the SDM alone.

Imports nothing of the package, so that a mistake there is not repeated here. It is slow and plain on purpose.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path


def u(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def node_digest(path: bytes, *, top: bool = False) -> bytes:
    info = os.lstat(path)
    mode = info.st_mode
    if stat.S_ISDIR(mode):
        kind = b"d"
        names = sorted(name for name in os.listdir(path) if not (top and name == b".inclavare"))
        body = u(len(names), 4)
        for name in names:
            body += u(len(name), 2) + name + node_digest(path + b"/" + name)
    elif stat.S_ISREG(mode):
        kind = b"f"
        content = Path(os.fsdecode(path)).read_bytes()
        blocks = b"".join(sha(content[at : at + 131072]) for at in range(0, len(content), 131072))
        body = u(len(content), 8) + sha(b"inclavare.blocks.v1\0", u(len(content), 8), blocks)
    elif stat.S_ISLNK(mode):
        kind = b"l"
        target = os.readlink(path)
        body = u(len(target), 4) + target
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        kind = b"c" if stat.S_ISCHR(mode) else b"b"
        body = u(os.major(info.st_rdev), 4) + u(os.minor(info.st_rdev), 4)
    else:
        kind = b"p" if stat.S_ISFIFO(mode) else b"s"
        body = b""
    head = b"inclavare.tree.v1\0" + kind + u(stat.S_IMODE(mode), 4) + u(info.st_uid, 4) + u(info.st_gid, 4)
    return sha(head, body)


def tree_root(rootfs: Path) -> bytes:
    return node_digest(os.fsencode(rootfs), top=True)


def runtime_digest(package: Path) -> bytes:
    names = ["errors.py"]
    for directory in ("attestation", "attestation/verifiers", "enclave", "runelet", "runtimes", "sgx", "shield", "tee", "tee/sgx_sim",
                      "tee/sgx_sim/processor"):  # fmt: skip
        names += [f"{directory}/{path.name}" for path in (package / directory).glob("*.py")]
    running = hashlib.sha256()
    for name in sorted(name.encode() for name in names):
        content = (package / name.decode()).read_bytes()
        running.update(u(len(name), 4) + name + u(len(content), 8) + content)
    return running.digest()


def mrenclave_of(manifest_json: bytes, root: bytes, runtime: bytes) -> bytes:
    manifest = json.loads(manifest_json)
    size, threads = manifest["enclave"]["size"], manifest["enclave"]["threads"]
    manifest_pages = (len(manifest_json) + 4095) // 4096
    header = (
        b"inclavare.image\0"
        + u(1, 4)
        + u(len(manifest_json), 4)
        + u(manifest_pages, 4)
        + u(threads, 4)
        + manifest["enclave"]["runtime"].encode().ljust(32, b"\0")
        + runtime
        + sha(manifest_json)
        + root
    )
    pages: list[tuple[int, bytes, bool]] = [(0x201, header, True)]
    pages += [(0x201, manifest_json[at : at + 4096], True) for at in range(0, len(manifest_json), 4096)]
    first_ssa = 4096 * (1 + manifest_pages + threads)
    for thread in range(threads):
        tcs = bytearray(4096)
        tcs[16:24] = u(first_ssa + 8192 * thread, 8)
        tcs[28:32] = u(2, 4)
        tcs[64:72] = b"\xff" * 8
        pages.append((0x100, bytes(tcs), True))
    pages += [(0x203, b"", True)] * (2 * threads)
    pages += [(0x203, b"", False)] * (size // 4096 - len(pages))

    elrange = 1
    while elrange < size:
        elrange *= 2
    running = hashlib.sha256(b"ECREATE\0" + u(1, 4) + u(elrange, 8) + bytes(44))
    for number, (flags, content, measured) in enumerate(pages):
        content = content.ljust(4096, b"\0")
        running.update(b"EADD\0\0\0\0" + u(4096 * number, 8) + u(flags, 8) + bytes(40))
        for at in range(0, 4096 if measured else 0, 256):
            running.update(b"EEXTEND\0" + u(4096 * number + at, 8) + bytes(48) + content[at : at + 256])
    return running.digest()


def mrenclave(rootfs: Path, package: Path) -> bytes:
    """MRENCLAVE of a root file system with its ``/.inclavare``."""
    manifest_json = (rootfs / ".inclavare" / "manifest.json").read_bytes()
    return mrenclave_of(manifest_json, tree_root(rootfs), runtime_digest(package))
