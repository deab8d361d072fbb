"""What the store refuses. Every id begins with ``verdict.store.``."""

from __future__ import annotations

from ...errors import IntegrityError, PlatformError, PolicyError, ResourceError, UsageError


class Invalid(UsageError):
    """A name, a size or another argument is not what the store takes."""


class NotFound(UsageError):
    """There is no such thing for this tenant; whether another tenant has one cannot be told from it."""


class Conflict(UsageError):
    """It exists already, is in use, or was changed meanwhile."""


class SchemaMismatch(UsageError):
    """The database's schema is not the one of this version."""


class WrongMasterKey(UsageError):
    """The master key opens nothing in this store or backup."""


class Consumed(PolicyError):
    """A release-once secret, a nonce or a session was used already."""


class QuotaExceeded(ResourceError):
    """The tenant may not have more."""


class Unavailable(ResourceError):
    """The database, or what keeps the master key, cannot be reached or is busy; trying again may succeed."""


class Damaged(IntegrityError):
    """A row, a ciphertext or a file was changed behind the store's back."""


class Unsupported(PlatformError):
    """The database's server or library lacks something that the store needs."""


def unknown(what: str) -> NotFound:
    """The one answer for "not there" and "not yours"."""
    return NotFound(
        f"no such {what}",
        id=f"verdict.store.{what.replace(' ', '_').replace('-', '_')}.unknown",
        remedy="list what the tenant has, and check the spelling",
    )
