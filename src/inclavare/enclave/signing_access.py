"""Who may have what signed by the signing service: its callers' tokens, and its policy."""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..errors import PolicyError, UsageError
from ..sgx.sigstruct import parse_gendata
from ..sgx.structs import (
    ATTRIBUTE_DEBUG,
    ATTRIBUTE_EINITTOKENKEY,
    ATTRIBUTE_INIT,
    ATTRIBUTE_PROVISIONKEY,
    ATTRIBUTES_KNOWN,
    Attributes,
    Sigstruct,
)
from .paths import write_atomically

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._@-]{0,63}) ([0-9a-f]{64})")
_CONTROLLED = {
    "DEBUG": ATTRIBUTE_DEBUG,
    "PROVISIONKEY": ATTRIBUTE_PROVISIONKEY,
    "EINITTOKENKEY": ATTRIBUTE_EINITTOKENKEY,
}


@dataclass(frozen=True, slots=True)
class SigningPolicy:
    """What the service signs.

    Attributes:
        attributes: which of DEBUG, PROVISIONKEY and EINITTOKENKEY an enclave may have or its loader switch on.
        vendors: SIGSTRUCT.VENDOR.
        isv_prod_ids: ``None`` for any.
        mrenclaves: 32 bytes each; ``None`` for any.
    """

    attributes: frozenset[str] = frozenset()
    vendors: frozenset[int] = frozenset({0})
    isv_prod_ids: frozenset[int] | None = None
    mrenclaves: frozenset[bytes] | None = None

    def check(self, data: bytes) -> Sigstruct:
        """What is to be signed, parsed, if the policy allows it.

        Args:
            data: the 256 bytes of gendata.

        Raises:
            StructureError: they are no gendata.
            PolicyError: ``signing.policy.*``: vendor, attributes, isvprodid or mrenclave.
        """
        asked = parse_gendata(data)
        if asked.vendor not in self.vendors:
            raise _refused("vendor", "this VENDOR", f"{asked.vendor:#x}", sorted(map(hex, self.vendors)))
        flags = Attributes.from_bytes(asked.attributes).flags
        mask = Attributes.from_bytes(asked.attribute_mask).flags
        if flags & ATTRIBUTE_INIT or flags & ~ATTRIBUTES_KNOWN:
            raise _refused("attributes", "ATTRIBUTES with INIT or a reserved bit", f"flags {flags:#x}")
        for name, bit in _CONTROLLED.items():
            if name not in self.attributes and (flags & bit or not mask & bit):
                what = f"ATTRIBUTES.{name}" if flags & bit else f"an ATTRIBUTEMASK that leaves {name} to the loader"
                raise _refused("attributes", what, f"flags {flags:#x}, mask {mask:#x}", f"{name} ruled out")
        if self.isv_prod_ids is not None and asked.isv_prod_id not in self.isv_prod_ids:
            raise _refused("isvprodid", "this ISVPRODID", asked.isv_prod_id, sorted(self.isv_prod_ids))
        if self.mrenclaves is not None and asked.enclave_hash not in self.mrenclaves:
            raise _refused("mrenclave", "this MRENCLAVE", asked.enclave_hash.hex())
        return asked


def _refused(event: str, what: str, found: object, expected: object = None) -> PolicyError:
    return PolicyError(
        f"the signing service does not sign {what}",
        id=f"signing.policy.{event}",
        found=found,
        expected=expected,
        remedy="sign another enclave, or have the service started with a policy that allows it",
    )


def add_token(path: Path, name: str) -> str:
    """A new caller's token; the file (mode 0600) keeps only its SHA-256.

    Raises:
        UsageError: the name is taken or no name; the file is not private or damaged.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a caller's name",
            id="signing.token.name",
            expected="letters, digits and ._@-, up to 64",
        )
    known = read_tokens(path) if path.exists() else {}
    if name in known:
        raise UsageError(
            f"{name} has a token already", id="signing.token.name", remedy="remove it first, or choose another name"
        )
    token = secrets.token_urlsafe(32)
    _write(path, {**known, name: sha256(token.encode()).hexdigest()})
    return token


def remove_token(path: Path, name: str) -> None:
    """Take a caller's token away, at once.

    Raises:
        UsageError: there is none; the file is not private or damaged.
    """
    known = read_tokens(path)
    if known.pop(name, None) is None:
        raise UsageError(f"{name} has no token", id="signing.token.name", expected=", ".join(known) or "a caller")
    _write(path, known)


def read_tokens(path: Path) -> dict[str, str]:
    """Callers and the SHA-256 of their tokens, hexadecimal.

    Raises:
        UsageError: missing, readable by others, or damaged.
    """
    text = read_private(path, "signing.token.file").decode("ascii", "replace")
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or match[1] in found:
            raise UsageError(
                f"{path}:{number} is not a caller and a token's digest",
                id="signing.token.file",
                expected="NAME SHA-256, each name once",
                remedy="make entries with: inclavare sgx signing-service add-token",
            )
        found[match[1]] = match[2]
    return found


def caller_of(tokens: dict[str, str], authorization: str) -> str | None:
    """Whose bearer token an ``Authorization`` header presents; ``None`` for nobody's."""
    scheme, _, token = authorization.partition(" ")
    presented = sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
    found = None
    # Every entry is compared, so that the time tells nothing about where a match is.
    for name, digest in tokens.items():
        if hmac.compare_digest(presented, digest):
            found = name
    return found if scheme.lower() == "bearer" else None


def read_private(path: Path, id: str) -> bytes:
    """A file with a secret, which nobody but its owner may read.

    Raises:
        UsageError: with this id: missing, or group or others may read it.
    """
    try:
        with path.open("rb") as handle:
            mode = os.fstat(handle.fileno()).st_mode & 0o777
            content = handle.read(1 << 20)
    except OSError as error:
        raise UsageError(f"{path} cannot be read", id=id, found=error.strerror) from None
    if mode & 0o077:
        raise UsageError(
            f"{path} is not private",
            id=id,
            found=f"mode {mode:04o}",
            expected="mode 0600",
            remedy=f"chmod 600 {path}, and replace what others may have read",
        )
    return content


def _write(path: Path, tokens: dict[str, str]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{name} {digest}\n" for name, digest in tokens.items()).encode(), 0o600)


class RateLimit:
    """So many requests a minute for each caller, and as many at once.

    Args:
        per_minute: requests.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def wait(self, caller: str) -> float:
        """Take one request: 0 if the caller may have it, else seconds until the next one."""
        now = self._clock()
        left, since = self._left.get(caller, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
        if left < 1:
            self._left[caller] = (left, now)
            return (1 - left) * 60 / self._per_minute
        self._left[caller] = (left - 1, now)
        return 0.0
