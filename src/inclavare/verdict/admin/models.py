"""Bodies of requests, which are taken strictly, and of answers."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from .common import HEX, IDENTIFIER

_T = TypeVar("_T")
PolicyKind = Literal["toml", "attestation-rego", "resource-rego"]
Role = Literal["admin", "operator", "auditor"]
#: A quota: what every JSON implementation has as an integer.
_Count = Annotated[int, Field(ge=0, le=(1 << 53) - 1)]
_Name = Annotated[str, Field(pattern=IDENTIFIER)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Page(_Answer, Generic[_T]):
    """A page of a list."""

    items: list[_T]
    next: str | None = Field(description="Give it as `after` for the next page; null on the last one.")


class Problem(_Answer):
    """A refusal (RFC 9457)."""

    type: str = Field(examples=["urn:inclavare:verdict.store.secret.unknown"])
    title: str = Field(description="One sentence.")
    status: int
    id: str = Field(description="`component.sub.event`; never reworded.", examples=["verdict.store.secret.unknown"])
    found: str | None
    expected: str | None
    remedy: str | None = Field(description="What to do.")
    request: str = Field(description="The request's id, as in the service's log and audit trail.")


class Quotas(_Answer):
    """What a tenant may have."""

    secrets: int
    bytes: int = Field(description="Of secrets, policies and reference bundles, all versions.")
    policies: int
    requests: int = Field(description="A minute.")


class QuotasPut(_Request):
    """Quotas; what is not named is verdictd.toml's default."""

    secrets: _Count | None = None
    bytes: _Count | None = None
    policies: _Count | None = None
    requests: _Count | None = None


class TenantPost(_Request):
    """A new tenant."""

    name: str = Field(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$", examples=["payments"])
    quotas: QuotasPut = QuotasPut()


class Tenant(_Answer):
    """A tenant with its quotas and what it uses of them."""

    name: str
    uid: str
    created: datetime
    quotas: Quotas
    used_secrets: int
    used_bytes: int
    used_policies: int


class SecretPut(_Request):
    """A secret's value."""

    value: str = Field(description="base64 (RFC 4648, section 4).", examples=["c2VjcmV0"])
    policy: _Name | None = Field(None, description="Policy that it is released by; by default the tenant's.")
    release_once: bool = Field(False, description="To one workload only, ever.")
    metadata: dict[str, str] = Field({}, description="Not secret; at most 4 KiB.")


class Secret(_Answer):
    """A version of a secret, without its value."""

    path: str = Field(examples=["app/key/1"])
    version: int
    policy: str | None
    release_once: bool
    size: int = Field(description="Bytes.")
    metadata: dict[str, str]
    created: datetime
    released_to: str | None = Field(description="Whom a release-once version went to: digest of the TEE's key.")
    released: datetime | None
    acknowledged: datetime | None


class PolicyPut(_Request):
    """A policy's text."""

    kind: PolicyKind
    text: str = Field(examples=['mrsigner = ["…"]\n'])


class Policy(_Answer):
    """A version of a policy."""

    id: str
    kind: PolicyKind
    version: int
    text: str
    sha256: str
    author: str
    created: datetime
    restored_from: int | None = Field(description="The version that a roll-back brought back.")
    default: bool = Field(description="The tenant's default of its kind.")


class Rollback(_Request):
    """Which version to bring back."""

    version: int = Field(ge=1, le=(1 << 31) - 1)


class Diff(_Answer):
    """What changed between two versions."""

    id: str
    old: int
    new: int
    diff: str = Field(description="Unified diff; empty if the texts are the same.")


class DryRunPost(_Request):
    """What to try out: a text, a policy of the tenant, or, without either, its policies as they are."""

    kind: PolicyKind | None = None
    text: str | None = None
    policy: _Name | None = None
    version: int | None = Field(None, ge=1, le=(1 << 31) - 1)
    evidence: list[Annotated[str, Field(pattern=HEX)]] | None = Field(
        None, max_length=50, description="Digests; by default the newest that is kept."
    )
    limit: int = Field(20, ge=1, le=50, description="How much of the newest.")
    resource: str = Field(
        "default/key/1",
        max_length=386,
        pattern=r"^[^/\x00-\x1f]+/[^/\x00-\x1f]+/[^/\x00-\x1f]+$",
        description="What a resource policy is asked about.",
    )


class Failure(_Answer):
    """A failed check."""

    id: str
    claim: str | None = None
    found: str | None = None
    expected: str | None = None
    remedy: str | None = None
    reference: str | None = Field(None, description="The reference bundle that the expected value is from.")


class Release(_Answer):
    """What a resource policy would have said."""

    allowed: bool
    failures: list[Failure]


class DryRunResult(_Answer):
    """What would have been decided about one piece of evidence."""

    evidence: str
    tee: str
    kept: datetime
    accepted: bool
    failures: list[Failure]
    release: Release | None = None


class DryRun(_Answer):
    """A dry-run: nothing was changed or released."""

    accepted: int
    refused: int
    results: list[DryRunResult]


class Reference(_Answer):
    """A registered bundle of reference values."""

    digest: str = Field(description="SHA-256 of the bundle as it was signed.")
    image: str | None
    not_before: datetime | None
    not_after: datetime | None
    metadata: dict[str, Any]
    size: int
    registered: datetime
    registered_by: str
    revoked: datetime | None
    revoked_reason: str | None


class Revocation(_Request):
    """Why."""

    reason: str = Field(min_length=1, max_length=1000, examples=["CVE-2026-0001"])


class SignerPut(_Request):
    """A key whose reference bundles the tenant takes."""

    public_key: str = Field(max_length=8192, description="PEM, ECDSA P-256 or Ed25519.")


class Signer(_Answer):
    """A trusted signer."""

    name: str
    public_key: str
    created: datetime


class TokenPost(_Request):
    """A new token."""

    name: _Name = Field(examples=["ci"])
    role: Role
    lifetime: int = Field(86400, ge=60, description="Seconds; at most `auth.token_life` of verdictd.toml.")


class Token(_Answer):
    """A token, without itself."""

    jti: str
    tenant: str
    name: str
    role: Role
    created: datetime
    expires: datetime
    revoked: datetime | None


class NewToken(Token):
    """A new token: this is the only time that it is shown."""

    token: str


class Evidence(_Answer):
    """Evidence that is kept for dry-runs."""

    digest: str
    tee: str
    kept: datetime
    size: int


class AuditEntry(_Answer):
    """An entry of the audit trail."""

    chain: str
    seq: int
    time: datetime
    actor: str
    action: str
    decision: str
    detail: dict[str, Any]
    previous: str
    hash: str


class AuditPage(_Answer):
    """Entries of the audit trail."""

    items: list[AuditEntry]
    next: int | None = Field(description="Give it as `after`, or as `before` if the newest come first.")


class Anchor(_Request):
    """A checkpoint that was kept elsewhere."""

    body: str
    hash: str = Field("", pattern=r"^(?:[0-9a-f]{64})?$")
    kid: str
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")


class VerifyPost(_Request):
    """What to verify against."""

    anchors: list[Anchor] = Field([], max_length=100)


class Finding(_Answer):
    """Something that is wrong with an audit trail."""

    id: str
    chain: str
    seq: int | None
    message: str


class AuditReport(_Answer):
    """What verifying found."""

    whole: bool
    chains: int
    entries: int
    checkpoints: int
    findings: list[Finding]


class Checkpoint(_Answer):
    """Signed ends of all audit trails: keep it where the database's administrator cannot reach."""

    body: str
    hash: str
    kid: str
    signature: str


class Keys(_Answer):
    """Public keys (RFC 7517)."""

    keys: list[dict[str, str]]


class Grant(_Answer):
    """A role."""

    tenant: str = Field(description="`*`: all of them.")
    role: Role


class Info(_Answer):
    """The service, and who asks."""

    service: Literal["verdictd"]
    version: str
    actor: str
    grants: list[Grant]
    ready: bool = Field(description="The database answers.")
    time: datetime
