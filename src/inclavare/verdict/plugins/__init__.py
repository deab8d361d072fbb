"""What is released behind ``kbs+<name>:///…`` and ``/kbs/v0/<name>/…``; ``resource`` is verdictd's own store.

A plugin is asked when the policy has allowed it, and only for tenants that the configuration names. Others are:
``vault`` (:mod:`.vault`), ``pkcs11`` (:mod:`.pkcs11`), ``ca`` (:mod:`.ca`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from ...errors import UsageError
from .kv import KvPlugin

if TYPE_CHECKING:
    from ...attestation.claims import Claims
    from ...attestation.jwe import TeeKey
    from ..config import VerdictConfig
    from ..store import Store

RESOURCE = "resource"
_TYPES = ("vault", "pkcs11", "ca")
#: Paths that are not plugins' (Trustee's, and those it may get).
_RESERVED = frozenset({"auth", "attest", "attestation-policy", "resource-policy", "reference-value", RESOURCE})
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_Settings = TypeVar("_Settings")


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for.

    Attributes:
        plugin: ``resource``, or a plugin's name.
        path: behind it, its parts.
        query: of the URI.
        method: ``GET`` or ``POST``.
        body: of a ``POST``.
        judged_by: id of the resource's own policy by which it was allowed, if it has one.
    """

    plugin: str
    path: tuple[str, ...]
    query: dict[str, str] = field(default_factory=dict)
    method: str = "GET"
    body: bytes = field(default=b"", repr=False)
    judged_by: str | None = None

    @property
    def name(self) -> str:
        """``plugin/a/b/c``, for the audit trail."""
        return "/".join((self.plugin, *self.path))


@dataclass(frozen=True, slots=True)
class Workload:
    """Who asks: an attested TEE.

    Attributes:
        holder: digest of the TEE's key, hexadecimal.
        key: the answer is encrypted to it; ``None`` where the answer leaves by an attested channel.
        claims: authentic, accepted by the tenant's policies.
        evidence: SHA-256 of the evidence, hexadecimal.
    """

    holder: str
    key: TeeKey | None
    claims: Claims
    evidence: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What is released.

    Attributes:
        value: the secret.
        detail: for the audit trail; never a secret.
    """

    value: bytes = field(repr=False)
    detail: dict[str, Any] = field(default_factory=dict)


class Plugin(Protocol):
    """One plugin. Called from several threads.

    Attributes:
        methods: of HTTP.
        needs_resource_policy: that evidence is accepted is not enough: a policy has to say who may have what.
    """

    methods: frozenset[str]
    needs_resource_policy: bool

    def policy(self, tenant: str, request: Request) -> str | None:
        """Id of the policy that what is asked for is released by; ``None`` for the tenant's default.

        Raises:
            NotFound: there is no such thing, if that is known already.
        """

    def fetch(self, tenant: str, request: Request, workload: Workload) -> Answer:
        """What is asked for.

        Raises:
            NotFound, Consumed, Invalid: there is nothing for this workload: it is told that it is denied.
            InclavareError: the plugin fails.
        """


class Plugins:
    """The plugins of a service.

    Raises:
        UsageError: ``verdict.plugin.*``: a wrong configuration.
        PlatformError: ``serving.missing``: a plugin's package is not installed.
    """

    def __init__(self, config: VerdictConfig, store: Store) -> None:
        self._resource = KvPlugin(store)
        self._others: dict[tuple[str, str], Plugin] = {}
        for table in config.plugins:
            self._add(dict(table), config, store)

    def find(self, tenant: str, name: str) -> Plugin | None:
        """The plugin of this name, if the tenant has it."""
        return self._resource if name == RESOURCE else self._others.get((tenant, name))

    def _add(self, table: dict[str, Any], config: VerdictConfig, store: Store) -> None:
        kind = table.pop("type", None)
        name = table.pop("name", kind)
        tenants = table.pop("tenants", None)
        if kind not in _TYPES:
            raise _wrong("type", kind, " or ".join(_TYPES))
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
            raise _wrong("name", name, "1 to 63 of a-z, 0-9 and -, and not a path of the protocol itself")
        if not isinstance(tenants, list) or not tenants or not all(isinstance(item, str) for item in tenants):
            raise _wrong("tenants", tenants, "a list of the tenants that may use it")
        made: Plugin = import_module(f".{kind}", __package__).create(name, table, config, store)
        for tenant in tenants:
            if (tenant, name) in self._others:
                raise _wrong("name", name, f"one plugin of a name for the tenant {tenant}")
            self._others[tenant, name] = made


def settings(name: str, table: dict[str, Any], kind: type[_Settings]) -> _Settings:
    """A plugin's own keys.

    Raises:
        UsageError: ``verdict.plugin.settings``.
    """
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"the plugin {name} is not configured as it should be",
            id="verdict.plugin.settings",
            found=str(error),
            remedy="correct its table in the configuration",
        ) from None


def _wrong(key: str, found: object, expected: str) -> UsageError:
    return UsageError(f"a plugin's {key} is wrong", id=f"verdict.plugin.{key}", found=found, expected=expected)


__all__ = ["Answer", "Plugin", "Plugins", "Request", "Workload", "settings"]
