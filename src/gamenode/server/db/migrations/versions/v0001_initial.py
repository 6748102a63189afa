"""The first schema."""

from alembic import op
from sqlalchemy import insert

from gamenode.server.db import schema

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make every table. The second revision writes this one's tables out, as they were."""
    schema.metadata.create_all(op.get_bind(), checkfirst=False)
    op.execute(insert(schema.database_meta).values(id=1, generation=1, events_purged_to=0))
