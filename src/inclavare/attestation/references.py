"""Signed reference values: which measurements an image has, as its builder says (RFC 9334: Reference Value Provider).

A bundle is an in-toto Statement v1 in a DSSE envelope. Its subjects are the image's names and digests; its predicate::

    {"notBefore": "2026-01-01T00:00:00Z", "notAfter": "2027-01-01T00:00:00Z",
     "references": [{"tee": ["sgx"], "claims": {"mrenclave": "…", "mrsigner": "…", "isv_prod_id": 0, "isv_svn": 1}}],
     "values": {"snp_bootloader": [4]},           // further ones, for policies in Rego
     "build": {"manifestDigest": "…", "treeRoot": "…", "inclavare": "…"}}

Its id is the SHA-256 of the statement, so that signing again makes no other bundle of it. Sources: in-toto Attestation
Framework 1.0, DSSE 1.0.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from ..errors import IntegrityError, UsageError
from . import identity
from .appraisal import Failure
from .claims import Claims

if TYPE_CHECKING:
    from .signers import TrustedSigners

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
REFERENCE_TYPE = "https://inclavare-containers.io/attestation/reference-values/v1"
REVOCATION_TYPE = "https://inclavare-containers.io/attestation/revocation/v1"
#: A bundle of some hundred reference values; a sigstore bundle with its certificate and log entry is some 10 KB more.
MAX_BUNDLE = 256 << 10
MAX_ENTRIES = 256
MAX_SIGNATURES = 16

_TIME = "%Y-%m-%dT%H:%M:%SZ"
#: Names under which policies written for Trustee ask for a claim.
_ALIASES = {"mrenclave": ("mr_enclave",), "mrsigner": ("mr_signer",), "measurement": ("snp_launch_measurement",)}


class Signer(Protocol):
    """Whatever signs: a key file, or a signer elsewhere."""

    @property
    def key_id(self) -> str:
        """SHA-256 of the public key's SubjectPublicKeyInfo, hexadecimal."""

    def sign(self, message: bytes) -> bytes:
        """ECDSA P-256 with SHA-256 (DER), or Ed25519 (64 bytes)."""


def pae(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """What a DSSE signature is over: the pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign(data: bytes, signer: Signer) -> bytes:
    """A DSSE envelope around a statement; an envelope gets one signature more.

    Raises:
        IntegrityError: ``reference.malformed``.
    """
    return attach(data, signer.key_id, signer.sign(pae(envelope_payload(data))))


def attach(data: bytes, key_id: str, signature: bytes) -> bytes:
    """The same with a signature that was made elsewhere, over :func:`pae` of the statement.

    Raises:
        IntegrityError: ``reference.malformed``.
    """
    payload = envelope_payload(data)
    document = _json(data)
    signatures = [] if document.get("_type") == STATEMENT_TYPE else document.get("signatures")
    if not isinstance(signatures, list):
        _malformed("it cannot be signed again", "a sigstore bundle", "a statement or a DSSE envelope")
    others = [one for one in signatures if not isinstance(one, dict) or one.get("keyid") != key_id]
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [*others, {"keyid": key_id, "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(envelope, indent=2).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Subject:
    """An image: its name, and digests by algorithm (``sha256``, or ``inclavareTree`` for the root of the file tree)."""

    name: str
    digests: tuple[tuple[str, str], ...]

    def covers(self, wanted: str) -> bool:
        """Whether this is the image that is wanted: ``name``, ``name:tag``, ``name@sha256:…`` or ``sha256:…``."""
        name, _, digest = wanted.partition("@") if "@" in wanted else ("", "", "")
        known = {f"{algorithm}:{value}" for algorithm, value in self.digests}
        if name:
            return digest in known and _untagged(self.name) == _untagged(name)
        return wanted in known or wanted in (self.name, _untagged(self.name))


@dataclass(frozen=True, slots=True)
class ReferenceValue:
    """One accepted set of claims.

    Attributes:
        bundle: id of the bundle that says so.
        image: name of its first subject.
        tees: TEE platforms that it is for.
        claims: by name; byte strings are lower-case hexadecimal. ``isv_svn`` and ``guest_svn`` may be greater.
        not_before: seconds since 1970; ``not_after`` likewise.
        tree_root: root of the verified file tree, where the enclave has one.
    """

    bundle: str
    image: str
    tees: tuple[str, ...]
    claims: dict[str, str | int]
    not_before: int
    not_after: int
    tree_root: str | None = None

    def mismatches(self, claims: Claims) -> tuple[str, ...]:
        """Names of the claims that differ."""
        lower = identity.AT_LEAST[claims.family]
        return tuple(
            name
            for name, expected in self.claims.items()
            if (identity.found(claims, name) < expected if name in lower else identity.found(claims, name) != expected)
        )


@dataclass(frozen=True, slots=True)
class ReferenceBundle:
    """A bundle whose signature has been verified.

    Attributes:
        id: SHA-256 of the statement, hexadecimal.
        subjects: the images that it is about.
        references: accepted sets of claims.
        values: further reference values, for policies in Rego.
        not_before: seconds since 1970; ``not_after`` likewise.
        build: what its builder says about the build.
        signers: key ids, or sigstore identities, whose signatures hold.
        envelope: as it was signed.
    """

    id: str
    subjects: tuple[Subject, ...]
    references: tuple[ReferenceValue, ...]
    values: dict[str, Any]
    not_before: int
    not_after: int
    build: dict[str, Any]
    signers: tuple[str, ...]
    envelope: bytes = field(repr=False)

    @classmethod
    def parse(cls, data: bytes, trusted: TrustedSigners) -> ReferenceBundle:
        """Verify and read a bundle: a DSSE envelope, or a sigstore bundle around one. Its validity is not checked here.

        Raises:
            IntegrityError: ``reference.malformed``, ``reference.signature`` or ``reference.signer``.
        """
        payload, signers = _verified(data, trusted)
        return cls.read(payload, signers, data)

    @classmethod
    def read(cls, payload: bytes, signers: tuple[str, ...] = (), envelope: bytes = b"") -> ReferenceBundle:
        """Read a statement, without any signature.

        Raises:
            IntegrityError: ``reference.malformed``.
        """
        subjects, predicate = _statement(payload, REFERENCE_TYPE)
        _keys(predicate, "the predicate", {"notBefore", "notAfter", "references"}, {"values", "build"})
        not_before, not_after = _time(predicate, "notBefore"), _time(predicate, "notAfter")
        if not_after <= not_before:
            _malformed("it ends before it begins", predicate["notAfter"], f"later than {predicate['notBefore']}")
        bundle = hashlib.sha256(payload).hexdigest()
        build = _mapping(predicate.get("build", {}), "build")
        tree_root = build.get("treeRoot")
        if tree_root is not None:
            tree_root = _hexadecimal("build.treeRoot", tree_root, 32)
        entries = predicate["references"]
        if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_ENTRIES:
            _malformed("references", None, f"a list of 1 to {MAX_ENTRIES}")
        references = tuple(
            ReferenceValue(
                bundle, subjects[0].name, *_entry(entry, f"references[{index}]"), not_before, not_after, tree_root
            )
            for index, entry in enumerate(entries)
        )
        values = _mapping(predicate.get("values", {}), "values")
        return cls(bundle, subjects, references, values, not_before, not_after, build, signers, envelope)

    def covers(self, wanted: str) -> bool:
        """Whether this is the wanted bundle, by its id or its envelope's digest, or about the wanted image."""
        if wanted == self.id or any(subject.covers(wanted) for subject in self.subjects):
            return True
        return len(wanted) == 64 and wanted == hashlib.sha256(self.envelope).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "id": self.id,
            "subjects": [{"name": subject.name, "digest": dict(subject.digests)} for subject in self.subjects],
            "references": [{"tee": list(entry.tees), "claims": entry.claims} for entry in self.references],
            "values": self.values,
            "not_before": _text(self.not_before),
            "not_after": _text(self.not_after),
            "build": self.build,
            "signers": list(self.signers),
        }


def statement(
    subjects: Iterable[Subject],
    references: Iterable[tuple[Iterable[str], Mapping[str, str | int]]],
    *,
    not_before: int,
    not_after: int,
    values: Mapping[str, Any] | None = None,
    build: Mapping[str, Any] | None = None,
) -> bytes:
    """The statement of a bundle, to be signed: canonical JSON (RFC 8785).

    Args:
        references: TEE platforms and claims, by name, of each accepted set.
        not_before: seconds since 1970; ``not_after`` likewise.

    Raises:
        IntegrityError: ``reference.malformed``: the result could not be read back.
    """
    predicate: dict[str, Any] = {
        "notBefore": _text(not_before),
        "notAfter": _text(not_after),
        "references": [{"tee": list(tees), "claims": dict(claims)} for tees, claims in references],
    }
    predicate |= {name: dict(given) for name, given in (("values", values), ("build", build)) if given}
    made = _canonical(subjects, REFERENCE_TYPE, predicate)
    ReferenceBundle.read(made)
    return made


def revocation(bundles: Iterable[str], reason: str, at: int) -> bytes:
    """The statement of a revocation, to be signed.

    Args:
        bundles: ids.
        at: seconds since 1970.
    """
    subjects = [Subject(f"reference bundle {bundle[:12]}", (("sha256", bundle),)) for bundle in bundles]
    return _canonical(subjects, REVOCATION_TYPE, {"reason": reason, "revokedAt": _text(at)})


def revoked(data: bytes, trusted: TrustedSigners) -> dict[str, str]:
    """Verify and read a revocation: reasons by bundle id.

    Raises:
        IntegrityError: ``reference.malformed``, ``reference.signature`` or ``reference.signer``.
    """
    payload, _ = _verified(data, trusted)
    subjects, predicate = _statement(payload, REVOCATION_TYPE)
    _keys(predicate, "the predicate", {"reason", "revokedAt"}, set())
    _time(predicate, "revokedAt")
    reason = predicate["reason"]
    if not isinstance(reason, str) or not reason:
        _malformed("reason", reason, "text")
    return {value: reason for subject in subjects for name, value in subject.digests if name == "sha256"}


class References:
    """Registered reference values, of one tenant or one directory.

    Args:
        bundles: verified ones.
        revoked: reasons by bundle id.
    """

    def __init__(self, bundles: Iterable[ReferenceBundle] = (), revoked: Mapping[str, str] | None = None) -> None:
        self.bundles = tuple(bundles)
        self.revoked = dict(revoked or {})

    def of(self, names: Iterable[str]) -> References:
        """Only what these ids or images name."""
        wanted = tuple(names)
        return References(
            (bundle for bundle in self.bundles if any(bundle.covers(name) for name in wanted)), self.revoked
        )

    def require_active(self, bundle: ReferenceBundle, now: int | None = None) -> None:
        """Refuse a bundle that is revoked or out of date.

        Raises:
            IntegrityError: ``reference.revoked``, ``.expired`` or ``.not_yet_valid``.
        """
        refusal = self._refusal(bundle, int(time.time()) if now is None else now)
        if refusal is not None:
            raise IntegrityError(
                "the reference bundle does not count",
                id=refusal.id.removeprefix("policy."),
                found=refusal.found,
                expected=refusal.expected,
                remedy=refusal.remedy,
            )

    def active(self, now: int | None = None) -> tuple[ReferenceBundle, ...]:
        """Bundles that are valid and not revoked."""
        moment = int(time.time()) if now is None else now
        return tuple(bundle for bundle in self.bundles if self._refusal(bundle, moment) is None)

    def values(self, image: str | None, tee: str, now: int | None = None) -> list[ReferenceValue]:
        """What is accepted on a TEE platform now, of one image or of all."""
        return [
            value
            for bundle in self.active(now)
            if image is None or bundle.covers(image)
            for value in bundle.references
            if tee in value.tees
        ]

    def match(self, claims: Claims, names: tuple[str, ...]) -> ReferenceValue | tuple[Failure, ...]:
        """The reference value that the claims match, or why there is none."""
        chosen = self.of(names)
        if not chosen.bundles:
            return (
                _failure(
                    "unknown",
                    "reference",
                    f"{len(self.bundles)} bundles, of other images",
                    " or ".join(names),
                    _REGISTER,
                ),
            )
        found = [
            (len(value.mismatches(claims)), -value.not_before, bundle.id, bundle, value)
            for bundle in chosen.bundles
            for value in bundle.references
            if claims.tee in value.tees
        ]
        if not found:
            platforms = sorted({tee for bundle in chosen.bundles for value in bundle.references for tee in value.tees})
            return (_failure("tee", "tee", claims.tee, " or ".join(platforms), _REGISTER, chosen.bundles[0].id),)
        found.sort(key=lambda candidate: candidate[:3])
        moment = claims.verified_at
        for differing, _, _, bundle, value in found:
            if not differing and self._refusal(bundle, moment) is None:
                return value
        usable = [candidate for candidate in found if self._refusal(candidate[3], moment) is None]
        if not found[0][0] or not usable:
            refusal = self._refusal(found[0][3], moment)
            assert refusal is not None
            return (refusal,)
        closest = usable[0][4]
        return tuple(
            _failure(
                name,
                name,
                identity.found(claims, name),
                _expected(name, [candidate[4] for candidate in usable], claims.family),
                f"this is not what bundle {closest.bundle[:12]} describes: deploy that image, or build this one with "
                "--reference-bundle and register it",
                closest.bundle,
            )
            for name in closest.mismatches(claims)
        )

    def rego_data(self, tee: str, now: int | None = None) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
        """What ``query_reference_value`` answers, by name, and the ids of the bundles that each answer is from.

        Measured values and lists are gathered from all active bundles. Single values on which two bundles disagree are
        left out: the policy finds none and refuses.
        """
        answers: dict[str, Any] = {}
        sources: dict[str, tuple[str, ...]] = {}
        disagreed: set[str] = set()

        def add(name: str, value: Any, bundle: str) -> None:
            if isinstance(value, list) and isinstance(answers.get(name, []), list):
                gathered = answers.setdefault(name, [])
                gathered += [item for item in value if item not in gathered]
            elif name in answers and (answers[name] != value or type(answers[name]) is not type(value)):
                disagreed.add(name)
            else:
                answers[name] = value
            if bundle not in sources.get(name, ()):
                sources[name] = (*sources.get(name, ()), bundle)

        for bundle in self.active(now):
            usable = [value for value in bundle.references if tee in value.tees]
            for entry in usable:
                for name, value in entry.claims.items():
                    for known in (name, *_ALIASES.get(name, ())):
                        add(known, [value], bundle.id)
            for name, value in bundle.values.items() if usable else ():
                add(name, value, bundle.id)
        return {name: value for name, value in answers.items() if name not in disagreed}, sources

    def _refusal(self, bundle: ReferenceBundle, now: int) -> Failure | None:
        if bundle.id in self.revoked:
            return _failure(
                "revoked",
                "reference",
                f"bundle {bundle.id[:12]} is revoked: {self.revoked[bundle.id]}",
                "a bundle that is not revoked",
                "deploy an image whose reference values are not revoked",
                bundle.id,
            )
        if not bundle.not_before <= now <= bundle.not_after:
            event = "expired" if now > bundle.not_after else "not_yet_valid"
            return _failure(
                event,
                "reference",
                f"bundle {bundle.id[:12]}, valid from {_text(bundle.not_before)} to {_text(bundle.not_after)}",
                f"one that is valid at {_text(now)}",
                "have it issued anew by who signs reference values, and register that",
                bundle.id,
            )
        return None


_REGISTER = "build the image with --reference-bundle, and register the bundle"


def _failure(
    event: str, claim: str, found: object, expected: object, remedy: str, reference: str | None = None
) -> Failure:
    return Failure(f"policy.reference.{event}", claim, str(found), str(expected), remedy, reference)


def _expected(name: str, candidates: list[ReferenceValue], family: str) -> str:
    """Accepted values, each with the bundle that it is from; a few, where there are many."""
    values: dict[str | int, str] = {}
    for candidate in candidates:
        if name in candidate.claims:
            values.setdefault(candidate.claims[name], candidate.bundle[:12])
    least = "at least " if name in identity.AT_LEAST[family] else ""
    texts = [f"{least}{value} (bundle {bundle})" for value, bundle in values.items()]
    return " or ".join(texts[:4]) + (f" or {len(texts) - 4} others" if len(texts) > 4 else "")


def _verified(data: bytes, trusted: TrustedSigners) -> tuple[bytes, tuple[str, ...]]:
    if len(data) > MAX_BUNDLE:
        _malformed("too large", f"{len(data)} bytes", f"at most {MAX_BUNDLE}")
    envelope = _mapping(_json(data), "the envelope")
    if str(envelope.get("mediaType", "")).startswith("application/vnd.dev.sigstore.bundle"):
        kind, payload, signers = trusted.verify_sigstore(data)
    else:
        kind, payload, signers = _dsse(envelope, trusted)
    if kind != PAYLOAD_TYPE:
        _malformed("payloadType", kind, PAYLOAD_TYPE)
    return payload, signers


def _dsse(envelope: dict[str, Any], trusted: TrustedSigners) -> tuple[str, bytes, tuple[str, ...]]:
    _keys(envelope, "the envelope", {"payload", "payloadType", "signatures"}, set())
    kind, payload = envelope["payloadType"], _base64("payload", envelope["payload"])
    if not isinstance(kind, str):
        _malformed("payloadType", kind, PAYLOAD_TYPE)
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= MAX_SIGNATURES:
        _malformed("signatures", None, f"a list of 1 to {MAX_SIGNATURES}")
    message = pae(payload, kind)
    pairs = []
    for signature in signatures:
        _keys(_mapping(signature, "a signature"), "a signature", {"sig"}, {"keyid"})
        pairs.append((signature.get("keyid") or None, _base64("sig", signature["sig"])))
    return kind, payload, trusted.verify(message, pairs)


def envelope_payload(data: bytes) -> bytes:
    """The statement in a DSSE or sigstore bundle, without verifying anything: for looking at it.

    Raises:
        IntegrityError: ``reference.malformed``.
    """
    if len(data) > MAX_BUNDLE:
        _malformed("too large", f"{len(data)} bytes", f"at most {MAX_BUNDLE}")
    document = _mapping(_json(data), "the bundle")
    if document.get("_type") == STATEMENT_TYPE:
        return data
    envelope = _mapping(document.get("dsseEnvelope", document), "the envelope")
    return _base64("payload", envelope.get("payload"))


def _canonical(subjects: Iterable[Subject], kind: str, predicate: dict[str, Any]) -> bytes:
    import rfc8785

    document: Any = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": subject.name, "digest": dict(subject.digests)} for subject in subjects],
        "predicateType": kind,
        "predicate": predicate,
    }
    try:
        return bytes(rfc8785.dumps(document))
    except (ValueError, TypeError) as error:
        _malformed("values that are not JSON", str(error))


def _statement(payload: bytes, wanted: str) -> tuple[tuple[Subject, ...], dict[str, Any]]:
    document = _mapping(_json(payload), "the statement")
    _keys(document, "the statement", {"_type", "subject", "predicateType", "predicate"}, set())
    if document["_type"] != STATEMENT_TYPE:
        _malformed("_type", document["_type"], STATEMENT_TYPE)
    if document["predicateType"] != wanted:
        _malformed("predicateType", document["predicateType"], wanted)
    given = document["subject"]
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_ENTRIES:
        _malformed("subject", None, f"a list of 1 to {MAX_ENTRIES}")
    subjects = []
    for one in given:
        _keys(_mapping(one, "a subject"), "a subject", {"name", "digest"}, {"uri", "mediaType"})
        digests = _mapping(one["digest"], "a subject's digest")
        if not isinstance(one["name"], str) or not one["name"] or not digests:
            _malformed("a subject", one["name"], "a name and a digest")
        pairs = tuple((name, _hexadecimal(f"digest.{name}", value, None)) for name, value in digests.items())
        subjects.append(Subject(one["name"], pairs))
    return tuple(subjects), _mapping(document["predicate"], "the predicate")


def _entry(value: Any, where: str) -> tuple[tuple[str, ...], dict[str, str | int]]:
    _keys(_mapping(value, where), where, {"tee", "claims"}, set())
    tees, claims = value["tee"], _mapping(value["claims"], f"{where}.claims")
    if not isinstance(tees, list) or not tees or not all(isinstance(tee, str) and tee in identity.TEES for tee in tees):
        _malformed(f"{where}.tee", tees, "a list of some of " + ", ".join(identity.TEES))
    families = {identity.family(tee) for tee in tees}
    if len(families) != 1:
        _malformed(f"{where}.tee", tees, "TEEs of one family")
    kind = families.pop()
    lengths, numbers = identity.MEASURED[kind], identity.EXACT[kind] | identity.AT_LEAST[kind]
    checked: dict[str, str | int] = {}
    for name, claim in claims.items():
        if name in lengths:
            checked[name] = _hexadecimal(f"{where}.claims.{name}", claim, lengths[name])
        elif name in numbers:
            checked[name] = _checked(f"{where}.claims.{name}", claim, partial(identity.number, greatest=numbers[name]))
        else:
            _malformed(f"{where}.claims has the unknown claim {name}", None, ", ".join([*lengths, *numbers]))
    if not checked.keys() & set(identity.IDENTIFYING[kind]):
        _malformed(f"{where}.claims says not what runs", ", ".join(checked), " or ".join(identity.IDENTIFYING[kind]))
    # In the order of importance, which denials keep.
    return tuple(tees), {name: checked[name] for name in (*lengths, *numbers) if name in checked}


def _checked(where: str, value: Any, convert: Callable[[Any], Any]) -> Any:
    try:
        return convert(value)
    except ValueError as error:
        _malformed(where, value, str(error))


def _hexadecimal(where: str, value: Any, length: int | None) -> str:
    if length is not None:
        return str(_checked(where, value, partial(identity.hexadecimal, length=length)))
    if not isinstance(value, str) or len(value) > 256 or not re.fullmatch(r"([0-9a-f]{2})+", value):
        _malformed(where, value, "lower-case hexadecimal")
    return value


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        _malformed("not JSON", str(error)[:200])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice in one object")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _malformed(what, type(value).__name__, "an object")
    return value


def _keys(value: dict[str, Any], what: str, needed: set[str], allowed: set[str]) -> None:
    wrong = (needed - value.keys()) | (value.keys() - needed - allowed)
    if wrong:
        _malformed(f"keys of {what}", ", ".join(sorted(wrong)), ", ".join(sorted(needed | allowed)))


def _base64(what: str, value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError):
        _malformed(what, None, "base64")


def _time(predicate: dict[str, Any], key: str) -> int:
    value = predicate[key]
    try:
        moment = datetime.strptime(value, _TIME).replace(tzinfo=UTC)
        if moment.strftime(_TIME) != value:
            raise ValueError
        return int(moment.timestamp())
    except (ValueError, TypeError):
        _malformed(key, value, "a time like 2026-01-31T12:00:00Z")


def _text(moment: int) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).strftime(_TIME)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            "this is not a time", id="reference.time", found=moment, expected="seconds since 1970"
        ) from None


def _untagged(name: str) -> str:
    head, colon, tag = name.rpartition(":")
    return head if colon and "/" not in tag else name


def _malformed(what: str, found: object, expected: object = None) -> NoReturn:
    raise IntegrityError(
        f"the reference bundle is malformed: {what}",
        id="reference.malformed",
        found=None if found is None else str(found)[:200],
        expected=expected,
        remedy="pass a bundle that `inclavare build --reference-bundle` or `inclavare reference` made",
    )
