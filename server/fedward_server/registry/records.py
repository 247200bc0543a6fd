"""What the registry says of a study."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedward.plan.load import from_canonical
from fedward.plan.schema import Plan

State = Literal["submitted", "running", "paused", "finished", "failed", "stopped"]
Wanted = Literal["run", "pause", "stop"]
FINAL: frozenset[State] = frozenset({"finished", "stopped"})
ENDED: frozenset[State] = FINAL | {"failed"}
NEXT: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        "submitted": frozenset({"running", "paused", "finished", "failed", "stopped"}),
        "running": frozenset({"submitted", "paused", "finished", "failed", "stopped"}),
        "paused": frozenset({"submitted", "running", "finished", "failed", "stopped"}),
        "failed": frozenset({"submitted", "stopped"}),
        "finished": frozenset(),
        "stopped": frozenset(),
    }
)
"""Where a study may go from each state."""


class Study(BaseModel):
    """A study as it was submitted, and where it stands."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    id: str = Field(description="of the study, for good")
    name: str = Field(description="as the plan says")
    plan: str = Field(description="the plan in canonical form")
    plan_sha256: str
    coordinator: str = Field(description="base64 of the Ed25519 public key")
    sites: tuple[str, ...] = Field(description="the only sites that train")
    evaluate_only: tuple[str, ...] = Field(
        default=(), description="sites besides that only evaluate the delivered model"
    )
    quorum: int = Field(description="updates that make a round count")
    deadline: float = Field(description="seconds that a round waits")
    seed: int
    state: State
    wanted: Wanted = Field(description="what an operator wants of it")
    reason: str = Field(description="why it is paused, failed or stopped")
    round: int = Field(description="rounds that are finished")
    created: str = Field(description="UTC, ISO 8601")
    updated: str = Field(description="UTC, ISO 8601")

    @property
    def ended(self) -> bool:
        """Whether nothing more happens unless an operator acts."""
        return self.state in ENDED

    def read_plan(self) -> Plan:
        """The plan, validated."""
        return from_canonical(self.plan)


class Event(BaseModel):
    """Something that happened in a study."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    seq: int = Field(description="from 1, without gaps")
    at: str = Field(description="UTC, ISO 8601")
    kind: str = Field(description="`submitted`, `state`, `round`, …")
    payload: dict[str, Any]
