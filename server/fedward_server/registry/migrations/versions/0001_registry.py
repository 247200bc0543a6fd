"""Sites, studies, rounds, events and tokens."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the first tables."""
    _sites()
    _studies()
    _progress()
    _tokens()


def _text(name: str, length: int | None = None, *, empty: bool = False) -> sa.Column[str]:
    kind = sa.Text() if length is None else sa.String(length)
    return sa.Column(name, kind, nullable=False, server_default="" if empty else None)


def _sites() -> None:
    op.create_table(
        "sites",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        _text("name", 64),
        _text("public_key"),
        sa.Column("fingerprint", sa.String(64), nullable=False, unique=True),
        _text("node_id", 20, empty=True),
        _text("state", 16),
        _text("reason", empty=True),
        _text("facts", empty=True),
        _text("added", 32),
        _text("updated", 32),
    )
    _unique_where("one_present_site_per_name", "sites", "state IN ('active', 'quarantined')")


def _studies() -> None:
    op.create_table(
        "studies",
        sa.Column("id", sa.String(64), primary_key=True),
        _text("name", 200),
        _text("plan"),
        _text("plan_sha256", 64),
        _text("coordinator", 64),
        _text("signature", 128),
        _text("sites"),
        sa.Column("quorum", sa.Integer, nullable=False),
        sa.Column("deadline", sa.Float, nullable=False),
        sa.Column("seed", sa.Integer, nullable=False),
        _text("state", 16),
        _text("wanted", 8),
        _text("reason", empty=True),
        sa.Column("round", sa.Integer, nullable=False, server_default="0"),
        _text("results", empty=True),
        sa.Column("request", sa.String(64), unique=True),
        _text("created", 32),
        _text("updated", 32),
    )


def _progress() -> None:
    op.create_table(
        "rounds",
        sa.Column("study", sa.String(64), sa.ForeignKey("studies.id"), primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
        _text("result"),
        _text("saved", 32),
    )
    op.create_table(
        "events",
        sa.Column("study", sa.String(64), sa.ForeignKey("studies.id"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        _text("at", 32),
        _text("kind", 32),
        _text("payload"),
    )


def _tokens() -> None:
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(16), primary_key=True),
        _text("name", 64),
        _text("role", 16),
        _text("salt", 32),
        _text("hash", 64),
        _text("created", 32),
        _text("revoked", 32, empty=True),
    )
    _unique_where("one_valid_token_per_name", "tokens", "revoked = ''")


def _unique_where(name: str, table: str, condition: str) -> None:
    op.create_index(
        name,
        table,
        ["name"],
        unique=True,
        sqlite_where=sa.text(condition),
        postgresql_where=sa.text(condition),
    )
