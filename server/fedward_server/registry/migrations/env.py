"""Alembic runs this for each upgrade; the connection and its transaction come from the caller."""

from __future__ import annotations

from alembic import context

from fedward_server.registry.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
