"""What alembic runs for each command; `upgrade` hands it the connection."""

from alembic import context

from gamenode.server.db import schema

context.configure(
    connection=context.config.attributes["connection"], target_metadata=schema.metadata
)
with context.begin_transaction():
    context.run_migrations()
