"""Master keys: what the store's root keys are wrapped under.

A master key wraps root keys only (a handful), at opening and at rotation; what is read and written in between is
encrypted under the root key in memory. So a Vault that is away for an hour stops no release.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from cryptography.exceptions import InvalidTag

from ...enclave.paths import write_atomically
from ...enclave.signing_access import read_private
from .crypto import KEY_SIZE, decrypt, derive, encrypt
from .errors import Invalid, Unavailable, WrongMasterKey

Parameters = Mapping[str, Any]


class MasterKey(ABC):
    """Wraps root keys of 32 bytes."""

    kind: ClassVar[str]

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What is stored beside the wrapped key; not secret."""

    @abstractmethod
    def wrap(self, key: bytes, aad: bytes) -> bytes:
        """Wrap a root key.

        Raises:
            Unavailable: the key's keeper cannot be reached.
        """

    @abstractmethod
    def unwrap(self, wrapped: bytes, aad: bytes, parameters: Parameters) -> bytes:
        """A root key.

        Args:
            parameters: stored when it was wrapped.

        Raises:
            WrongMasterKey: it was wrapped under another one, or damaged.
            Unavailable: the key's keeper cannot be reached.
        """


class _Local(MasterKey):
    """A key that this process has in its memory."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            raise Invalid("not a master key", id="verdict.store.master.size", found=f"{len(key)} bytes",
                          expected=f"{KEY_SIZE} bytes")  # fmt: skip
        self._key = derive(key, f"{self.kind} master key")
        self._fingerprint = derive(key, f"{self.kind} master key's fingerprint")[:8].hex()

    def parameters(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint}

    def wrap(self, key: bytes, aad: bytes) -> bytes:
        return encrypt(self._key, key, aad)

    def unwrap(self, wrapped: bytes, aad: bytes, parameters: Parameters) -> bytes:
        if parameters.get("fingerprint") != self._fingerprint:
            raise wrong(self.kind, f"key {self._fingerprint}", f"key {parameters.get('fingerprint')}")
        try:
            return decrypt(self._key, wrapped, aad)
        except InvalidTag:
            raise wrong(self.kind, "the right key, and a wrapped key that was changed") from None


class FileKey(_Local):
    """A key in a file of mode 0600: 32 random bytes in base64.

    Args:
        key: 32 bytes.
    """

    kind = "file"

    @classmethod
    def create(cls, path: Path) -> FileKey:
        """Make a key; a file that is there stays.

        Raises:
            Invalid: there is a file, or it cannot be written.
        """
        key = os.urandom(KEY_SIZE)
        _write_new(path, base64.b64encode(key) + b"\n")
        return cls(key)

    @classmethod
    def load(cls, path: Path) -> FileKey:
        """Read a key.

        Raises:
            UsageError: missing, readable by others, or no key.
        """
        text = read_private(path, "verdict.store.master.file").strip()
        try:
            key = base64.b64decode(text, validate=True)
        except binascii.Error:
            key = b""
        if len(key) != KEY_SIZE:
            raise Invalid(f"{path} holds no master key", id="verdict.store.master.file",
                          expected=f"{KEY_SIZE} bytes in base64")  # fmt: skip
        return cls(key)


class PassphraseKey(MasterKey):
    """A key from a passphrase, with scrypt (RFC 7914) and a salt of its own.

    Args:
        passphrase: at least 12 bytes.
        n, r, p: scrypt's parameters for new stores; 128·n·r bytes of memory. A store's own are stored in it.
    """

    kind = "passphrase"
    #: Stored parameters beyond this are refused: who writes to the database must not choose the memory we use.
    MAX_MEMORY = 1 << 30

    def __init__(self, passphrase: bytes, *, n: int = 1 << 17, r: int = 8, p: int = 1) -> None:
        if len(passphrase) < 12:
            raise Invalid("the passphrase is too short", id="verdict.store.master.passphrase",
                          found=f"{len(passphrase)} bytes", expected="at least 12 bytes")  # fmt: skip
        self._passphrase = passphrase
        self._lock = threading.Lock()
        self._derived: dict[tuple[int, int, int, str], bytes] = {}
        self._own = {"n": n, "r": r, "p": p, "salt": os.urandom(16).hex()}

    @classmethod
    def load(cls, path: Path) -> PassphraseKey:
        """Read a passphrase from a file of mode 0600; the line's end is not part of it.

        Raises:
            UsageError: missing, readable by others, or too short.
        """
        return cls(read_private(path, "verdict.store.master.file").rstrip(b"\r\n"))

    def parameters(self) -> dict[str, Any]:
        return dict(self._own)

    def wrap(self, key: bytes, aad: bytes) -> bytes:
        return encrypt(self._derive(self._own), key, aad)

    def unwrap(self, wrapped: bytes, aad: bytes, parameters: Parameters) -> bytes:
        try:
            key = decrypt(self._derive(parameters), wrapped, aad)
        except InvalidTag:
            raise wrong(self.kind, "another passphrase") from None
        # Later generations take the same salt, so that one derivation opens them all.
        self._own = {name: parameters[name] for name in ("n", "r", "p", "salt")}
        return key

    def _derive(self, parameters: Parameters) -> bytes:
        try:
            n, r, p, salt = (parameters[name] for name in ("n", "r", "p", "salt"))
            raw = bytes.fromhex(salt)
            numbers = all(isinstance(item, int) and item > 0 for item in (n, r, p))
            if not numbers or n < 1 << 14 or 128 * n * r * p > self.MAX_MEMORY or len(raw) < 16:
                raise ValueError
            with self._lock:
                found = self._derived.get((n, r, p, salt))
                if found is None:
                    found = hashlib.scrypt(self._passphrase, salt=raw, n=n, r=r, p=p, dklen=KEY_SIZE,
                                           maxmem=self.MAX_MEMORY + (64 << 20))  # fmt: skip
                    self._derived[n, r, p, salt] = found
                return found
        except (KeyError, TypeError, ValueError):
            raise wrong(self.kind, "scrypt parameters that are not this store's") from None


class SealedKey(_Local):
    """A key that is sealed to the enclave that verdictd runs in: its file opens in this enclave only.

    Args:
        key: 32 bytes.
    """

    kind = "sealed"
    _AAD = b"inclavare verdict store master key"

    @classmethod
    def create(cls, path: Path, *, policy: str = "mrenclave") -> SealedKey:
        """Make a key and seal it; a file that is there stays.

        Args:
            policy: who opens it: ``mrenclave``, this version of the service; ``mrsigner``, later ones, too.

        Raises:
            PlatformError: not in an enclave.
            Invalid: there is a file, or it cannot be written.
        """
        from ...sdk import seal

        key = os.urandom(KEY_SIZE)
        _write_new(path, seal.seal(key, policy=policy, aad=cls._AAD))
        return cls(key)

    @classmethod
    def load(cls, path: Path) -> SealedKey:
        """Open a sealed key.

        Raises:
            PlatformError: not in an enclave.
            PolicyError, IntegrityError: another enclave sealed it, or it is damaged.
            UsageError: missing, or readable by others.
        """
        from ...sdk import seal

        return cls(seal.unseal(read_private(path, "verdict.store.master.file"), aad=cls._AAD))


class TransitKey(MasterKey):
    """A key in Vault's or OpenBao's transit engine: it never leaves there.

    Args:
        url: https, or http on this machine.
        key: the transit key's name; of a type that takes associated data (``aes256-gcm96``, the default).
        token_file: file (mode 0600) with a token that may ``update`` ``<mount>/encrypt/<key>`` and
            ``<mount>/decrypt/<key>``; read again for each call, so that an agent can renew it.
        mount: where the engine is.
        namespace: Vault's, if there is one.
        ca_file: PEM of the authority of the server's certificate; by default the system's.
        timeout: seconds for one call.
    """

    kind = "vault-transit"

    def __init__(
        self,
        url: str,
        key: str,
        *,
        token_file: Path,
        mount: str = "transit",
        namespace: str | None = None,
        ca_file: Path | None = None,
        timeout: float = 10,
    ) -> None:
        from urllib.parse import urlsplit

        from .database import _is_local

        parts = urlsplit(url)
        if parts.scheme != "https" and not (parts.scheme == "http" and _is_local(parts.hostname or "?")):
            raise Invalid("not Vault's URL", id="verdict.store.master.vault.url", found=f"{parts.scheme}://…",
                          expected="https://host:port (http on this machine only)")  # fmt: skip
        self._url = url.rstrip("/")
        self._name = key
        self._token_file = token_file
        self._mount = mount
        self._namespace = namespace
        self._verify: bool | str = str(ca_file) if ca_file else True
        self._timeout = timeout

    def parameters(self) -> dict[str, Any]:
        # Not the address: it may change, the key does not.
        return {"mount": self._mount, "key": self._name, "namespace": self._namespace or ""}

    def wrap(self, key: bytes, aad: bytes) -> bytes:
        answer = self._call("encrypt_data", plaintext=_text(key), associated_data=_text(aad))
        return str(answer["ciphertext"]).encode()

    def unwrap(self, wrapped: bytes, aad: bytes, parameters: Parameters) -> bytes:
        if dict(parameters) != self.parameters():
            raise wrong(self.kind, f"{self._mount}/{self._name}", f"{parameters.get('mount')}/{parameters.get('key')}")
        ciphertext = wrapped.decode("ascii", "replace")
        answer = self._call("decrypt_data", ciphertext=ciphertext, associated_data=_text(aad))
        return base64.b64decode(answer["plaintext"])

    def _call(self, method: str, **fields: str) -> dict[str, Any]:
        import hvac  # type: ignore[import-untyped]
        import requests

        token = read_private(self._token_file, "verdict.store.master.vault.token").decode("ascii", "replace").strip()
        client = hvac.Client(self._url, token=token, namespace=self._namespace, verify=self._verify,
                             timeout=math.ceil(self._timeout), allow_redirects=False)  # fmt: skip
        try:
            call = getattr(client.secrets.transit, method)
            return dict(call(self._name, mount_point=self._mount, **fields)["data"])
        except hvac.exceptions.InvalidRequest:
            # Vault's own text is left out: it may quote what it was given.
            raise wrong(self.kind, "Vault refuses the ciphertext or the request") from None
        except (hvac.exceptions.Forbidden, hvac.exceptions.InvalidPath, hvac.exceptions.Unauthorized) as error:
            raise Unavailable(
                "Vault does not let this service use the transit key",
                id="verdict.store.master.vault.forbidden",
                found=type(error).__name__,
                expected=f"a token whose policy allows update on {self._mount}/encrypt/{self._name} and "
                f"{self._mount}/decrypt/{self._name}, and a key of that name",
            ) from None
        except (hvac.exceptions.VaultError, requests.RequestException) as error:
            raise Unavailable(
                "Vault cannot be reached",
                id="verdict.store.master.vault.unavailable",
                found=type(error).__name__,
                remedy="see whether it runs, is unsealed, and shows a certificate of the authority configured here",
            ) from None
        finally:
            client.adapter.close()


def wrong(kind: str, found: str, expected: str | None = None) -> WrongMasterKey:
    """The master key opens nothing."""
    return WrongMasterKey(
        "the master key is not the one that this store was made with",
        id="verdict.store.master.wrong",
        found=f"{kind}: {found}",
        expected=expected,
        remedy="configure the master key that belongs to this store; without it nothing in it can be read",
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _write_new(path: Path, content: bytes) -> None:
    if path.exists():
        raise Invalid(f"{path} is there already", id="verdict.store.master.file",
                      remedy="keep it: what was encrypted under it cannot be read without it")  # fmt: skip
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, content, 0o600, durable=True)
    except OSError as error:
        raise Invalid(f"{path} cannot be written", id="verdict.store.master.file", found=error.strerror) from None
