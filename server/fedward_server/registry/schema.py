"""The registry's tables as they are now; how they came to be stands in ``migrations``."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData()

sites = Table(
    "sites",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False),
    Column("public_key", Text, nullable=False),
    Column("fingerprint", String(64), nullable=False, unique=True),
    # Flower's node ids take all 64 bits, one more than SQL's integers have.
    Column("node_id", String(20), nullable=False, server_default=""),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("facts", Text, nullable=False, server_default=""),
    Column("max_patients", Integer),
    Column("max_images", Integer),
    Column("added", String(32), nullable=False),
    Column("updated", String(32), nullable=False),
)
Index(
    "one_present_site_per_name",
    sites.c.name,
    unique=True,
    sqlite_where=text("state IN ('active', 'quarantined')"),
    postgresql_where=text("state IN ('active', 'quarantined')"),
)

studies = Table(
    "studies",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("plan", Text, nullable=False),
    Column("plan_sha256", String(64), nullable=False),
    Column("coordinator", String(64), nullable=False),
    Column("signature", String(128), nullable=False),
    Column("sites", Text, nullable=False),
    Column("evaluate_only", Text, nullable=False, server_default="[]"),
    Column("quorum", Integer, nullable=False),
    Column("deadline", Float, nullable=False),
    Column("seed", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("wanted", String(8), nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("round", Integer, nullable=False, server_default="0"),
    Column("results", Text, nullable=False, server_default=""),
    Column("request", String(64), unique=True),
    Column("created", String(32), nullable=False),
    Column("updated", String(32), nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("study", String(64), ForeignKey("studies.id"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("result", Text, nullable=False),
    Column("saved", String(32), nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("study", String(64), ForeignKey("studies.id"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", String(32), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("payload", Text, nullable=False),
)

quarantines = Table(
    "quarantines",
    metadata,
    Column("study", String(64), ForeignKey("studies.id"), primary_key=True),
    Column("site", String(64), primary_key=True),
    Column("reason", Text, nullable=False),
    Column("at", String(32), nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    Column("salt", String(32), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("created", String(32), nullable=False),
    Column("revoked", String(32), nullable=False, server_default=""),
)
Index(
    "one_valid_token_per_name",
    tokens.c.name,
    unique=True,
    sqlite_where=text("revoked = ''"),
    postgresql_where=text("revoked = ''"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", String(32), nullable=False),
    Column("actor", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    Column("address", String(64), nullable=False, server_default=""),
    Column("action", String(200), nullable=False),
    Column("status", Integer, nullable=False),
)


def now() -> str:
    """The time, UTC, ISO 8601; sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
