"""Errors as they leave the API: Fedward's rule, value and next step, and an HTTP status."""

from __future__ import annotations

from typing import Final

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import InterfaceError, OperationalError

from fedward.errors import (
    AccessError,
    ConfigError,
    FedwardError,
    OutputError,
    PlanError,
    ProtocolError,
    ServiceError,
    StudyError,
)

_STATUS: Final[tuple[tuple[type[FedwardError], int], ...]] = (
    (PlanError, 422),
    (ProtocolError, 422),
    (StudyError, 409),
    (ConfigError, 409),
    (ServiceError, 503),
    (OutputError, 507),
    (AccessError, 403),
)


class Problem(BaseModel):
    """Why a call failed."""

    error: str = Field(description="kind of the error", examples=["StudyError"])
    rule: str = Field(description="what must hold")
    value: str = Field(default="", description="what was found instead")
    fix: str = Field(default="", description="what to do next")
    where: str = Field(default="", description="what the rule is about")
    exit_code: int = Field(description="with which the command line ends")


class Denied(AccessError):
    """An access error with its HTTP status."""

    def __init__(self, status: int, rule: str, fix: str) -> None:
        self.status = status
        super().__init__(rule, fix=fix)


class Missing(StudyError):
    """What a call names is not there."""


def status_of(error: FedwardError) -> int:
    """The HTTP status that an error has."""
    if isinstance(error, Denied):
        return error.status
    if isinstance(error, Missing) or error.rule.endswith("must exist"):
        return 404
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def problem_of(error: FedwardError) -> Problem:
    """The error in the words of the API."""
    known = next(k for k in type(error).__mro__ if k.__module__ == "fedward.errors")
    value = "" if error.value is None else str(error.value)
    return Problem(
        error=known.__name__,
        rule=error.rule,
        value=value,
        fix=error.fix,
        where=error.where,
        exit_code=error.exit_code,
    )


async def answer_problem(request: Request, error: Exception) -> JSONResponse:
    """An exception handler of the application."""
    if isinstance(error, OperationalError | InterfaceError):
        error = ServiceError(
            "the registry must be reachable, with room on its disk", fix="See /readyz"
        )
    if not isinstance(error, FedwardError):
        error = FedwardError("an unexpected error stopped the call", fix="See the service's log")
    headers = {"WWW-Authenticate": "Bearer"} if status_of(error) == 401 else {}
    return JSONResponse(problem_of(error).model_dump(), status_of(error), headers=headers)
