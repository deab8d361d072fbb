"""verdictd's store: tenants, secrets, policies, reference values, sessions, tokens, keys and the audit trail.

::

    migrate("sqlite:////var/lib/inclavare/verdictd/store.db")
    store = Store.open("sqlite:////var/lib/inclavare/verdictd/store.db", FileKey.load(path))
    store.secrets.put("default", "app/key/1", value, policy=None)

Every method is synchronous and may be called from any thread. Several replicas may share one PostgreSQL.
"""

from __future__ import annotations

from .errors import (
    Conflict,
    Consumed,
    Damaged,
    Invalid,
    NotFound,
    QuotaExceeded,
    SchemaMismatch,
    Unavailable,
    Unsupported,
    WrongMasterKey,
)
from .master import FileKey, MasterKey, PassphraseKey, SealedKey, TransitKey
from .migrations import migrate
from .names import SYSTEM
from .store import Store
from .types import (
    AuditEntry,
    AuditReport,
    Evidence,
    Finding,
    PolicyVersion,
    Quotas,
    ReferenceInfo,
    Secret,
    SecretInfo,
    Session,
    Signer,
    SigningKey,
    Tenant,
    TokenInfo,
)

__all__ = [
    "SYSTEM",
    "AuditEntry",
    "AuditReport",
    "Conflict",
    "Consumed",
    "Damaged",
    "Evidence",
    "FileKey",
    "Finding",
    "Invalid",
    "MasterKey",
    "NotFound",
    "PassphraseKey",
    "PolicyVersion",
    "QuotaExceeded",
    "Quotas",
    "ReferenceInfo",
    "SchemaMismatch",
    "SealedKey",
    "Secret",
    "SecretInfo",
    "Session",
    "Signer",
    "SigningKey",
    "Store",
    "Tenant",
    "TokenInfo",
    "TransitKey",
    "Unavailable",
    "Unsupported",
    "WrongMasterKey",
    "migrate",
]
