"""Who changed what, through the operator API."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Engine, insert, select

from server.registry.database import reading
from server.registry.schema import audit, now


class AuditEntry(BaseModel):
    """One call that could change something."""

    model_config = ConfigDict(frozen=True)
    id: int
    at: str = Field(description="UTC, ISO 8601")
    actor: str = Field(description="name of the token")
    role: str
    address: str = Field(description="where the call came from")
    action: str = Field(description="method and path")
    status: int = Field(description="HTTP status that it ended with")


class AuditStore:
    """The audit log; entries are added, never changed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, *, actor: str, role: str, address: str, action: str, status: int) -> None:
        """Write one entry."""
        with self._engine.begin() as connection:
            connection.execute(
                insert(audit).values(
                    at=now(), actor=actor, role=role, address=address[:64], action=action[:200],
                    status=status,
                )
            )  # fmt: skip

    def list(self, limit: int = 100) -> list[AuditEntry]:
        """The newest entries, newest first."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(audit).order_by(audit.c.id.desc()).limit(limit))
            return [AuditEntry.model_validate(row._mapping) for row in rows.all()]
