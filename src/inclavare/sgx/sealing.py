"""Sealed data: a key that only this enclave can derive, asked for by a KEYREQUEST that travels with the ciphertext.

======  ====  =================================================================================
offset  size  field (integers little-endian)
======  ====  =================================================================================
0       8     magic ``INCLSEAL``
8       2     version, 1
10      2     zero
12      4     length of the additional data, which is not stored
16      8     length of the plaintext and of the ciphertext
24      12    AES-GCM nonce
36      4     zero
40      8     number that a monotonic counter gave out for this blob; 0: none
48      16    id of that counter; zero: none
64      64    its name, ASCII, padded with zeros
128     512   KEYREQUEST: policy, ISVSVN, CPUSVN, CONFIGSVN, masks and a random KEYID
640     n     ciphertext
640+n   16    AES-128-GCM tag over header, additional data and ciphertext
======  ====  =================================================================================

The key is used for this blob alone: its KEYID is drawn for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..errors import InclavareError, IntegrityError, PolicyError, UsageError
from .codes import Status
from .keys import (
    KEY_SEAL,
    POLICY_CONFIGID,
    POLICY_ISVEXTPRODID,
    POLICY_ISVFAMILYID,
    POLICY_MRENCLAVE,
    POLICY_MRSIGNER,
    POLICY_NOISVPRODID,
    KeyRefused,
)
from .structs import Attributes, KeyRequest, Layout, ReportBody, Structure

#: Gives the 16-byte key for a KEYREQUEST or raises :class:`~inclavare.sgx.keys.KeyRefused`.
EGetKey = Callable[[KeyRequest], bytes]

MAGIC = b"INCLSEAL"
VERSION = 1
HEADER_SIZE, TAG_SIZE = 640, 16
#: Largest plaintext and largest additional data, bytes. Both are held in memory, the plaintext about three times.
MAX_SIZE = 1 << 30

#: ATTRIBUTEMASK and MISCMASK as the Intel SDK seals by default: what has a bearing on security, and what is reserved
#: for it; a new processor's extended states do not make old data unreadable.
ATTRIBUTE_MASK = Attributes(0xFF00_0000_0000_000B, 0)
MISC_MASK = 0xF000_0000

_POLICIES = {
    "mrenclave": POLICY_MRENCLAVE,
    "mrsigner": POLICY_MRSIGNER,
    "noisvprodid": POLICY_NOISVPRODID,
    "configid": POLICY_CONFIGID,
    "isvfamilyid": POLICY_ISVFAMILYID,
    "isvextprodid": POLICY_ISVEXTPRODID,
}
_COUNTER_NAME = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def parse_policy(text: str) -> int:
    """KEYREQUEST.KEYPOLICY from names: ``mrenclave``, ``mrsigner``, or several joined by ``+``.

    Besides these two there are ``noisvprodid``, ``configid``, ``isvfamilyid`` and ``isvextprodid``, for enclaves with
    key separation and sharing (KSS).

    Raises:
        UsageError: an unknown name, or neither ``mrenclave`` nor ``mrsigner``, so that any enclave would have the key.
    """
    policy = 0
    for name in text.split("+"):
        policy |= _POLICIES.get(name, 1 << 16)
    if policy >> 16 or not policy & (POLICY_MRENCLAVE | POLICY_MRSIGNER):
        raise UsageError(
            "not a sealing policy",
            id="sealing.policy",
            found=text[:80],
            expected=f"mrenclave or mrsigner, and after a + {', '.join(list(_POLICIES)[2:])}",
        )
    return policy


def policy_name(policy: int) -> str:
    """The names of a KEYPOLICY, joined by ``+``."""
    return "+".join(name for name, bit in _POLICIES.items() if policy & bit)


def owner(policy: int) -> str:
    """Whose counters go with a KEYPOLICY: ``mrenclave`` or ``mrsigner``."""
    return "mrenclave" if policy & POLICY_MRENCLAVE else "mrsigner"


@dataclass(frozen=True, slots=True)
class CounterNumber:
    """The number that a monotonic counter gave out for a blob.

    Attributes:
        name: 1 to 64 letters, digits, dots, dashes and underscores.
        id: 16 bytes, not all zero.
        value: 1 or more.
    """

    name: str
    id: bytes
    value: int


@dataclass(frozen=True, slots=True)
class _Header(Structure):
    LAYOUT: ClassVar[Layout] = Layout(
        "sealed",
        HEADER_SIZE,
        (
            ("magic", 0, "8s"),
            ("version", 8, "H"),
            ("aad_size", 12, "I"),
            ("data_size", 16, "Q"),
            ("nonce", 24, "12s"),
            ("counter_value", 40, "Q"),
            ("counter_id", 48, "16s"),
            ("counter_name", 64, "64s"),
            ("key_request", 128, "512s"),
        ),
    )

    magic: bytes
    version: int
    aad_size: int
    data_size: int
    nonce: bytes
    counter_value: int
    counter_id: bytes
    counter_name: bytes
    key_request: bytes


def new_request(identity: ReportBody, policy: int) -> KeyRequest:
    """The request for a fresh seal key of the enclave's and the platform's current security versions.

    Args:
        identity: body of a report of the enclave itself, for ISVSVN, CPUSVN and CONFIGSVN.
        policy: see :func:`parse_policy`.
    """
    return KeyRequest(
        key_name=KEY_SEAL,
        key_policy=policy,
        isv_svn=identity.isv_svn,
        cpusvn=identity.cpusvn,
        attribute_mask=ATTRIBUTE_MASK.to_bytes(),
        key_id=os.urandom(32),
        misc_mask=MISC_MASK,
        config_svn=identity.config_svn if policy & POLICY_CONFIGID else 0,
    )


def seal(
    data: bytes | bytearray | memoryview,
    request: KeyRequest,
    egetkey: EGetKey,
    *,
    aad: bytes = b"",
    counter: CounterNumber | None = None,
) -> bytes:
    """Seal: ``HEADER_SIZE + len(data) + TAG_SIZE`` bytes.

    Args:
        data: plaintext, at most :data:`MAX_SIZE` bytes; may be empty.
        request: from :func:`new_request`, used once.
        egetkey: the enclave's EGETKEY.
        aad: additional data, authenticated and not stored; at most :data:`MAX_SIZE` bytes.
        counter: the number to bind the blob to.

    Raises:
        UsageError: ``sealing.size``: too much data.
        KeyRefused: EGETKEY refuses the request.
    """
    size = memoryview(data).nbytes
    _check_sizes(size, len(aad))
    header = _Header(
        magic=MAGIC,
        version=VERSION,
        aad_size=len(aad),
        data_size=size,
        nonce=os.urandom(12),
        counter_value=0 if counter is None else counter.value,
        counter_id=bytes(16) if counter is None else counter.id,
        counter_name=(b"" if counter is None else counter.name.encode()).ljust(64, b"\0"),
        key_request=request.to_bytes(),
    )
    _check(header)  # what could not be opened is not sealed
    head = header.to_bytes()
    sealed = _cipher(egetkey(request)).encrypt(header.nonce, data, head + aad)
    return b"".join((head, sealed))


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed blob, taken apart and checked for form. Only :meth:`open` says that it is authentic."""

    request: KeyRequest
    counter: CounterNumber | None
    data_size: int
    aad_size: int
    # As it was parsed: what is authenticated must be what was judged, even if the caller's buffer changes meanwhile.
    _head: bytes
    _sealed: memoryview

    @classmethod
    def parse(cls, blob: bytes | bytearray | memoryview) -> Self:
        """Take a blob apart.

        Raises:
            IntegrityError: ``sealing.blob.*`` or ``sgx.sealed.*``, ``sgx.keyrequest.*``: it is not a sealed blob, is
                cut short or damaged.
        """
        view = memoryview(blob).cast("B")
        head = bytes(view[:HEADER_SIZE])
        if len(view) < HEADER_SIZE + TAG_SIZE or not head.startswith(MAGIC):
            raise _not_sealed("magic", "not sealed data, or cut short", head[:8].hex() or "nothing", MAGIC.hex())
        version = int.from_bytes(head[8:10], "little")
        if version != VERSION:
            raise _not_sealed(
                "version", "sealed data of another version", version, VERSION, "open it with the version that sealed it"
            )
        header = _Header.from_bytes(head)
        request, counter = _check(header)
        size = HEADER_SIZE + header.data_size + TAG_SIZE
        if len(view) != size:
            raise _not_sealed("size", "sealed data are cut short or too long", f"{len(view)} bytes", f"{size} bytes")
        return cls(request, counter, header.data_size, header.aad_size, head, view[HEADER_SIZE:])

    @property
    def policy(self) -> int:
        """KEYREQUEST.KEYPOLICY."""
        return self.request.key_policy

    def describe(self) -> dict[str, Any]:
        """The header, for people. It holds no secret, and nothing of it is proven."""
        counter = self.counter
        return {
            "version": VERSION,
            "policy": policy_name(self.policy),
            "isv_svn": self.request.isv_svn,
            "cpusvn": self.request.cpusvn.hex(),
            "config_svn": self.request.config_svn,
            "attribute_mask": self.request.attribute_mask.hex(),
            "misc_mask": f"{self.request.misc_mask:#010x}",
            "key_id": self.request.key_id.hex(),
            "counter": None
            if counter is None
            else {"name": counter.name, "id": counter.id.hex(), "value": counter.value},
            "bytes": self.data_size,
            "aad_bytes": self.aad_size,
        }

    def require(self, *, policy: int | None = None, minimum_isv_svn: int = 0, counter: str | None = None) -> None:
        """Refuse what the caller would not have sealed, before a key is asked for.

        A blob names its own KEYREQUEST, and whoever can run another enclave that gets the same key can make one. Under
        MRENCLAVE that is this enclave alone. Under MRSIGNER it is every enclave of the signer with this product id, its
        old and vulnerable versions among them.

        Args:
            policy: the KEYPOLICY that it must have; ``None``: any, except one that leaves the product id out.
            minimum_isv_svn: refuse what was sealed by an older version of the enclave.
            counter: name of the counter that it must be bound to; ``None``: bound or not.

        Raises:
            PolicyError: ``sealing.require.*``.
        """
        if self.policy != policy and (policy is not None or self.policy & POLICY_NOISVPRODID):
            wanted = "mrenclave or mrsigner, with the product id" if policy is None else policy_name(policy)
            raise _unwanted(
                "policy",
                "the blob is sealed under another policy",
                policy_name(self.policy),
                wanted,
                "name the policy that it was sealed under, if you trust every enclave that gets its key",
            )
        if self.request.isv_svn < minimum_isv_svn:
            raise _unwanted(
                "isvsvn",
                "the blob was sealed by too old a version of the enclave",
                self.request.isv_svn,
                f"ISVSVN {minimum_isv_svn} or above",
            )
        found = None if self.counter is None else self.counter.name
        if counter is not None and found != counter:
            raise _unwanted(
                "counter", "the blob is not bound to this monotonic counter", found or "no counter", counter
            )

    def open(self, egetkey: EGetKey, *, aad: bytes = b"") -> bytes:
        """The plaintext, :attr:`data_size` bytes; all of it or nothing. Check :attr:`counter` before using it.

        Raises:
            PolicyError: ``sealing.open.isvsvn``, ``.cpusvn``: sealed by a newer enclave or platform;
                ``.refused``: EGETKEY refuses for another reason.
            IntegrityError: ``sealing.open.aad``: additional data of another length; ``sealing.open.tag``: another
                enclave, another platform, other additional data, or damage.
        """
        if len(aad) != self.aad_size:
            raise IntegrityError(
                "the additional data are not those that the blob was sealed with",
                id="sealing.open.aad",
                found=f"{len(aad)} bytes",
                expected=f"{self.aad_size} bytes",
                remedy="give the same additional data as when it was sealed",
            )
        try:
            key = egetkey(self.request)
        except KeyRefused as error:
            raise self._refused(error) from None
        from cryptography.exceptions import InvalidTag

        nonce = _Header.from_bytes(self._head).nonce
        try:
            plain: bytes = _cipher(key).decrypt(nonce, self._sealed, self._head + aad)
        except InvalidTag:
            raise IntegrityError(
                "the sealed data cannot be opened",
                id="sealing.open.tag",
                expected=f"the enclave that the policy {policy_name(self.policy)} names, on the platform that sealed "
                "them, the same additional data, and no byte changed",
                remedy="which of these is wrong cannot be told: the wrong key and damage look alike. Compare the "
                "enclave's MRENCLAVE and MRSIGNER, its product id and DEBUG attribute with those of the one that "
                "sealed; else take a backup",
            ) from None
        return plain

    def _refused(self, error: KeyRefused) -> InclavareError:
        if error.status is Status.SGX_INVALID_ISVSVN:
            what, event = "enclave", "isvsvn"
            asked = f"ISVSVN {self.request.isv_svn}"
            if self.policy & POLICY_CONFIGID:
                asked += f", CONFIGSVN {self.request.config_svn}"
            remedy = "open them with an enclave of that version or a newer one; an older one never gets the key"
        elif error.status is Status.SGX_INVALID_CPUSVN:
            what, event = "platform", "cpusvn"
            asked = f"CPUSVN {self.request.cpusvn.hex()}"
            remedy = "update the platform's microcode and firmware; an older platform never gets the key"
        else:
            return PolicyError(
                f"the key of the sealed data is refused: {error.message}",
                id="sealing.open.refused",
                found=error.found,
                expected=error.expected,
            )
        return PolicyError(
            f"the data were sealed by a newer {what}",
            id=f"sealing.open.{event}",
            found=asked,
            expected=f"at most this {what}'s" if error.expected is None else f"at most {error.expected}",
            remedy=remedy,
        )

    def check_counter(self, id: bytes, confirmed: int) -> None:
        """Refuse an older blob than the one that was stored last.

        Args:
            id: of the counter of that name now, 16 bytes.
            confirmed: its highest confirmed number.

        Raises:
            IntegrityError: ``sealing.counter.id``: another counter's; ``sealing.counter.rollback``: older.
        """
        assert self.counter is not None
        if id != self.counter.id:
            raise IntegrityError(
                f"the monotonic counter {self.counter.name} is not the one that the data were sealed with",
                id="sealing.counter.id",
                found=id.hex(),
                expected=self.counter.id.hex(),
                remedy="it was destroyed since, or the platform is another: these data are not to be used any more",
            )
        if self.counter.value < confirmed:
            raise rolled_back(self.counter.value, confirmed)


def rolled_back(value: int, confirmed: int) -> IntegrityError:
    """The refusal of an older blob than the newest that is known to be stored."""
    return IntegrityError(
        "the sealed data are older than the newest that were stored: somebody rolled them back",
        id="sealing.counter.rollback",
        found=f"counter {value}",
        expected=f"counter {confirmed} or above",
        remedy="find the newest file; if it is lost, destroy the counter and start anew",
    )


def _check(header: _Header) -> tuple[KeyRequest, CounterNumber | None]:
    """Everything about a header but the blob's length."""
    request = KeyRequest.from_bytes(header.key_request)
    # Any enclave of the platform gets the keys of other names or of no identity, so it could forge such a blob.
    if request.key_name != KEY_SEAL or not request.key_policy & (POLICY_MRENCLAVE | POLICY_MRSIGNER):
        raise _not_sealed(
            "keyrequest",
            "the KEYREQUEST is not for a seal key of an enclave or a signer",
            f"KEYNAME {request.key_name}, KEYPOLICY {request.key_policy:#x}",
            f"KEYNAME {KEY_SEAL} and MRENCLAVE or MRSIGNER",
        )
    if max(header.data_size, header.aad_size) > MAX_SIZE:
        raise _not_sealed(
            "size", "sealed data are too large", max(header.data_size, header.aad_size), f"at most {MAX_SIZE} bytes"
        )
    name = header.counter_name.rstrip(b"\0")
    present = (bool(name), any(header.counter_id), header.counter_value > 0)
    if any(present) and not (all(present) and _COUNTER_NAME.fullmatch(name)):
        raise _not_sealed("counter", "the monotonic counter's name, id and number do not belong together", present)
    if not name:
        return request, None
    return request, CounterNumber(name.decode(), header.counter_id, header.counter_value)


def _check_sizes(data: int, aad: int) -> None:
    if max(data, aad) > MAX_SIZE:
        raise UsageError(
            "too much to seal in one piece",
            id="sealing.size",
            found=f"{data} bytes, {aad} bytes of additional data",
            expected=f"at most {MAX_SIZE} bytes each",
            remedy="seal a key, and encrypt the data under it; or use an encrypted volume ([[files.encrypted]])",
        )


def _cipher(key: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def _not_sealed(
    event: str, what: str, found: object, expected: object = None, remedy: str | None = None
) -> IntegrityError:
    return IntegrityError(what, id=f"sealing.blob.{event}", found=found, expected=expected, remedy=remedy)


def _unwanted(event: str, what: str, found: object, expected: object, remedy: str | None = None) -> PolicyError:
    return PolicyError(what, id=f"sealing.require.{event}", found=found, expected=expected, remedy=remedy)
