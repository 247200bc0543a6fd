"""One finding of a check: pass, warn or fail, with what to do."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["pass", "warn", "fail"]


class Finding(BaseModel):
    """One question and its answer."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(description="what was looked at")
    status: Status
    found: str = Field(description="what is so")
    fix: str = Field(description="what to do when it is not well; else empty")


def finding(name: str, status: Status, found: str, fix: str) -> Finding:
    """A finding; what is well needs no next step."""
    return Finding(name=name, status=status, found=found, fix="" if status == "pass" else fix)
