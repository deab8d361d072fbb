"""What all routes share: who may, what is written down, pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends, Path, Query, Request

from ...errors import InclavareError
from ..auth import Principal
from ..store import SYSTEM, Invalid
from ..telemetry import request_id

if TYPE_CHECKING:
    from ..store import Store
    from ..store.types import Role

_T = TypeVar("_T")
TENANT_PATTERN = r"^(?:_system|[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)$"
IDENTIFIER = r"^[A-Za-z0-9_][A-Za-z0-9._@+-]{0,127}$"
SEGMENT = r"^[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?$"
HEX = r"^(?:[0-9a-f]{2}){1,64}$"
DIGEST = r"^[0-9a-f]{64}$"

TenantName = Annotated[
    str, Path(pattern=TENANT_PATTERN, description="The tenant; `_system` is the service itself.", examples=["default"])
]
PolicyId = Annotated[str, Path(pattern=IDENTIFIER, description="The policy's id.", examples=["production"])]
Limit = Annotated[int, Query(ge=1, le=1000, description="Items on a page.")]
Cursor = Annotated[str, Query(max_length=512, description="`next` of the page before.")]


def _needs(role: Role) -> Any:
    async def allowed(request: Request, tenant: TenantName) -> Principal:
        principal: Principal = request.scope["verdict.principal"]
        principal.require(tenant, role)
        return principal

    return Depends(allowed)


def _needs_all(role: Role) -> Any:
    async def allowed(request: Request) -> Principal:
        principal: Principal = request.scope["verdict.principal"]
        principal.require(SYSTEM, role)
        return principal

    return Depends(allowed)


Auditor = Annotated[Principal, _needs("auditor")]
Operator = Annotated[Principal, _needs("operator")]
Admin = Annotated[Principal, _needs("admin")]
#: With a role for all tenants.
SystemAuditor = Annotated[Principal, _needs_all("auditor")]
SystemAdmin = Annotated[Principal, _needs_all("admin")]


@contextmanager
def changing(
    store: Store, who: Principal, tenant: str, action: str, detail: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Write a change down before it is made; and if it is not made, why.

    Raises:
        NotFound: there is no such tenant.
        Unavailable: it cannot be written, so nothing is changed.
    """
    facts = {"request": request_id.get(), **(detail or {})}
    store.audit.append(tenant, who.actor, action, "allowed", facts)
    try:
        yield
    except InclavareError as error:
        failure = {"id": error.id, "found": str(error.found)[:512], "expected": str(error.expected)[:512]}
        store.audit.append(tenant, who.actor, action, "failed", {**facts, "reasons": [failure]})
        raise


def ordinary(tenant: str) -> str:
    """The tenant, which is not the service itself: that has no secrets, policies or reference values.

    Raises:
        Invalid: it is.
    """
    if tenant == SYSTEM:
        raise Invalid("this is the service itself", id="verdict.api.system", found=tenant, expected="a tenant")
    return tenant


def existing(store: Store, tenant: str, *, system: bool = False) -> str:
    """The tenant, which there is.

    Args:
        system: the service itself will do, too.

    Raises:
        Invalid, NotFound: it is the service itself, or there is none.
    """
    return tenant if system and tenant == SYSTEM else store.tenants.get(ordinary(tenant)).name


def page(items: Sequence[_T], name: Callable[[_T], str], after: str, limit: int) -> dict[str, Any]:
    """A page of items that are sorted here by a unique name."""
    left = sorted((item for item in items if name(item) > after), key=name)
    shown = left[:limit]
    return {
        "items": [item.to_dict() for item in shown],  # type: ignore[attr-defined]
        "next": name(shown[-1]) if len(left) > limit else None,
    }
