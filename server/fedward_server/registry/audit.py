"""Who changed what, through the operator API."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import SQLAlchemyError

from fedward.connections import network_of
from fedward_server.registry.database import reading
from fedward_server.registry.schema import audit, now

_MINUTE: Final = 60.0
_MOST_NETWORKS: Final = 256
_ELSEWHERE: Final = "elsewhere"


class AuditEntry(BaseModel):
    """One call that could change something."""

    model_config = ConfigDict(frozen=True)
    id: int
    at: str = Field(description="UTC, ISO 8601")
    actor: str = Field(description="name of the token")
    role: str
    address: str = Field(
        description="where the call came from; of calls without a valid token the network alone"
    )
    action: str = Field(description="method and path; or how many calls had no valid token")
    status: int = Field(description="HTTP status that it ended with")


class AuditStore:
    """The audit log; entries are added, never changed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._unknown, self._lock = Counter[str](), threading.Lock()

    def add(self, *, actor: str, role: str, address: str, action: str, status: int) -> None:
        """Write one entry."""
        with self._engine.begin() as connection:
            connection.execute(
                insert(audit).values(
                    at=now(),
                    actor=actor,
                    role=role,
                    address=address[:64],
                    action=action[:200],
                    status=status,
                )
            )

    def count_unknown(self, address: str) -> None:
        """Count a call without a valid token; :meth:`keep` writes how many there were."""
        network = network_of(address, ipv4=24, ipv6=48)
        with self._lock:
            known = network in self._unknown or len(self._unknown) < _MOST_NETWORKS
            self._unknown[network if known else _ELSEWHERE] += 1

    def keep(self, stop: threading.Event) -> None:
        """Write one entry a minute of the calls without a valid token, if there were any."""
        while not stop.wait(_MINUTE):
            self.write_unknown()

    def write_unknown(self) -> None:
        """Write what was counted; where the database is away, it counts on."""
        with self._lock:
            found, self._unknown = self._unknown, Counter()
        if not found:
            return
        where = next(iter(found)) if len(found) == 1 else f"{len(found)} networks"
        try:
            self.add(
                actor="",
                role="",
                address=where,
                status=401,
                action=f"{found.total()} calls without a valid token",
            )
        except SQLAlchemyError:
            with self._lock:
                self._unknown += found

    def list(self, limit: int = 100) -> list[AuditEntry]:
        """The newest entries, newest first."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(audit).order_by(audit.c.id.desc()).limit(limit))
            return [AuditEntry.model_validate(row._mapping) for row in rows.all()]
