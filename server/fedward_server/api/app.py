"""The operator API, put together."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError

from fedward.errors import FedwardError, ProtocolError
from fedward_server.api.access import Access
from fedward_server.api.describe import describe_roles, describe_tokens
from fedward_server.api.health import Health, health_router
from fedward_server.api.problems import Problem, answer_problem
from fedward_server.api.sites import sites_router
from fedward_server.api.studies import studies_router
from fedward_server.api.tokens import tokens_router
from fedward_server.config import ServerConfig
from fedward_server.enrolment import Enrolment

_ABOUT = """Operate an aggregator: enrol hospitals, submit studies, watch them, take their models.

Every call needs a bearer token, except the health ones. Roles: `viewer` reads, `coordinator` also
submits and steers studies, `admin` also enrols sites and makes tokens.
"""


def build_api(config: ServerConfig, enrolment: Enrolment, health: Health) -> FastAPI:
    """The application.

    Parameters
    ----------
    config : ServerConfig
        The aggregator.
    enrolment : Enrolment
        Its hospitals, with what it and the SuperLink know.
    health : Health
        Whether it is ready.
    """
    registry, link = enrolment.registry, enrolment.link
    problems: dict[int | str, dict[str, Any]] = {
        code: {"model": Problem, "description": text}
        for code, text in (
            (401, "no valid token"),
            (403, "the token's role is not enough"),
            (404, "not there"),
            (409, "not possible now"),
            (422, "not valid"),
            (429, "too many calls"),
        )
    }
    app = FastAPI(
        title="Fedward aggregator",
        version=version("fedward"),
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        responses=problems,
    )
    access = Access(registry, config.limits)
    app.add_middleware(access.around)
    app.add_exception_handler(FedwardError, answer_problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    for away in (OperationalError, InterfaceError):
        app.add_exception_handler(away, answer_problem)
    app.add_exception_handler(Exception, answer_problem)
    for router in (
        health_router(health, registry, link),
        sites_router(enrolment, access),
        studies_router(config, registry, access),
        tokens_router(registry, access),
    ):
        app.include_router(describe_roles(router))
    describe_tokens(app)
    return app


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    where = ".".join(str(part) for part in first.get("loc", ()))
    return await answer_problem(
        request, ProtocolError(f"a request must be valid: {first.get('msg', '')}", where=where)
    )
