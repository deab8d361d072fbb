"""``pkcs11``: secrets and keys in a hardware security module (python-pkcs11).

::

    [[plugins]]
    type = "pkcs11"
    name = "pkcs11"                    # kbs+pkcs11:///…
    tenants = ["default"]              # a token is shared by its tenants: give each its own
    module = "/usr/lib/softhsm/libsofthsm2.so"
    token_label = "verdictd"
    pin_file = "/etc/…/pin"            # mode 0600
    wrapping_keys = []                 # labels of RSA keys that may unwrap
    hash = "sha256"                    # of OAEP; sha1 for modules that know no other

As Trustee has it: ``GET resource/<repository>/<type>/<tag>`` is the value of the object with this label;
``GET wrap-key/<label>?wrapped=<base64url>`` (or ``POST``, the bytes as the body) is what the RSA key decrypts it to.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ...enclave.signing_access import read_private
from ...errors import PlatformError
from ..store import names
from ..store.errors import Invalid, NotFound, Unavailable
from . import Answer, settings

if TYPE_CHECKING:
    from ..config import VerdictConfig
    from ..store import Store
    from . import Request, Workload


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See the module."""

    module: str
    token_label: str
    pin_file: str
    wrapping_keys: tuple[str, ...] = ()
    hash: Literal["sha1", "sha256"] = "sha256"


class Pkcs11Plugin:
    """See :class:`inclavare.verdict.plugins.Plugin`. One session, one caller at a time, as PKCS#11 has it."""

    methods = frozenset({"GET", "POST"})
    needs_resource_policy = False

    def __init__(self, config: Settings) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._session: Any = None

    def policy(self, tenant: str, request: Request) -> str | None:
        """The tenant's default decides."""
        return None

    def fetch(self, tenant: str, request: Request, workload: Workload) -> Answer:
        """See the module."""
        kind, *path = request.path
        if kind == "resource" and request.method == "GET":
            return self._guarded(lambda session: self._value(session, names.path("/".join(path))))
        if kind == "wrap-key" and len(path) == 1:
            if path[0] not in self._config.wrapping_keys:
                raise NotFound("not a key that this plugin may use", id="verdict.plugin.pkcs11.unknown")
            wrapped = _decoded(request.query.get("wrapped", "")) if request.method == "GET" else request.body
            if not wrapped:
                raise Invalid("there is nothing to unwrap", id="verdict.plugin.pkcs11.wrapped")
            return self._guarded(lambda session: self._unwrap(session, path[0], wrapped))
        raise NotFound("the module is not asked for this", id="verdict.plugin.pkcs11.unknown")

    def _value(self, session: Any, label: str) -> Answer:
        import pkcs11

        # To its end: a search that is left open keeps others from beginning.
        for found in list(session.get_objects({pkcs11.Attribute.LABEL: label})):
            if found.object_class in (pkcs11.ObjectClass.SECRET_KEY, pkcs11.ObjectClass.DATA):
                return Answer(bytes(found[pkcs11.Attribute.VALUE]))
        raise NotFound("the module has no such object", id="verdict.plugin.pkcs11.unknown", found=label)

    def _unwrap(self, session: Any, label: str, wrapped: bytes) -> Answer:
        import pkcs11

        key = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, key_type=pkcs11.KeyType.RSA, label=label)
        mechanism, mgf = {
            "sha256": (pkcs11.Mechanism.SHA256, pkcs11.MGF.SHA256),
            "sha1": (pkcs11.Mechanism.SHA_1, pkcs11.MGF.SHA1),
        }[self._config.hash]
        try:
            value = key.decrypt(
                wrapped, mechanism=pkcs11.Mechanism.RSA_PKCS_OAEP, mechanism_param=(mechanism, mgf, None)
            )
        except (
            pkcs11.exceptions.EncryptedDataInvalid,
            pkcs11.exceptions.EncryptedDataLenRange,
            pkcs11.exceptions.ArgumentsBad,
            pkcs11.exceptions.GeneralError,  # SoftHSM's for a padding that is wrong
            pkcs11.exceptions.FunctionFailed,
        ):
            raise Invalid("the module cannot decrypt this", id="verdict.plugin.pkcs11.wrapped") from None
        return Answer(bytes(value), {"key": label})

    def _guarded(self, work: Any) -> Answer:
        """Do it, with a new session if the module has forgotten the old one."""
        import pkcs11

        with self._lock:
            for attempt in (1, 2):
                try:
                    if self._session is None:
                        self._session = self._open()
                    found: Answer = work(self._session)
                    return found
                except pkcs11.exceptions.NoSuchKey:
                    raise NotFound("the module has no such key", id="verdict.plugin.pkcs11.unknown") from None
                except (pkcs11.exceptions.PKCS11Error, RuntimeError) as error:
                    # As long as it is open, this process is logged in and cannot do so again.
                    if self._session is not None:
                        with contextlib.suppress(pkcs11.exceptions.PKCS11Error, RuntimeError):
                            self._session.close()
                    self._session = None
                    if attempt == 2:
                        raise Unavailable(
                            "the security module does not give what the policy allows",
                            id="verdict.plugin.pkcs11.unavailable",
                            found=type(error).__name__,
                            remedy="see whether the module, the token and the PIN are right",
                        ) from None
        raise AssertionError("unreachable")

    def _open(self) -> Any:
        import pkcs11

        pin = read_private(Path(self._config.pin_file), "verdict.plugin.pkcs11.pin").decode("utf-8", "replace").strip()
        token = pkcs11.lib(self._config.module).get_token(token_label=self._config.token_label)
        try:
            return token.open(user_pin=pin)
        except pkcs11.exceptions.UserAlreadyLoggedIn:
            return token.open()  # another plugin with the same token has


def create(name: str, table: dict[str, Any], config: VerdictConfig, store: Store) -> Pkcs11Plugin:
    """The plugin.

    Raises:
        UsageError: a wrong configuration.
        PlatformError: python-pkcs11 is not installed.
    """
    try:
        import pkcs11  # noqa: F401
    except ImportError as error:
        raise PlatformError(
            "the plugin pkcs11 needs a package that is not installed",
            id="verdict.plugin.missing",
            found=str(error),
            remedy="pip install 'inclavare[pkcs11]'",
        ) from None
    return Pkcs11Plugin(settings(name, table, Settings))


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        raise Invalid("not base64url", id="verdict.plugin.pkcs11.wrapped") from None
