"""The root keys, wrapped under the master key; and how either is exchanged while the service runs.

::

    master key ── wraps ──▶ root key, generation n ── wraps ──▶ data keys ── encrypt ──▶ values
    (file, passphrase, Vault, enclave)         └── and the integrity key, which authenticates policies and references

A root key can have several *slots*: the same key, wrapped under several master keys. Rotation makes a new generation
with a slot for the old and one for the new master key, wraps every data key again, batch by batch, and then removes
the old generation. Replicas that know either master key work all the while. The database itself refuses to remove a
generation that a row still needs, so whatever is interrupted, or races, loses nothing; rotating again goes on.
"""

from __future__ import annotations

import hmac
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import rfc8785
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...shield.secrets import Secret as ProtectedKey
from . import crypto
from .crypto import Envelope, context
from .database import Database
from .errors import Conflict, Damaged, Unavailable, WrongMasterKey
from .master import MasterKey
from .models import RootKeyRow, RootKeySlotRow, SecretVersionRow, SigningKeyRow, StoreRow, TenantRow

_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Slot:
    """A root key, wrapped under one master key.

    Attributes:
        master: names the master key: a digest of its kind and parameters.
    """

    generation: int
    master: str
    kind: str
    parameters: dict[str, Any]
    wrapped: bytes


class Keyring:
    """The keys of an open store. Use :meth:`open`."""

    def __init__(self, database: Database, master: MasterKey) -> None:
        self._database = database
        self._master = master
        self._roots: dict[int, ProtectedKey] = {}
        self._lock = threading.RLock()
        self._integrity = ProtectedKey(b"")
        self.store_uid = ""

    @classmethod
    def open(cls, database: Database, master: MasterKey) -> Keyring:
        """Unwrap the root keys; a new store gets its first one.

        Raises:
            WrongMasterKey: it opens none of them.
            Damaged: the store's keys were removed or exchanged.
            Unavailable: the master key's keeper, or the database, cannot be reached.
        """
        ring = cls(database, master)
        row = database.read(_store_row)
        if row is None:
            ring._initialise()
            row = database.read(_store_row)
        if row is None:
            raise crypto.damaged()
        ring.store_uid = row.uid
        aad = _integrity_aad(row.uid)
        ring._integrity = ProtectedKey(crypto.unwrap(ring._root(row.generation), row.generation, row.wrapped_key, aad))
        return ring

    # --- encryption

    def seal(self, connection: Connection, value: bytes, aad: bytes) -> Envelope:
        """Encrypt under the newest root key, within the transaction that stores the result."""
        # The lock keeps the generation there until the row that needs it is there.
        newest = sa.select(RootKeyRow.generation).order_by(RootKeyRow.generation.desc()).limit(1)
        generation = connection.execute(newest.with_for_update(read=True, key_share=True)).scalar_one()
        return crypto.seal(self._root(generation, connection), generation, value, self._bound(aad))

    def unseal(self, envelope: Envelope, aad: bytes) -> bytes:
        """Decrypt.

        Raises:
            Damaged: it was changed, or is not where it belongs.
        """
        return crypto.unseal(self._root(envelope.generation), envelope, self._bound(aad))

    def derive(self, purpose: str, salt: bytes) -> tuple[int, bytes]:
        """The newest generation, and a 32-byte key derived from its root key."""
        generation = self._database.read(
            lambda c: c.execute(sa.select(sa.func.max(RootKeyRow.generation))).scalar_one()
        )
        return generation, crypto.derive(self._root(generation), purpose, salt)

    def _bound(self, aad: bytes) -> bytes:
        return context(self.store_uid) + aad

    # --- integrity

    def mac(self, *parts: object) -> bytes:
        """Authenticate a row that is not encrypted: 32 bytes, HMAC-SHA256."""
        return crypto.mac(self._integrity.reveal(), self.store_uid, *parts)

    def check(self, mac: bytes, *parts: object) -> None:
        """Verify what :meth:`mac` made.

        Raises:
            Damaged: the row was changed behind the store's back.
        """
        # SQLite's columns hold any type.
        if not isinstance(mac, bytes) or not hmac.compare_digest(mac, self.mac(*parts)):
            raise Damaged(
                f"a row of the store was changed behind its back: {parts[0]}",
                id="verdict.store.row.damaged",
                found="a message authentication code that does not belong to it",
                remedy="restore a backup, verify the audit trail, and find out who can write to the database",
            )

    # --- master keys

    def slots(self) -> list[Slot]:
        """Which master keys open which generation."""
        return self._database.read(_slots)

    def rotate(
        self, new: MasterKey, *, retire: bool = True, batch: int = 200, progress: Callable[[int], None] | None = None
    ) -> int:
        """Exchange the master key and the root key. The service, and other replicas, work on meanwhile.

        Interrupted, it goes on where it was when called again with the same key.

        Args:
            new: the new master key; the present one to exchange the root key only (after rotating a key in Vault).
            retire: remove the old master key at the end. With several replicas: rotate with ``False``, restart them
                with the new key one after the other, then :meth:`retire_others`.
            batch: data keys in one transaction.
            progress: told how many data keys have been wrapped again so far.

        Returns:
            How many data keys were wrapped again.

        Raises:
            Conflict: a rotation to another master key is not finished.
        """
        target = self._begin_rotation(new)
        total = 0
        for _ in range(_ATTEMPTS):
            while done := self._database.write(lambda c: self._rewrap(c, target, batch)):
                total += done
                if progress is not None:
                    progress(total)
            try:
                self._database.write(lambda c: _remove_generations_before(c, target))
                break
            except Conflict:
                continue  # a row of the old generation came in between
        else:
            raise Unavailable("the rotation could not be finished", id="verdict.store.master.rotation",
                              remedy="call it again: it goes on where it was")  # fmt: skip
        self._master = new
        with self._lock:
            for generation in [old for old in self._roots if old < target]:
                self._roots.pop(generation).wipe()
        if retire:
            self.retire_others()
        return total

    def retire_others(self) -> int:
        """Remove the slots of every master key but the one this store is open with. Returns how many.

        Raises:
            WrongMasterKey: this key opens not every generation.
        """
        slots = self.slots()
        mine = {slot.generation: slot.master for slot in slots if self._try(slot, self._master) is not None}
        if {slot.generation for slot in slots} - set(mine):
            raise WrongMasterKey("the master key does not open every root key yet", id="verdict.store.master.retire",
                                 remedy="finish the rotation first")  # fmt: skip

        def work(connection: Connection) -> int:
            removed = 0
            for generation, master in mine.items():
                condition = (RootKeySlotRow.generation == generation, RootKeySlotRow.master != master)
                removed += connection.execute(sa.delete(RootKeySlotRow).where(*condition)).rowcount
            return removed

        return self._database.write(work)

    def close(self) -> None:
        """Forget all keys. Idempotent."""
        with self._lock:
            for key in (*self._roots.values(), self._integrity):
                key.wipe()
            self._roots.clear()

    # --- inside

    def _initialise(self) -> None:
        """The first root key, and the store's name. Another replica may do the same at the same time: one wins."""
        uid, root, integrity = secrets.token_hex(16), os.urandom(crypto.KEY_SIZE), os.urandom(crypto.KEY_SIZE)
        slot = make_slot(self._master, root, 1, uid)
        now = self._database.now()

        def work(connection: Connection) -> None:
            connection.execute(sa.insert(RootKeyRow).values(generation=1, created=now))
            _insert_slot(connection, slot)
            wrapped = crypto.wrap(root, 1, integrity, _integrity_aad(uid))
            connection.execute(
                sa.insert(StoreRow).values(id=1, uid=uid, created=now, generation=1, wrapped_key=wrapped)
            )

        try:
            self._database.write(work)
        except Conflict:
            pass

    def _root(self, generation: int, connection: Connection | None = None) -> bytes:
        with self._lock:
            found = self._roots.get(generation)
            if found is None:
                slots = self._database.read(_slots) if connection is None else _slots(connection)
                found = ProtectedKey(self._unwrap([slot for slot in slots if slot.generation == generation]))
                self._roots[generation] = found
            return found.reveal()

    def _unwrap(self, slots: list[Slot]) -> bytes:
        if not slots:
            raise Unavailable("a root key was just exchanged", id="verdict.store.master.exchanged", remedy="try again")
        return unwrap(slots, self._master, self.store_uid)

    def _try(self, slot: Slot, master: MasterKey) -> bytes | None:
        try:
            return unwrap([slot], master, self.store_uid)
        except WrongMasterKey:
            return None

    def _begin_rotation(self, new: MasterKey) -> int:
        """Make the next generation, or find the one of an unfinished rotation. Returns its number."""
        slots = self.slots()
        newest = max(slot.generation for slot in slots)
        unfinished = len({slot.generation for slot in slots}) > 1
        present = [slot for slot in slots if slot.generation == newest]
        known = any(self._try(slot, new) is not None for slot in present)
        if unfinished:
            if known:
                return newest
            raise Conflict(
                "a rotation to another master key is not finished",
                id="verdict.store.master.rotation",
                remedy="finish it first: rotate again with that key",
            )
        root = os.urandom(crypto.KEY_SIZE)
        for slot in present:
            if self._try(slot, new) is None and self._try(slot, self._master) is None:
                raise Conflict(
                    "a third master key opens this store, and would not open the next root key",
                    id="verdict.store.master.rotation",
                    found=f"a master key of kind {slot.kind}",
                    remedy="retire the master keys that are not in use any more first",
                )
        fresh = [make_slot(master, root, newest + 1, self.store_uid) for master in (self._master, new)]
        # Who has the new master key only must be able to read what is not yet wrapped again.
        if not known:
            fresh.append(make_slot(new, self._root(newest), newest, self.store_uid))
        now = self._database.now()

        def work(connection: Connection) -> None:
            connection.execute(sa.insert(RootKeyRow).values(generation=newest + 1, created=now))
            for slot in {(item.generation, item.master): item for item in fresh}.values():
                _insert_slot(connection, slot)

        try:
            self._database.write(work)
        except Conflict:
            raise Conflict("another rotation began at the same time", id="verdict.store.master.rotation",
                           remedy="wait for it to end") from None  # fmt: skip
        return newest + 1

    def _rewrap(self, connection: Connection, target: int, batch: int) -> int:
        """Wrap up to so many data keys under the target generation."""
        root = self._root(target, connection)
        done = 0
        for table, columns, aad_of in _WRAPPED:
            query = sa.select(*columns, table.generation, table.wrapped_key).where(table.generation < target)
            if table is SecretVersionRow:
                query = query.join(TenantRow, TenantRow.id == SecretVersionRow.tenant_id)
            for row in connection.execute(query.limit(batch - done).with_for_update(of=table)).all():
                aad = _integrity_aad(row.uid) if table is StoreRow else self._bound(aad_of(row))
                wrapped = row.wrapped_key
                if wrapped:  # an erased value has no key any more
                    key = crypto.unwrap(self._root(row.generation, connection), row.generation, wrapped, aad)
                    wrapped = crypto.wrap(root, target, key, aad)
                primary = [column == getattr(row, column.key) for column in sa.inspect(table).primary_key]
                connection.execute(sa.update(table).where(*primary).values(generation=target, wrapped_key=wrapped))
                done += 1
            if done >= batch:
                break
        return done


def secret_aad(row: Any) -> bytes:
    """What a secret's ciphertext belongs to: ``uid``, ``path``, ``version``, ``policy``, ``release_once``."""
    policy = "default" if row.policy is None else f"policy {row.policy}"
    return context("secret", row.uid, row.path, row.version, policy, int(row.release_once))


def signing_key_aad(row: Any) -> bytes:
    """What a signing key's ciphertext belongs to: ``kid``, ``kind``, ``algorithm``."""
    return context("signing key", row.kid, row.kind, row.algorithm)


def make_slot(master: MasterKey, root: bytes, generation: int, store_uid: str) -> Slot:
    """Wrap a root key under a master key."""
    wrapped = master.wrap(root, _slot_aad(store_uid, generation))
    parameters = master.parameters()
    name = sha256(context(master.kind) + rfc8785.dumps(parameters)).hexdigest()[:32]
    return Slot(generation, name, master.kind, parameters, wrapped)


def unwrap(slots: list[Slot], master: MasterKey, store_uid: str) -> bytes:
    """The root key that these slots hold.

    Raises:
        WrongMasterKey: the master key opens none of them.
    """
    refusal: WrongMasterKey | None = None
    for slot in slots:
        if slot.kind == master.kind:
            try:
                return master.unwrap(slot.wrapped, _slot_aad(store_uid, slot.generation), slot.parameters)
            except WrongMasterKey as error:
                refusal = error
    if refusal is not None:
        raise refusal
    from .master import wrong

    raise wrong(master.kind, "no root key is wrapped under a key of this kind",
                ", ".join(sorted({slot.kind for slot in slots})))  # fmt: skip


_WRAPPED: tuple[tuple[Any, tuple[Any, ...], Callable[[Any], bytes]], ...] = (
    (StoreRow, (StoreRow.id, StoreRow.uid), lambda row: b""),
    (SigningKeyRow, (SigningKeyRow.kid, SigningKeyRow.kind, SigningKeyRow.algorithm), signing_key_aad),
    (
        SecretVersionRow,
        (
            TenantRow.uid,
            SecretVersionRow.tenant_id,
            SecretVersionRow.path,
            SecretVersionRow.version,
            SecretVersionRow.policy,
            SecretVersionRow.release_once,
        ),
        secret_aad,
    ),
)


def _integrity_aad(uid: str) -> bytes:
    return context("integrity key", uid)


def _slot_aad(store_uid: str, generation: int) -> bytes:
    return context("root key", store_uid, generation)


def _store_row(connection: Connection) -> Any:
    return connection.execute(sa.select(StoreRow.uid, StoreRow.generation, StoreRow.wrapped_key)).first()


def _slots(connection: Connection) -> list[Slot]:
    from json import loads

    table = RootKeySlotRow
    query = sa.select(table.generation, table.master, table.kind, table.parameters, table.wrapped)
    return [
        Slot(row.generation, row.master, row.kind, loads(row.parameters), row.wrapped)
        for row in connection.execute(query.order_by(table.generation, table.master))
    ]


def _insert_slot(connection: Connection, slot: Slot) -> None:
    values = {
        "generation": slot.generation,
        "master": slot.master,
        "kind": slot.kind,
        "parameters": rfc8785.dumps(slot.parameters).decode(),
        "wrapped": slot.wrapped,
    }
    connection.execute(sa.insert(RootKeySlotRow).values(**values))


def _remove_generations_before(connection: Connection, target: int) -> None:
    connection.execute(sa.delete(RootKeySlotRow).where(RootKeySlotRow.generation < target))
    connection.execute(sa.delete(RootKeyRow).where(RootKeyRow.generation < target))
