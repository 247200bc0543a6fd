"""How large a site may say it is; quarantine in one study instead of in all."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the sizes and the quarantines, and move a site's quarantine to its open studies."""
    for name in ("max_patients", "max_images"):
        op.add_column("sites", sa.Column(name, sa.Integer, nullable=True))
    quarantines = op.create_table(
        "quarantines",
        sa.Column("study", sa.String(64), sa.ForeignKey("studies.id"), primary_key=True),
        sa.Column("site", sa.String(64), primary_key=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
    )
    connection = op.get_bind()
    out = connection.execute(
        sa.text("SELECT name, reason, updated FROM sites WHERE state = 'quarantined'")
    ).all()
    query = sa.text("SELECT id, sites FROM studies WHERE state NOT IN ('finished', 'stopped')")
    rows = [
        {"study": study, "site": name, "reason": reason, "at": at}
        for study, sites in connection.execute(query).all()
        for name, reason, at in out
        if name in json.loads(sites)
    ]
    if rows:
        op.bulk_insert(quarantines, rows)
    op.execute("UPDATE sites SET state = 'active', reason = '' WHERE state = 'quarantined'")
