"""``vault``: secrets that stay in Vault or OpenBao (hvac).

::

    [[plugins]]
    type = "vault"
    name = "vault"                     # kbs+vault:///…
    tenants = ["default"]
    url = "https://vault.example:8200" # http on this machine only
    token_file = "/etc/…/vault-token"  # mode 0600; read for each request, so that an agent can renew it
    ca_file = ""                       # PEM; default the system's authorities
    namespace = ""
    kv_mount = "secret"                # KV version 2; empty: no KV
    kv_prefix = ""                     # all paths are below it: give each tenant one of its own
    transit_mount = ""                 # empty: no transit
    transit_keys = []                  # names of the keys that may decrypt
    timeout = "10s"

``GET kv/<path…>/<field>`` is a field of a KV secret; ``?version=`` for an older one. ``GET transit/<key>?ciphertext=…``
(``vault:v1:…``) is what Vault decrypts it to; longer ones by ``POST transit/<key>``, the ciphertext as the body.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from ...enclave.signing_access import read_private
from ...errors import PlatformError
from ...serving import is_loopback
from ..store.errors import Invalid, NotFound, Unavailable
from . import Answer, settings

if TYPE_CHECKING:
    from ..config import VerdictConfig
    from ..store import Store
    from . import Request, Workload

_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._@+-]{0,126}[A-Za-z0-9_@+-])?")
_CIPHERTEXT = re.compile(r"vault:v[0-9]{1,9}:[A-Za-z0-9+/=]+")
_MAX_PARTS = 16


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See the module."""

    url: str
    token_file: str
    ca_file: str = ""
    namespace: str = ""
    kv_mount: str = "secret"
    kv_prefix: str = ""
    transit_mount: str = ""
    transit_keys: tuple[str, ...] = ()
    timeout: str = "10s"


class VaultPlugin:
    """See :class:`inclavare.verdict.plugins.Plugin`."""

    methods = frozenset({"GET", "POST"})
    needs_resource_policy = False

    def __init__(self, config: Settings, seconds: int) -> None:
        self._config = config
        self._seconds = seconds

    def policy(self, tenant: str, request: Request) -> str | None:
        """The tenant's default decides: Vault has no policies about enclaves."""
        return None

    def fetch(self, tenant: str, request: Request, workload: Workload) -> Answer:
        """See the module."""
        kind, *path = request.path
        # Parts become a URL of Vault's: none of them may mean anything in it.
        if not path or len(path) > _MAX_PARTS or not all(_SEGMENT.fullmatch(part) for part in path):
            raise Invalid("not a path in Vault", id="verdict.plugin.vault.path", found=request.name[:200])
        if kind == "kv" and self._config.kv_mount and request.method == "GET" and len(path) > 1:
            return self._kv(path[:-1], path[-1], request.query.get("version"))
        if kind == "transit" and self._config.transit_mount and len(path) == 1:
            return self._transit(path[0], request)
        raise NotFound("Vault is not asked for this", id="verdict.plugin.vault.unknown", found=request.name[:200])

    def _kv(self, path: list[str], name: str, version: str | None) -> Answer:
        if version is not None and not re.fullmatch(r"[1-9][0-9]{0,8}", version):
            raise Invalid("not a version", id="verdict.plugin.vault.version", found=version[:40])
        full = "/".join((*filter(None, [self._config.kv_prefix.strip("/")]), *path))
        found = self._call(
            lambda client: client.secrets.kv.v2.read_secret_version(
                full,
                version=None if version is None else int(version),
                mount_point=self._config.kv_mount,
                raise_on_deleted_version=True,
            )
        )
        value = found["data"].get(name)
        if not isinstance(value, str):
            raise _unknown(f"the field {name} is not there, or is not text")
        return Answer(value.encode(), {"version": found["metadata"]["version"]})

    def _transit(self, key: str, request: Request) -> Answer:
        text = (
            request.query.get("ciphertext", "") if request.method == "GET" else request.body.decode("ascii", "replace")
        )
        if key not in self._config.transit_keys:
            raise _unknown("not a key that this plugin may use")
        if not _CIPHERTEXT.fullmatch(text.strip()):
            raise Invalid("not a ciphertext of Vault", id="verdict.plugin.vault.ciphertext", expected="vault:v1:…")
        found = self._call(
            lambda client: client.secrets.transit.decrypt_data(
                key, text.strip(), mount_point=self._config.transit_mount
            )
        )
        return Answer(base64.b64decode(found["plaintext"]), {"key": key})

    def _call(self, work: Any) -> dict[str, Any]:
        import hvac  # type: ignore[import-untyped]
        import requests

        config = self._config
        token = read_private(Path(config.token_file), "verdict.plugin.vault.token").decode("ascii", "replace").strip()
        client = hvac.Client(
            config.url,
            token=token,
            namespace=config.namespace or None,
            verify=config.ca_file or True,
            timeout=self._seconds,
            allow_redirects=False,
        )
        try:
            return dict(work(client)["data"])
        except (hvac.exceptions.InvalidPath, hvac.exceptions.InvalidRequest) as error:
            # Vault's own text is left out: it may quote what it was given.
            raise _unknown(type(error).__name__) from None
        except (hvac.exceptions.VaultError, requests.RequestException) as error:
            raise Unavailable(
                "Vault does not give what the policy allows",
                id="verdict.plugin.vault.unavailable",
                found=type(error).__name__,
                remedy="see whether Vault runs and is unsealed, and whether the token's policy allows it",
            ) from None
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise Unavailable(
                "Vault's answer is not understood", id="verdict.plugin.vault.answer", found=type(error).__name__
            ) from None
        finally:
            client.adapter.close()


def create(name: str, table: dict[str, Any], config: VerdictConfig, store: Store) -> VaultPlugin:
    """The plugin.

    Raises:
        UsageError: a wrong configuration.
        PlatformError: hvac is not installed.
    """
    from ..config import duration

    try:
        import hvac  # noqa: F401
    except ImportError as error:
        raise PlatformError(
            "the plugin vault needs a package that is not installed",
            id="verdict.plugin.missing",
            found=str(error),
            remedy="pip install 'inclavare[vault]'",
        ) from None
    found = settings(name, table, Settings)
    parts = urlsplit(found.url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        raise Invalid(
            f"the plugin {name} would talk to Vault in the clear",
            id="verdict.plugin.vault.url",
            found=f"{parts.scheme}://…",
            expected="https://host:port (http on this machine only)",
        )
    try:
        seconds = math.ceil(duration(found.timeout))
    except ValueError as error:
        raise Invalid(f"the plugin {name}: timeout", id="verdict.plugin.settings", expected=str(error)) from None
    return VaultPlugin(found, seconds)


def _unknown(found: str) -> NotFound:
    return NotFound("Vault has no such thing", id="verdict.plugin.vault.unknown", found=found)
