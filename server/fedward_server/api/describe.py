"""What OpenAPI says of access: the bearer token, and the role that each call needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

_BEARER: Final = {
    "type": "http",
    "scheme": "bearer",
    "description": "a token of `fedward-server token create`; `x-role` is the role that it needs",
}


def describe_roles(router: APIRouter) -> APIRouter:
    """Say of each call of a router which role it needs; gives the router."""
    for route in router.routes:
        if isinstance(route, APIRoute) and (role := _role(route.dependant)):
            route.openapi_extra = {"x-role": role, "security": [{"token": []}]}
    return router


def describe_tokens(app: FastAPI) -> None:
    """Say what a token is."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        found = plain()
        found.setdefault("components", {})["securitySchemes"] = {"token": _BEARER}
        return found

    app.openapi = described  # type: ignore[method-assign]


def _role(dependant: Dependant) -> str:
    roles = (getattr(one.call, "role", "") for one in _all(dependant))
    return next((role for role in roles if role), "")


def _all(dependant: Dependant) -> Iterator[Dependant]:
    for one in dependant.dependencies:
        yield one
        yield from _all(one)
