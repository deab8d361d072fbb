"""The administrators' API from outside: where the service is, how it is known again, and who asks."""

from __future__ import annotations

import http.client
import json
import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import click

from ...errors import InclavareError, IntegrityError, PolicyError, ResourceError, UsageError
from .._output import json_option, print_fields, print_json, print_table

_F = TypeVar("_F", bound=Callable[..., Any])
_TIMEOUT = 60.0
_MAX_ANSWER = 256 << 20
_PIECE = 1 << 20


@dataclass(frozen=True)
class Login:
    """What ``inclavare verdict login`` keeps.

    Attributes:
        url: ``https://host:port``.
        certificate: PEM that the service's certificate must be, or be issued by; empty for the system's authorities.
        tenant: what commands are about where they do not say.
    """

    url: str
    certificate: str
    tenant: str
    token: str = field(repr=False)

    @staticmethod
    def path() -> Path:
        """``~/.config/inclavare/verdict.json``."""
        base = os.environ.get("XDG_CONFIG_HOME")
        return (Path(base) if base else Path.home() / ".config") / "inclavare" / "verdict.json"

    @classmethod
    def load(cls) -> Login:
        """Read it.

        Raises:
            UsageError: there is none, others can read it, or it is damaged.
        """
        from ...enclave.signing_access import read_private

        path = cls.path()
        if not path.exists():
            raise UsageError("there is no login", id="verdict.login.none", remedy="inclavare verdict login URL")
        try:
            return cls(**json.loads(read_private(path, "verdict.login.file")))
        except (ValueError, TypeError):
            raise UsageError(
                f"{path} is damaged", id="verdict.login.file", remedy="inclavare verdict login URL"
            ) from None

    def save(self) -> None:
        """Write it, mode 0600."""
        from ...enclave.paths import write_atomically

        path = self.path()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self)).encode(), 0o600)


class Client:
    """Requests, each over a connection of its own."""

    def __init__(self, login: Login) -> None:
        self._login = login
        self.tenant = login.tenant
        parts = urlsplit(login.url)
        self._host, self._port = parts.hostname or "", parts.port
        self._tls = context(login.certificate)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """A request below ``/api/v1``; bytes go as they are, anything else as JSON. Returns what the JSON says.

        Raises:
            InclavareError: what the service says, with its id; or ``verdict.client.*``.
        """
        data = b"".join(self.stream(method, path, body, query=query, headers=headers))
        return json.loads(data) if data else None

    def stream(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[bytes]:
        """The same; the answer's bytes in pieces."""
        fields = {name: _text(value) for name, value in (query or {}).items() if value is not None}
        target = "/api/v1" + path + (f"?{urlencode(fields)}" if fields else "")
        sent = {"Authorization": f"Bearer {self._login.token}", **(headers or {})}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPSConnection(self._host, self._port, context=self._tls, timeout=_TIMEOUT)
        try:
            connection.request(method, target, body, sent)
            answer = connection.getresponse()
            if answer.status >= 300:
                raise _refusal(answer.status, answer.read(_PIECE))
            total = 0
            while piece := answer.read(_PIECE):
                total += len(piece)
                if total > _MAX_ANSWER:
                    raise _unreachable(self._login.url, "an answer without an end")
                yield piece
        except ssl.SSLCertVerificationError as error:
            raise IntegrityError(
                "the service's certificate is not the one that the login knows",
                id="verdict.client.certificate",
                found=error.verify_message,
                remedy="find out why; if it was exchanged on purpose: inclavare verdict login URL --fingerprint …",
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(self._login.url, getattr(error, "strerror", None) or type(error).__name__) from None
        finally:
            connection.close()

    def pages(self, path: str, *, query: Mapping[str, object] | None = None) -> list[Any]:
        """All items of a list."""
        items: list[Any] = []
        after: str | None = ""
        while after is not None:
            page = self.call("GET", path, query={**(query or {}), "limit": 1000, "after": after or None})
            items += page["items"]
            after = page["next"]
        return items

    def of_tenant(self, *parts: str) -> str:
        """A path of the tenant; each part may itself have slashes."""
        return "/tenants/" + "/".join(quote(part, safe="/") for part in (quote(self.tenant, safe=""), *parts))


def context(certificate: str) -> ssl.SSLContext:
    """TLS 1.2 at least, with host names checked.

    Args:
        certificate: PEM; empty for the system's authorities.

    Raises:
        UsageError: not certificates.
    """
    try:
        made = ssl.create_default_context(cadata=certificate or None)
    except (ssl.SSLError, ValueError) as error:
        raise UsageError("these are no certificates", id="verdict.login.certificate", found=str(error),
                         expected="PEM") from None  # fmt: skip
    # The pinned certificate may be one that an authority has issued.
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return made


def client_options(function: _F) -> _F:
    """``--tenant`` and ``--json``; the command gets a :class:`Client` as ``client``."""
    from functools import wraps

    @wraps(function)
    def with_client(*, tenant: str | None, **fields: Any) -> Any:
        made = Client(Login.load())
        made.tenant = tenant or made.tenant
        return function(client=made, **fields)

    option = click.option("--tenant", help="[default: the login's]")
    return option(json_option(with_client))  # type: ignore[return-value]


def show(found: Mapping[str, Any], as_json: bool) -> None:
    """One thing."""
    if as_json:
        print_json(found)
    else:
        print_fields((name, value) for name, value in found.items() if value is not None)


def show_list(items: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Many things of one kind."""
    if as_json:
        print_json(items)
    else:
        heads = [name.replace("_", " ").upper() for name in columns]
        print_table(heads, [["-" if item[name] is None else item[name] for name in columns] for item in items])


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refusal(status: int, body: bytes) -> InclavareError:
    kinds: dict[int, type[InclavareError]] = {401: PolicyError, 403: PolicyError, 429: ResourceError,
                                              503: ResourceError}  # fmt: skip
    kind = kinds.get(status, UsageError if status < 500 else InclavareError)
    try:
        found = json.loads(body)
        return kind(
            str(found["title"]),
            id=str(found["id"]),
            found=found["found"],
            expected=found["expected"],
            remedy=found["remedy"],
        )
    except (ValueError, KeyError, TypeError):
        return kind("the service refuses", id="verdict.client.refused", found=f"HTTP status {status}")


def _unreachable(url: str, found: str) -> ResourceError:
    return ResourceError("the service cannot be reached", id="verdict.client.unreachable", found=f"{url}: {found}",
                         remedy="start it, or correct the URL: inclavare verdict login URL")  # fmt: skip
