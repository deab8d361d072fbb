"""Alembic runs this for each upgrade, on the connection that it is given."""

from __future__ import annotations

from alembic import context

from inclavare.verdict.store.models import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
