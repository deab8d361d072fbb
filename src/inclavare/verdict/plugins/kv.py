"""``resource``: the secrets in verdictd's own store, at ``<repository>/<type>/<tag>``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..store import names
from ..store.errors import Invalid

if TYPE_CHECKING:
    from ..store import Store
    from . import Answer, Request, Workload


class KvPlugin:
    """See :class:`inclavare.verdict.plugins.Plugin`."""

    methods = frozenset({"GET"})
    needs_resource_policy = False

    def __init__(self, store: Store) -> None:
        self._store = store

    def policy(self, tenant: str, request: Request) -> str | None:
        """The secret's own policy."""
        return self._store.secrets.info(tenant, _path(request)).policy

    def fetch(self, tenant: str, request: Request, workload: Workload) -> Answer:
        """The newest version; a release-once one goes to the first TEE key that asks.

        Raises:
            Invalid: ``verdict.secret.changed``: its policy was changed after it was asked for.
        """
        from . import Answer

        path = _path(request)
        info = self._store.secrets.info(tenant, path)
        if info.policy != request.judged_by:
            raise Invalid("the secret's policy has just been changed", id="verdict.secret.changed", remedy="ask again")
        secret = self._store.secrets.fetch(tenant, path, holder=workload.holder, version=info.version)
        return Answer(secret.value, {"version": secret.info.version, "release_once": secret.info.release_once})


def _path(request: Request) -> str:
    # CoCo's command line asks for resource//repo/type/tag where the path is given without a scheme.
    parts = request.path[1:] if len(request.path) == 4 and not request.path[0] else request.path
    return names.path("/".join(parts))
