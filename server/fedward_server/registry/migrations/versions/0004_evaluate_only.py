"""Sites of a study that take no part in its training and only evaluate its model."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the names; in the studies that are there everybody trains."""
    op.add_column(
        "studies", sa.Column("evaluate_only", sa.Text, nullable=False, server_default="[]")
    )
