"""The memory encryption engine (MEE): the EPC lies in ordinary memory as ciphertext, under a tree of counters.

The design is Gueron's ("A Memory Encryption Engine Suitable for General Purpose Processors", 2016) at the granularity
of pages, 4096 bytes, where the hardware has lines of 64: a page's tag is over its ciphertext, its number and its
version; eight versions make a node with a MAC, under a counter that is one of eight in the node above, and so on to
counters that never leave the processor. Whoever writes memory can neither change, move nor bring back anything: a page
replayed with its tag, version and all its nodes still differs from the counters on the die. The first failure locks
the engine, as on hardware, where only a reset helps.

Keys are drawn for each session and never stored. SHAKE-256 gives the key stream and keyed BLAKE2s the MACs (encrypt,
then MAC), because both come with the interpreter: loading an enclave imports no cryptographic library.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
from dataclasses import dataclass, field

from ...errors import IntegrityError
from ...sgx.image import PAGE_SIZE

ZERO_PAGE = bytes(PAGE_SIZE)

#: Counters per node, as 7-byte numbers, and the node's MAC: 64 bytes, a line of the hardware's tree.
ARITY = 8
_ARITY_BITS = 3
_COUNTER = 7
_COUNTERS = ARITY * _COUNTER
_NODE_MAC = 8
_PAGE_TAG = 16
_FRESH_NODE = bytes(_COUNTERS + _NODE_MAC)
#: Counters on the die, at most.
_ROOT_COUNTERS = 64


@dataclass(slots=True)
class Store:
    """The backing store, which everybody but the enclave can read and write.

    Attributes:
        pages: ciphertext by page number, 4096 bytes each.
        tags: of the pages, 16 bytes each.
        nodes: by level (0 holds the pages' versions) and index: eight 7-byte little-endian counters, 8 bytes of MAC.
    """

    pages: dict[int, bytes] = field(default_factory=dict)
    tags: dict[int, bytes] = field(default_factory=dict)
    nodes: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def copy(self) -> Store:
        """Everything as it is now, for a later replay."""
        return Store(dict(self.pages), dict(self.tags), dict(self.nodes))


class MemoryEncryption:
    """An engine with its own session keys and root counters. It serves one access at a time.

    A page that was never written, or discarded, reads as zeros and takes no room.

    Args:
        pages: size of the EPC in pages of 4096 bytes.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.store = Store()
        self.locked = False
        # Threads of one session share the counters: an access that sees another's half would take it for an attack.
        self._access = threading.Lock()
        self._stream_key = os.urandom(32)
        self._mac_key = os.urandom(32)
        self._levels = 1
        while pages > _ROOT_COUNTERS * ARITY**self._levels:
            self._levels += 1
        self._root = [0] * -(-pages // ARITY**self._levels)

    def write(self, page: int, data: bytes | memoryview) -> None:
        """Encrypt 4096 bytes into EPC page number ``page``.

        Raises:
            IntegrityError: ``tee.memory.integrity`` (the counters were changed from outside) or ``tee.memory.locked``.
            ValueError: another length, or no such page.
        """
        if len(data) != PAGE_SIZE:
            raise ValueError(f"{len(data)} bytes, not {PAGE_SIZE}")
        with self._access:
            nodes, version = self._verified(page)
            version = version + 1 | 1
            ciphertext = self._mix(page, version, data)
            self.store.pages[page] = ciphertext
            self.store.tags[page] = self._page_tag(page, version, ciphertext)
            self._advance(page, nodes, version)

    def read(self, page: int) -> bytes:
        """The 4096 bytes of EPC page number ``page``.

        Raises:
            IntegrityError: ``tee.memory.integrity``: changed, moved or replayed from outside; ``tee.memory.locked``:
                it happened before.
            ValueError: no such page.
        """
        with self._access:
            _, version = self._verified(page)
            if not _holds_data(version):
                return ZERO_PAGE
            ciphertext = self.store.pages.get(page, b"")
            if not hmac.compare_digest(self._page_tag(page, version, ciphertext), self.store.tags.get(page, b"")):
                raise self._lock(page)
            return self._mix(page, version, ciphertext)

    def discard(self, page: int) -> None:
        """Forget a page: its room is given back, and its old contents cannot return.

        Raises:
            IntegrityError: as for :meth:`write`.
            ValueError: no such page.
        """
        with self._access:
            nodes, version = self._verified(page)
            if _holds_data(version):
                self._advance(page, nodes, version + 1)
            self.store.pages.pop(page, None)
            self.store.tags.pop(page, None)

    def _verified(self, page: int) -> tuple[list[bytes], int]:
        """The nodes above a page, the topmost first, and its version."""
        if self.locked:
            raise IntegrityError(
                "enclave memory is locked since it was changed from outside",
                id="tee.memory.locked",
                remedy="no enclave of this session can continue; start them again",
            )
        if not 0 <= page < self.pages:
            raise ValueError(f"EPC page {page} of {self.pages}")
        nodes = []
        counter = self._root[page >> _ARITY_BITS * self._levels]
        for level in reversed(range(self._levels)):
            index = page >> _ARITY_BITS * (level + 1)
            node = _FRESH_NODE
            # Under a counter of zero nothing was ever written: what lies in the store there is not the engine's.
            if counter:
                node = self.store.nodes.get((level, index), b"")
                mac = self._node_mac(level, index, counter, node[:_COUNTERS])
                if not hmac.compare_digest(mac, node[_COUNTERS:]):
                    raise self._lock(page)
            nodes.append(node)
            at = _slot(page, level)
            counter = int.from_bytes(node[at : at + _COUNTER], "little")
        return nodes, counter

    def _advance(self, page: int, nodes: list[bytes], version: int) -> None:
        """Give the page a new version and each counter above it its next value."""
        root = page >> _ARITY_BITS * self._levels
        counter = self._root[root] = self._root[root] + 1
        for level, node in zip(reversed(range(self._levels)), nodes, strict=True):
            at = _slot(page, level)
            value = int.from_bytes(node[at : at + _COUNTER], "little") + 1 if level else version
            counters = node[:at] + value.to_bytes(_COUNTER, "little") + node[at + _COUNTER : _COUNTERS]
            index = page >> _ARITY_BITS * (level + 1)
            self.store.nodes[level, index] = counters + self._node_mac(level, index, counter, counters)
            counter = value

    def _lock(self, page: int) -> IntegrityError:
        self.locked = True
        return IntegrityError(
            f"enclave memory at {page * PAGE_SIZE:#x} was changed from outside",
            id="tee.memory.integrity",
            remedy="the enclave cannot continue; start it again",
        )

    def _mix(self, page: int, version: int, data: bytes | memoryview) -> bytes:
        nonce = page.to_bytes(8, "little") + version.to_bytes(8, "little")
        stream = hashlib.shake_256(self._stream_key + nonce).digest(PAGE_SIZE)
        mixed = int.from_bytes(stream, "little") ^ int.from_bytes(data, "little")
        return mixed.to_bytes(PAGE_SIZE, "little")

    def _page_tag(self, page: int, version: int, ciphertext: bytes) -> bytes:
        place = page.to_bytes(8, "little") + version.to_bytes(8, "little")
        return hashlib.blake2s(place + ciphertext, key=self._mac_key, digest_size=_PAGE_TAG).digest()

    def _node_mac(self, level: int, index: int, counter: int, counters: bytes) -> bytes:
        place = bytes([level]) + index.to_bytes(8, "little") + counter.to_bytes(8, "little")
        return hashlib.blake2s(place + counters, key=self._mac_key, digest_size=_NODE_MAC).digest()


def _slot(page: int, level: int) -> int:
    """Where, in a node of that level, the counter above the page begins."""
    return (page >> _ARITY_BITS * level) % ARITY * _COUNTER


def _holds_data(version: int) -> bool:
    """Versions only grow: odd ones are of pages with contents, even ones of empty pages."""
    return version & 1 == 1
