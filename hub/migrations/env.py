"""Runs migrations in the transaction that `loractl.hub.migrate` opened. Knows no schema."""

from alembic import context

from loractl.hub.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True, render_as_batch=True)
context.run_migrations()
