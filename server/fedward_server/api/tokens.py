"""Tokens of operators."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from fedward_server.api.access import Access
from fedward_server.registry import Registry
from fedward_server.registry.audit import AuditEntry
from fedward_server.registry.tokens import TOKEN_NAME, Role, Token


class WantedToken(BaseModel):
    """A token to make."""

    name: Annotated[str, Field(pattern=TOKEN_NAME)]
    role: Role


class MadeToken(BaseModel):
    """A token that was made; its text is shown this once."""

    token: Token
    text: str


def tokens_router(registry: Registry, access: Access) -> APIRouter:
    """The calls about tokens, and the audit."""
    router = APIRouter(prefix="/v1", tags=["access"], dependencies=[Depends(access.need("admin"))])

    @router.get("/tokens")
    def list_tokens() -> list[Token]:
        """All tokens, without what opens the door."""
        return registry.tokens.list()

    @router.post("/tokens", status_code=201)
    def create_token(wanted: WantedToken) -> MadeToken:
        """Make a token."""
        made = registry.tokens.create(wanted.name, wanted.role)
        return MadeToken(token=made.token, text=made.text)

    @router.delete("/tokens/{name}")
    def revoke_token(name: str) -> Token:
        """End a token, at once."""
        return registry.tokens.revoke(name)

    @router.get("/audit")
    def show_audit(limit: int = 100) -> list[AuditEntry]:
        """Who changed what, newest first."""
        return registry.audit.list(min(max(limit, 1), 10_000))

    return router
