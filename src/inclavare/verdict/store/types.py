"""What the store hands out: values, none of them connected to the database. Times are aware, in UTC."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PolicyKind = Literal["toml", "attestation-rego", "resource-rego"]
Role = Literal["admin", "operator", "auditor"]
KeyKind = Literal["ear", "admin", "audit"]
SessionState = Literal["new", "taken", "attested", "refused"]


class _Json:
    """Values that become JSON: bytes as hexadecimal, times in ISO 8601; what is not shown is not in it."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        hidden = {item.name for item in fields(self) if not item.repr}  # type: ignore[arg-type]
        return {name: _plain(value) for name, value in asdict(self).items() if name not in hidden}  # type: ignore[call-overload]


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return isoformat(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def isoformat(moment: datetime) -> str:
    """``2026-07-01T12:00:00.000000Z``: always UTC, always microseconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True, slots=True)
class Quotas(_Json):
    """What a tenant may have.

    Attributes:
        secrets: paths.
        bytes: of all versions of secrets, policies and reference bundles together.
        policies: ids.
        requests: per minute; the service counts them.
    """

    secrets: int = 1000
    bytes: int = 64 << 20
    policies: int = 100
    requests: int = 6000


@dataclass(frozen=True, slots=True)
class Tenant(_Json):
    """A tenant with its quotas and what it uses of them.

    Attributes:
        uid: 32 hexadecimal digits, never used again, unlike the name: what ciphertexts and audit chains are bound to.
    """

    name: str
    uid: str
    created: datetime
    quotas: Quotas
    used_secrets: int
    used_bytes: int
    used_policies: int


@dataclass(frozen=True, slots=True)
class SecretInfo(_Json):
    """One version of a secret, without its value.

    Attributes:
        policy: id of the resource policy that it is released by; ``None`` for the tenant's default.
        size: of the value, bytes.
        released_to: the one holder that a release-once version went to.
        acknowledged: when that holder said that it has it; the value is erased since.
    """

    path: str
    version: int
    policy: str | None
    release_once: bool
    size: int
    metadata: dict[str, str]
    created: datetime
    released_to: str | None = None
    released: datetime | None = None
    acknowledged: datetime | None = None


@dataclass(frozen=True, slots=True)
class Secret(_Json):
    """A value that was read, and of which version it is."""

    info: SecretInfo
    value: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PolicyVersion(_Json):
    """One version of a policy.

    Attributes:
        sha256: of the text in UTF-8.
        restored_from: the version whose text a roll-back brought back.
        default: this policy is the tenant's default of its kind.
    """

    id: str
    kind: PolicyKind
    version: int
    text: str
    sha256: str
    author: str
    created: datetime
    restored_from: int | None = None
    default: bool = False


@dataclass(frozen=True, slots=True)
class ReferenceInfo(_Json):
    """A registered bundle of reference values.

    Attributes:
        digest: SHA-256 of the bundle, its name in the store.
        metadata: what the parser found out, for lists and pages; the decision reads the bundle itself.
    """

    digest: str
    image: str | None
    not_before: datetime | None
    not_after: datetime | None
    metadata: dict[str, Any]
    size: int
    registered: datetime
    registered_by: str
    revoked: datetime | None = None
    revoked_reason: str | None = None

    def is_active(self, now: datetime) -> bool:
        """Valid at this time, and not revoked."""
        return (
            self.revoked is None
            and (self.not_before is None or self.not_before <= now)
            and (self.not_after is None or now < self.not_after)
        )


@dataclass(frozen=True, slots=True)
class Signer(_Json):
    """A key whose reference bundles a tenant takes: PEM, SubjectPublicKeyInfo."""

    name: str
    public_key: str
    created: datetime


@dataclass(frozen=True, slots=True)
class Session(_Json):
    """One RCAR session.

    Attributes:
        nonce: what the evidence must be bound to.
        holder: hash of the attested TEE key.
        claims: what the attestation gave.
        token: the attestation token, if one was issued.
    """

    tenant: str
    tee: str
    nonce: bytes
    state: SessionState
    created: datetime
    expires: datetime
    holder: str | None = None
    claims: dict[str, Any] | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Evidence(_Json):
    """Evidence that was kept for dry-runs."""

    digest: str
    tee: str
    kept: datetime
    size: int
    envelope: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class TokenInfo(_Json):
    """An admin token, of which the store knows the ``jti`` only."""

    jti: str
    tenant: str
    name: str
    role: Role
    created: datetime
    expires: datetime
    revoked: datetime | None = None


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A signing key of the service.

    Attributes:
        kid: RFC 7638 thumbprint (SHA-256, base64url).
        algorithm: ``ES256`` or ``EdDSA``.
        private: P-256 or Ed25519.
        retires: until when signatures of it are accepted; ``None`` for the current key.
    """

    kid: str
    kind: KeyKind
    algorithm: str
    created: datetime
    retires: datetime | None
    private: EllipticCurvePrivateKey | Ed25519PrivateKey = field(repr=False)

    def public_jwk(self) -> dict[str, str]:
        """The public half as a JWK with ``kid``, ``alg`` and ``use``."""
        from .keys import public_jwk

        return {**public_jwk(self.private.public_key()), "kid": self.kid, "alg": self.algorithm, "use": "sig"}


@dataclass(frozen=True, slots=True)
class AuditEntry(_Json):
    """One entry of a tenant's audit trail.

    Attributes:
        chain: the tenant's ``uid``.
        seq: 1, 2, 3, … without a gap.
        previous: hash of the entry before, 32 bytes (zero for the first).
        hash: SHA-256 of the entry's canonical JSON (:func:`inclavare.verdict.store.audit.canonical_entry`).
    """

    chain: str
    seq: int
    time: datetime
    actor: str
    action: str
    decision: str
    detail: dict[str, Any]
    previous: bytes
    hash: bytes


@dataclass(frozen=True, slots=True)
class Finding(_Json):
    """One thing that is wrong with an audit trail.

    Attributes:
        id: ``verdict.store.audit.changed``, ``.missing``, ``.order``, ``.tail``, ``.head``, ``.checkpoint``.
    """

    id: str
    chain: str
    seq: int | None
    message: str


@dataclass(frozen=True, slots=True)
class AuditReport(_Json):
    """What verifying found: the trail is whole if there are no findings."""

    chains: int
    entries: int
    checkpoints: int
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        """Nothing was changed, removed, reordered or cut off."""
        return not self.findings
