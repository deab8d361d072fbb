"""Monotonic counters of the simulated platform: what a real one would keep in replay-protected flash.

One small file per counter, in a directory per owner. A change holds the directory's lock and is on disk before it is
answered. The host's root can edit them, as everything of this platform.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import PlatformError, ResourceError, UsageError
from ...sgx.keys import Identity
from ...sgx.structs import ATTRIBUTE_DEBUG, Layout
from ..base import Counter
from . import files

DIRECTORY = "counters"
#: Counters of one owner; so many had an enclave of Intel's platform services, too.
MAX_COUNTERS = 256

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAGIC = b"inclavare.count1"
_LAYOUT = Layout(
    "counter",
    80,
    (("magic", 0, "16s"), ("id", 16, "16s"), ("value", 32, "Q"), ("confirmed", 40, "Q"), ("digest", 48, "32s")),
    constants={"magic": _MAGIC},
)


class SimulatedCounters:
    """See :class:`inclavare.tee.base.Counters`.

    Args:
        platform: the platform's state directory.
        identity: asks who the enclave is; raises once it has ended.
    """

    def __init__(self, platform: Path, identity: Callable[[], Identity]) -> None:
        self._base = platform / DIRECTORY
        self._identity = identity

    def create(self, owner: str, name: str) -> Counter:
        """A new counter at 0."""
        directory = self._directory(owner, name)
        files.private_directory(self._base)
        files.private_directory(directory)
        with files.locked(directory):
            names = [entry for entry in os.listdir(directory) if _is_counter(entry)]
            if _file(name) in names:
                raise UsageError(
                    f"there is a counter {name} already",
                    id="tee.counter.exists",
                    remedy="use it, or choose another name",
                )
            if len(names) >= MAX_COUNTERS:
                raise ResourceError(
                    "the enclave has too many monotonic counters",
                    id="tee.counter.many",
                    found=len(names),
                    expected=f"at most {MAX_COUNTERS}",
                    remedy="destroy some, or use one counter for several things",
                )
            fresh = Counter(os.urandom(16))
            _write(directory / _file(name), fresh)
        return fresh

    def read(self, owner: str, name: str) -> Counter:
        """Its state."""
        return _read(self._directory(owner, name) / _file(name), name)

    def increment(self, owner: str, name: str) -> Counter:
        """Give out the next number, once."""
        with self._opened(owner, name) as path:
            found = _read(path, name)
            if found.value == (1 << 64) - 1:
                raise ResourceError(
                    f"the counter {name} is at its end", id="tee.counter.end", remedy="destroy it and make another"
                )
            grown = Counter(found.id, found.value + 1, found.confirmed)
            _write(path, grown)
        return grown

    def confirm(self, owner: str, name: str, id: bytes, value: int) -> Counter:
        """What bears this number is stored: ``confirmed`` becomes at least ``value``."""
        with self._opened(owner, name) as path:
            found = _read(path, name)
            if found.id != id:
                raise UsageError(
                    f"the counter {name} is not the one that was meant",
                    id="tee.counter.stale",
                    found=found.id.hex(),
                    expected=id.hex(),
                    remedy="it was destroyed and made again since: what it protected before is refused",
                )
            if value > found.value:
                raise UsageError(
                    f"the counter {name} has not given out this number",
                    id="tee.counter.ahead",
                    found=value,
                    expected=f"at most {found.value}",
                )
            if value > found.confirmed:
                found = Counter(found.id, found.value, value)
                _write(path, found)
        return found

    def destroy(self, owner: str, name: str) -> None:
        """Remove it; its id never comes back."""
        with self._opened(owner, name) as path:
            try:
                path.unlink()
                files.sync(path.parent)
            except FileNotFoundError:
                raise _unknown(name) from None
            except OSError as error:
                raise files.unwritable(path, error) from None

    def _directory(self, owner: str, name: str) -> Path:
        """The owner's directory, in which nothing of another owner can be named.

        Like a seal key it depends on measurement or signer, on the product, and on whether this is a debug enclave,
        whose memory the host can read.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                "not a counter's name",
                id="tee.counter.name",
                found=name[:80],
                expected="1 to 64 letters, digits, dots, dashes and underscores",
            )
        enclave = self._identity()
        who = {"mrenclave": enclave.mrenclave, "mrsigner": enclave.mrsigner}.get(owner)
        if who is None:
            raise UsageError(
                "not a counter's owner", id="tee.counter.owner", found=owner, expected="mrenclave or mrsigner"
            )
        debug = enclave.attributes.flags & ATTRIBUTE_DEBUG
        text = f"{owner} {who.hex()} {enclave.isv_prod_id} {debug}"
        return self._base / hashlib.sha256(text.encode()).hexdigest()

    @contextlib.contextmanager
    def _opened(self, owner: str, name: str) -> Iterator[Path]:
        directory = self._directory(owner, name)
        if not directory.is_dir():
            raise _unknown(name)
        with files.locked(directory):
            yield directory / _file(name)


def _file(name: str) -> str:
    # A suffix, so that no name is a dot file or the lock.
    return f"{name}.counter"


def _is_counter(entry: str) -> bool:
    return entry.endswith(".counter")


def _read(path: Path, name: str) -> Counter:
    data = files.read(path)
    if data is None:
        raise _unknown(name)
    if len(data) != _LAYOUT.size or not data.startswith(_MAGIC) or hashlib.sha256(data[:48]).digest() != data[48:]:
        raise PlatformError(
            f"the monotonic counter in {path} is damaged",
            id="tee.counter.damaged",
            found=f"{len(data)} bytes",
            expected=f"{_LAYOUT.size} bytes with a matching digest",
            remedy="restore the file; if that is impossible, what the counter protects is lost",
        )
    _, id_, value, confirmed, _ = _LAYOUT.unpack(data)
    assert isinstance(id_, bytes) and isinstance(value, int) and isinstance(confirmed, int)
    return Counter(id_, value, confirmed)


def _write(path: Path, counter: Counter) -> None:
    head = _LAYOUT.pack((_MAGIC, counter.id, counter.value, counter.confirmed, bytes(32)))[:48]
    files.write(path, head + hashlib.sha256(head).digest())


def _unknown(name: str) -> UsageError:
    return UsageError(
        f"this enclave has no monotonic counter {name}",
        id="tee.counter.unknown",
        remedy="make it; counters of other enclaves, and those of another policy, are not to be seen",
    )
