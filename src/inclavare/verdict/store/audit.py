"""The audit trail: one chain of entries for each tenant, which nobody can change unnoticed.

- Each entry holds the hash of the one before; its own is SHA-256 over its canonical JSON (RFC 8785).
- The end of each chain, its *head*, is signed by the service (Ed25519), so a chain that is cut off or computed anew
  does not end where its head says.
- *Checkpoints* name the heads of all chains at one time; they are signed and chained, too. A database that was rolled
  back as a whole is consistent in itself: it is found by a checkpoint that was kept elsewhere.
- Triggers in the database refuse to change and to remove entries and checkpoints: against mistakes.

An entry is durable when :meth:`Audit.append` returns. So what it is about comes after it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from cryptography.exceptions import InvalidSignature
from sqlalchemy.engine import Connection

from ...errors import InclavareError
from . import names
from .database import Combiner, Database, Waiting
from .errors import Damaged, Invalid, unknown
from .models import AuditHeadRow, AuditRow, CheckpointRow, TenantRow, table
from .tenants import OF_TENANT, tenant_is
from .types import AuditEntry, AuditReport, Finding, SigningKey, isoformat

if TYPE_CHECKING:
    from .keyring import Keyring
    from .keys import Keys

_A, _H = AuditRow, AuditHeadRow
_CHECKPOINT = (
    CheckpointRow.number, CheckpointRow.body, CheckpointRow.hash, CheckpointRow.kid, CheckpointRow.signature
)  # fmt: skip
_HEADS = table(AuditHeadRow)
# Made once: each append runs these three.
_HEAD = (
    sa.select(TenantRow.id, TenantRow.uid, _H.seq, _H.hash)
    .join(_H, _H.tenant_id == TenantRow.id)
    .where(OF_TENANT)
    .with_for_update(of=_H)
)
_APPEND = sa.insert(table(AuditRow))
_MOVE = (
    sa.update(_HEADS)
    .where(_HEADS.c.tenant_id == sa.bindparam("of"))
    .values({name: sa.bindparam(name) for name in ("seq", "hash", "kid", "signature")})
)
_FIRST = bytes(32)
_PAGE = 1000
EXPORT = "inclavare audit export 1"


class Audit:
    """The audit trails of all tenants, and of the service itself (tenant :data:`~inclavare.verdict.store.SYSTEM`)."""

    def __init__(self, database: Database, keyring: Keyring, keys: Keys) -> None:
        self._database = database
        self._keyring = keyring
        self._keys = keys
        self._combiner: Combiner[_Appended] = Combiner(self._append_all)

    def append(
        self, tenant: str, actor: str, action: str, decision: str, detail: Mapping[str, Any] | None = None
    ) -> AuditEntry:
        """Write an entry; it is durable when this returns.

        Args:
            actor: who, at most 256 characters: a token's name, the digest of a TEE key.
            action: what, ``component.sub.event``, at most 128 characters.
            decision: ``allowed``, ``denied``, ``done``, …; at most 64 characters.
            detail: JSON, at most 64 KiB; never a secret.

        Raises:
            Invalid: one of them is not so.
            NotFound: no such tenant.
            Unavailable: it could not be written: what it is about must not happen.
        """
        names.text(actor, "actor", 256, least=1)
        names.text(action, "action", 128, least=1)
        names.text(decision, "decision", 64, least=1)
        document = names.canonical(dict(detail or {}), "detail", names.MAX_DETAIL)
        fields = {"actor": actor, "action": action, "decision": decision, "detail": document}
        entry: AuditEntry = self._combiner.submit(_Appended(tenant, fields))
        return entry

    def _append_all(self, waiting: Sequence[_Appended]) -> None:
        """Write the entries of all who wait, in one transaction, with one signature for each chain."""
        # In the same order on all replicas, so that none waits for a chain while another waits for its.
        tenants = sorted({item.tenant for item in waiting})
        try:
            key = self._keys.current("audit")
            made = self._database.write(lambda connection: [self._append(connection, t, waiting, key) for t in tenants])
        except Exception as error:
            for item in waiting:
                item.error = error
            return
        for tenant, entries in zip(tenants, made, strict=True):
            mine = [item for item in waiting if item.tenant == tenant]
            for number, item in enumerate(mine):
                item.value, item.error = (entries[number], None) if entries else (None, unknown("tenant"))

    def _append(
        self, connection: Connection, tenant: str, waiting: Sequence[_Appended], key: SigningKey
    ) -> list[AuditEntry]:
        """The entries of one tenant; none if there is no such tenant."""
        head = connection.execute(_HEAD, {"tenant": tenant}).first()
        if head is None:
            return []
        seq, hash, rows, entries = head.seq, head.hash, [], []
        for item in waiting:
            if item.tenant == tenant:
                # Here and not before: behind the lock, times are in the entries' order.
                row = {"time": self._database.now(), "previous": hash, **item.fields}
                entry = make_entry(head.uid, seq + 1, **row)
                rows.append({**row, "tenant_id": head.id, "seq": entry.seq, "hash": entry.hash})
                entries.append(entry)
                seq, hash = entry.seq, entry.hash
        connection.execute(_APPEND, rows)
        connection.execute(_MOVE, {"of": head.id, **self._head(head.uid, seq, hash, key)})
        return entries

    def entries(
        self,
        tenant: str,
        *,
        after: int = 0,
        before: int | None = None,
        limit: int = 100,
        newest_first: bool = False,
        action: str | None = None,
        decision: str | None = None,
        actor: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[AuditEntry]:
        """Entries of a tenant, without verifying them.

        Args:
            after, before: sequence numbers, themselves excluded: for the next page.
            since, until: aware times; ``until`` excluded.
        """
        equal = {_A.action: action, _A.decision: decision, _A.actor: actor}
        where = [column == value for column, value in equal.items() if value is not None]
        where.append(_A.seq > after)
        if before is not None:
            where.append(_A.seq < before)
        if since is not None:
            where.append(_A.time >= since)
        if until is not None:
            where.append(_A.time < until)
        query = _query().where(tenant_is(tenant), *where)
        query = query.order_by(_A.seq.desc() if newest_first else _A.seq).limit(limit)
        return [_entry(row) for row in self._database.read(lambda connection: connection.execute(query).all())]

    # --- checkpoints

    def checkpoint(self) -> dict[str, Any]:
        """Sign the heads of all chains. Keep the result where the database's administrator cannot reach.

        Returns:
            JSON: ``body`` (canonical JSON as a string), ``hash``, ``kid``, ``signature`` (hexadecimal).
        """
        key = self._keys.current("audit")
        now = self._database.now()

        def work(connection: Connection) -> dict[str, Any]:
            newest = sa.select(CheckpointRow.number, CheckpointRow.hash).order_by(CheckpointRow.number.desc()).limit(1)
            last = connection.execute(newest).first()
            heads = connection.execute(
                sa.select(TenantRow.uid, _H.seq, _H.hash).join(_H, _H.tenant_id == TenantRow.id)
            ).all()
            document = {
                "kind": "inclavare audit checkpoint",
                "store": self._keyring.store_uid,
                "number": 1 if last is None else last.number + 1,
                "time": isoformat(now),
                "previous": (_FIRST if last is None else last.hash).hex(),
                "heads": {row.uid: {"seq": row.seq, "hash": row.hash.hex()} for row in heads},
            }
            body = names.canonical(document, "checkpoint", 1 << 30)
            made: dict[str, Any] = {"body": body, "hash": sha256(body.encode()).digest(), "kid": key.kid}
            made["signature"] = _sign(key, body.encode())
            connection.execute(sa.insert(CheckpointRow).values(number=document["number"], **made))
            return _checkpoint_json(**made)

        return self._database.write(work)

    def checkpoints(self, *, limit: int = 100) -> list[dict[str, Any]]:
        """The newest checkpoints, the newest first."""
        query = sa.select(*_CHECKPOINT[1:]).order_by(CheckpointRow.number.desc())
        rows = self._database.read(lambda connection: connection.execute(query.limit(limit)).all())
        return [_checkpoint_json(**row._mapping) for row in rows]

    # --- verification

    def verify(self, tenant: str | None = None, *, anchors: Iterable[Mapping[str, Any]] = ()) -> AuditReport:
        """Verify trails as they are in the database, at one time.

        Args:
            tenant: one tenant's; by default all, those of deleted tenants too.
            anchors: checkpoints that were kept elsewhere: without one, a database that was rolled back as a whole,
                its checkpoints included, cannot be told.

        Raises:
            NotFound: no such tenant.
        """
        if tenant is not None:
            names.tenant(tenant, system=True)
        keys = {key.kid: key.private.public_key() for key in self._keys.every("audit")}
        return self._database.read(lambda c: self._verify(c, tenant, list(anchors), keys), snapshot=True)

    def _verify(
        self, connection: Connection, tenant: str | None, anchors: list[Mapping[str, Any]], keys: Mapping[str, Any]
    ) -> AuditReport:
        query = sa.select(TenantRow.id, TenantRow.uid)
        chains = connection.execute(query if tenant is None else query.where(tenant_is(tenant))).all()
        if tenant is not None and not chains:
            raise unknown("tenant")
        findings: list[Finding] = []
        stored = connection.execute(sa.select(*_CHECKPOINT).order_by(CheckpointRow.number)).all()
        known = _verify_checkpoints(stored, anchors, self._keyring.store_uid, keys, findings)
        total = 0
        for id, uid in chains:
            expected = known.pop(uid, {})
            walk = ChainWalk(uid, expected, findings)
            for row in _rows(connection, id):
                walk.row(row)
            columns = (_H.seq, _H.hash, _H.kid, _H.signature)
            head = connection.execute(sa.select(*columns).where(_H.tenant_id == id)).first()
            walk.end(self._keyring.store_uid, None if head is None else head._asdict(), keys)
            total += walk.seq
        if tenant is None:
            for uid in sorted(known):
                message = "checkpoints name this chain, but its tenant is not there"
                findings.append(Finding("verdict.store.audit.missing", uid, None, message))
        return AuditReport(len(chains), total, len(stored), tuple(findings))

    # --- export

    def public_keys(self) -> list[dict[str, str]]:
        """The keys, as JWKs, that heads and checkpoints are signed with. Get them over a way that you trust."""
        return [key.public_jwk() for key in self._keys.every("audit")]

    def export(self, tenant: str) -> Iterator[str]:
        """A tenant's whole trail as JSON lines: a header, the entries, the signed head.

        Raises:
            NotFound: no such tenant.
        """

        # All of it under one snapshot; page by page, because a trail can be larger than memory.
        def begin(connection: Connection) -> tuple[Any, Any]:
            row = connection.execute(sa.select(TenantRow.id, TenantRow.uid).where(tenant_is(tenant))).first()
            if row is None:
                raise unknown("tenant")
            columns = (_H.seq, _H.hash, _H.kid, _H.signature)
            return row, connection.execute(sa.select(*columns).where(_H.tenant_id == row.id)).first()

        row, head = self._database.read(begin, snapshot=True)
        if head is None:
            raise Damaged("the audit trail has no signed head", id="verdict.store.audit.head")
        yield _line(kind=EXPORT, store=self._keyring.store_uid, tenant=tenant, chain=row.uid, keys=self.public_keys())
        after = 0
        while after < head.seq:
            # Entries are never changed, so pages up to the head are as good as a snapshot.
            query = _query().where(_A.tenant_id == row.id, _A.seq > after, _A.seq <= head.seq).order_by(_A.seq)
            page = self._database.read(lambda c, query=query: c.execute(query.limit(_PAGE)).all())  # type: ignore[misc]
            if not page:
                break  # cut off; whoever verifies the export sees it
            for item in page:
                entry = _entry(item)
                yield _line(**entry_json(entry), hash=entry.hash.hex())
            after = page[-1].seq
        yield _line(kind="head", seq=head.seq, hash=head.hash.hex(), kid=head.kid, signature=head.signature.hex())

    # --- beginnings, for tenants

    def signing_key(self) -> SigningKey:
        """What a transaction signs heads with; to be had before the transaction begins."""
        return self._keys.current("audit")

    def begin(self, connection: Connection, id: int, uid: str, key: SigningKey) -> None:
        """The head of a new chain. Every tenant has one: that it is missing means that it was removed."""
        connection.execute(sa.insert(_H).values(tenant_id=id, **self._head(uid, 0, _FIRST, key)))

    def _head(self, uid: str, seq: int, hash: bytes, key: SigningKey) -> dict[str, Any]:
        signature = _sign(key, _head_body(self._keyring.store_uid, uid, seq, hash))
        return {"seq": seq, "hash": hash, "kid": key.kid, "signature": signature}


class _Appended(Waiting[AuditEntry]):
    """An entry that waits to be written."""

    def __init__(self, tenant: str, fields: dict[str, str]) -> None:
        super().__init__()
        self.tenant = tenant
        self.fields = fields


class ChainWalk:
    """Goes along one chain and notes what is wrong.

    Args:
        known: hashes of entries by number, from checkpoints.
    """

    def __init__(self, chain: str, known: Mapping[int, bytes], findings: list[Finding]) -> None:
        self.chain = chain
        self.seq = 0
        self._known = known
        self._findings = findings
        self._last = _FIRST
        self._next = 1

    def row(self, row: Any) -> None:
        """The next entry, as it lies in the database: anything at all."""
        try:
            entry = _entry(row)
            # What lies there must be canonical itself, or something could be hidden in it.
            if names.canonical(entry.detail, "detail", 1 << 30) != row.detail:
                raise ValueError
            self.step(entry)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, InclavareError):
            self._note("changed", row.seq, "the entry is not one that the service wrote")
            self.seq += 1
            self._last, self._next = row.hash, row.seq + 1

    def step(self, entry: AuditEntry) -> None:
        """The next entry, in the order of the numbers.

        Raises:
            ValueError: it has no canonical form.
        """
        if entry.hash != _hash_of(entry):
            self._note("changed", entry.seq, "the entry is not what its hash was computed over")
        elif entry.chain != self.chain:
            self._note("order", entry.seq, "the entry belongs to another chain")
        if entry.seq > self._next:
            last = f"to {entry.seq - 1} are" if entry.seq > self._next + 1 else "is"
            self._note("missing", entry.seq, f"entry {self._next} {last} missing")
        elif entry.seq < self._next or entry.previous != self._last:
            self._note("order", entry.seq, "the entry does not follow the one before it")
        if self._known.get(entry.seq, entry.hash) != entry.hash:
            self._note("checkpoint", entry.seq, "a checkpoint saw another entry here")
        self.seq += 1
        self._last, self._next = entry.hash, entry.seq + 1

    def end(self, store: str, head: Mapping[str, Any] | None, keys: Mapping[str, Any]) -> None:
        """The signed head."""
        body = b"" if head is None else _head_body(store, self.chain, head["seq"], head["hash"])
        if head is None:
            self._note("head", None, "the signed head is not there")
        elif not _signed(keys, head["kid"], head["signature"], body):
            self._note("head", None, "the head's signature is not of this service")
        elif (head["seq"], head["hash"]) != (self._next - 1, self._last):
            message = f"the signed head is entry {head['seq']}, the last one that there is is {self._next - 1}"
            self._note("tail", head["seq"], message)
        for seq in sorted(self._known):
            if seq >= self._next:
                self._note("tail", seq, f"a checkpoint saw entry {seq}, which is not there")

    def _note(self, kind: str, seq: int | None, message: str) -> None:
        self._findings.append(Finding(f"verdict.store.audit.{kind}", self.chain, seq, message))


def verify_export(lines: Iterable[str], keys: Iterable[Mapping[str, Any]]) -> AuditReport:
    """Verify an export without the store.

    Args:
        lines: from :meth:`Audit.export`.
        keys: the service's audit keys as JWKs (:meth:`Audit.public_keys`), from a way that you trust: those in the
            export itself prove nothing.

    Raises:
        Invalid: not an export.
    """
    from joserfc.jwk import OKPKey

    from .keys import thumbprint

    imported = [OKPKey.import_key(dict(key)).public_key for key in keys]
    known = {thumbprint(key): key for key in imported}
    findings: list[Finding] = []
    numbered = enumerate(lines, 1)
    header = _parsed(*next(numbered, (1, "")))
    if header.get("kind") != EXPORT:
        raise _no_export(1, f"a first line with kind {EXPORT!r}")
    try:
        store, chain = str(header["store"]), str(header["chain"])
    except KeyError:
        raise _no_export(1, "store and chain") from None
    walk = ChainWalk(chain, {}, findings)
    ended = False
    for number, line in numbered:
        fields = _parsed(number, line)
        if ended:
            raise _no_export(number, "nothing behind the head")
        try:
            if fields.get("kind") == "head":
                ended = True
                head = {"seq": int(fields["seq"]), "hash": bytes.fromhex(fields["hash"]), "kid": str(fields["kid"])}
                walk.end(store, {**head, "signature": bytes.fromhex(fields["signature"])}, known)
            else:
                walk.step(_from_json(fields))
        except (KeyError, TypeError, ValueError) as error:
            raise _no_export(number, f"an entry or a head ({type(error).__name__})") from None
    if not ended:
        findings.append(Finding("verdict.store.audit.tail", chain, None, "the export ends without a signed head"))
    return AuditReport(1, walk.seq, 0, tuple(findings))


def make_entry(
    chain: str,
    seq: int,
    time: datetime,
    *,
    actor: str,
    action: str,
    decision: str,
    detail: str,
    previous: bytes,
) -> AuditEntry:
    """An entry with its hash; ``detail`` is canonical JSON."""
    entry = AuditEntry(chain, seq, time, actor, action, decision, json.loads(detail), previous, b"")
    return replace(entry, hash=_hash_of(entry))


def entry_json(entry: AuditEntry) -> dict[str, Any]:
    """What an entry's hash is computed over, as JSON."""
    return {
        "chain": entry.chain,
        "seq": entry.seq,
        "time": isoformat(entry.time),
        "actor": entry.actor,
        "action": entry.action,
        "decision": entry.decision,
        "detail": entry.detail,
        "previous": entry.previous.hex(),
    }


def canonical_entry(entry: AuditEntry) -> bytes:
    """RFC 8785 JSON of :func:`entry_json`: what the hash is the SHA-256 of."""
    import rfc8785

    return rfc8785.dumps(entry_json(entry))


def _hash_of(entry: AuditEntry) -> bytes:
    return sha256(canonical_entry(entry)).digest()


def _head_body(store: str, chain: str, seq: int, hash: bytes) -> bytes:
    document = {"kind": "inclavare audit head", "store": store, "chain": chain, "seq": seq, "hash": hash.hex()}
    return names.canonical(document, "head", 1 << 20).encode()


def _sign(key: SigningKey, data: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    assert isinstance(key.private, Ed25519PrivateKey)
    return key.private.sign(data)


def _signed(keys: Mapping[str, Any], kid: str, signature: bytes, data: bytes) -> bool:
    key = keys.get(kid)
    if key is None:
        return False
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _verify_checkpoints(
    stored: Iterable[Any],
    anchors: Iterable[Mapping[str, Any]],
    store: str,
    keys: Mapping[str, Any],
    findings: list[Finding],
) -> dict[str, dict[int, bytes]]:
    """Verify the chain of checkpoints. Returns what they know: chain → number → hash."""
    known: dict[str, dict[int, bytes]] = {}
    hashes: dict[int, bytes] = {}

    def note(number: object, message: str) -> None:
        findings.append(Finding("verdict.store.audit.checkpoint", "", None, f"checkpoint {number}: {message}"))

    def learn(number: object, body: str, kid: str, signature: bytes) -> dict[str, Any] | None:
        if not _signed(keys, kid, signature, body.encode()):
            note(number, "its signature is not of this service")
            return None
        document: dict[str, Any] = json.loads(body)
        if document["store"] != store:
            note(number, "it is of another store")
            return None
        for chain, head in document["heads"].items():
            if head["seq"]:
                known.setdefault(chain, {}).setdefault(head["seq"], bytes.fromhex(head["hash"]))
            else:
                known.setdefault(chain, {})
        return document

    last, expected = _FIRST, 1
    # What was kept elsewhere comes first: where two differ, it is believed.
    outside = [(anchor, learn("kept elsewhere", str(anchor["body"]), str(anchor["kid"]),
                              bytes.fromhex(str(anchor["signature"])))) for anchor in anchors]  # fmt: skip
    for row in stored:
        document = learn(row.number, row.body, row.kid, row.signature)
        if document is not None and (document["number"] != row.number or row.number != expected):
            note(expected, "it is missing, or another one is in its place")
        elif document is not None and document["previous"] != last.hex():
            note(row.number, "it does not follow the one before it")
        if sha256(row.body.encode()).digest() != row.hash:
            note(row.number, "it is not what its hash was computed over")
        hashes[row.number] = row.hash
        last, expected = row.hash, row.number + 1
    for anchor, document in outside:
        if document is not None:
            digest = sha256(str(anchor["body"]).encode()).digest()
            if hashes.get(document["number"]) != digest:
                note(document["number"], "it was kept elsewhere, but is not, or differs, in the database")
    return known


def _checkpoint_json(*, body: str, hash: bytes, kid: str, signature: bytes) -> dict[str, Any]:
    return {"body": body, "hash": hash.hex(), "kid": kid, "signature": signature.hex()}


def _query() -> Any:
    columns = (TenantRow.uid, _A.seq, _A.time, _A.actor, _A.action, _A.decision, _A.detail, _A.previous, _A.hash)
    return sa.select(*columns).join(TenantRow, TenantRow.id == _A.tenant_id)


def _rows(connection: Connection, id: int) -> Iterator[Any]:
    after: int | None = None
    while True:
        query = _query().where(_A.tenant_id == id).order_by(_A.seq).limit(_PAGE)
        page = connection.execute(query if after is None else query.where(_A.seq > after)).all()
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1].seq


def _entry(row: Any) -> AuditEntry:
    return AuditEntry(
        row.uid, row.seq, row.time, row.actor, row.action, row.decision, json.loads(row.detail), row.previous, row.hash
    )


def _line(**fields: Any) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def _parsed(number: int, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise _no_export(number, "a JSON object")
    return fields


def _from_json(fields: Mapping[str, Any]) -> AuditEntry:
    text = fields["time"]
    moment = datetime.fromisoformat(text)
    if isoformat(moment) != text:
        raise ValueError("not canonical")
    strings = [fields[name] for name in ("chain", "actor", "action", "decision")]
    if not all(isinstance(item, str) for item in strings) or type(fields["seq"]) is not int:
        raise TypeError
    chain, actor, action, decision = strings
    return AuditEntry(
        chain, fields["seq"], moment, actor, action, decision, dict(fields["detail"]),
        bytes.fromhex(fields["previous"]), bytes.fromhex(fields["hash"]),
    )  # fmt: skip


def _no_export(line: int, expected: str) -> Invalid:
    return Invalid("not an export of an audit trail", id="verdict.store.audit.export", found=f"line {line}",
                   expected=expected)  # fmt: skip
