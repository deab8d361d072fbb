"""The store as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from .audit import Audit
from .database import Database
from .evidence import EvidenceRing
from .keyring import Keyring
from .keys import Keys
from .policies import Policies
from .references import ReferenceBundles
from .secrets import Secrets
from .sessions import Sessions
from .tenants import Tenants
from .tokens import Tokens

if TYPE_CHECKING:
    from .master import MasterKey


class Store:
    """Everything that verdictd keeps. Open it with :meth:`open`; close it, or use it in a ``with`` statement.

    Attributes:
        tenants, secrets, policies, references, sessions, evidence, tokens, keys, audit: one part each.
        keyring: the keys that everything secret is encrypted under, and the rotation of the master key.
    """

    def __init__(self, database: Database, keyring: Keyring) -> None:
        self.database = database
        self.keyring = keyring
        self.secrets = Secrets(database, keyring)
        self.policies = Policies(database, keyring)
        self.references = ReferenceBundles(database, keyring)
        self.sessions = Sessions(database)
        self.evidence = EvidenceRing(database)
        self.tokens = Tokens(database)
        self.keys = Keys(database, keyring)
        self.audit = Audit(database, keyring, self.keys)
        self.tenants = Tenants(database, self.audit)

    @classmethod
    def open(cls, url: str, master: MasterKey, *, clock: Callable[[], float] = time.time) -> Store:
        """Open a store whose schema is this version's.

        Args:
            url: ``sqlite:////absolute/path`` or ``postgresql://user@host/name?sslmode=verify-full``.
            master: what the keys of this store are wrapped under. A store that has none yet takes this one.
            clock: seconds since 1970.

        Raises:
            Invalid: not such a URL, or a connection that would not be encrypted and verified.
            SchemaMismatch: no schema, an older or a newer one.
            WrongMasterKey: it opens nothing here.
            Unavailable: the database or the master key's keeper cannot be reached.
        """
        from .migrations import check

        database = Database(url, clock=clock)
        try:
            check(database.engine)
            store = cls(database, Keyring.open(database, master))
            store.tenants.ensure_system()
            return store
        except BaseException:
            database.close()
            raise

    def ping(self) -> None:
        """Readiness: the database answers.

        Raises:
            Unavailable: it does not.
        """
        from sqlalchemy import text

        self.database.read(lambda connection: connection.execute(text("SELECT 1")))

    def purge(self) -> int:
        """Remove what is expired for good: sessions, tokens, retired signing keys. Returns how many rows."""
        return self.sessions.purge() + self.tokens.purge() + self.keys.purge()

    def close(self) -> None:
        """Close all connections and forget the keys. Idempotent."""
        self.database.close()
        self.keyring.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
