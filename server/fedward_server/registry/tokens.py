"""Tokens of operators: made once, kept as salted hashes."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Engine, insert, select, update
from sqlalchemy.exc import IntegrityError

from fedward.errors import AccessError
from fedward_server.registry.database import reading
from fedward_server.registry.schema import now, tokens

Role = Literal["viewer", "coordinator", "admin"]
ROLES: tuple[Role, ...] = ("viewer", "coordinator", "admin")
TOKEN_NAME = r"^\w[\w.@ -]{0,63}$"
# Its first group is the token's id.
TOKEN_TEXT: Final = re.compile(r"fw_([0-9a-f]{10})_[A-Za-z0-9_-]{43}")


class Token(BaseModel):
    """A token without what opens the door."""

    model_config = ConfigDict(frozen=True)
    id: str
    name: str
    role: Role
    created: str = Field(description="UTC, ISO 8601")
    revoked: str = Field(description="when it ended; empty while it is valid")

    def may(self, role: Role) -> bool:
        """Whether it has a role or a higher one."""
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class NewToken:
    """A token just made; ``text`` is shown once and kept nowhere."""

    token: Token
    text: str


class TokenStore:
    """The tokens of one aggregator."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(self, name: str, role: Role) -> NewToken:
        """Make a token.

        Raises
        ------
        AccessError
            A valid token has this name.
        """
        # 256 random bits cannot be guessed, so a plain hash keeps them as well as a slow one.
        identity, secret, salt = (
            secrets.token_hex(5),
            secrets.token_bytes(32),
            secrets.token_hex(16),
        )
        values = {
            "id": identity,
            "name": name,
            "role": role,
            "salt": salt,
            "hash": _hash(salt, secret),
            "created": now(),
            "revoked": "",
        }
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(tokens).values(values))
        except IntegrityError:
            raise AccessError(
                "a valid token's name is given once",
                value=name,
                fix="Revoke that one first, or choose another name",
                where="name",
            ) from None
        text = f"fw_{identity}_{base64.urlsafe_b64encode(secret).decode().rstrip('=')}"
        return NewToken(Token.model_validate(values), text)

    def check(self, text: str) -> Token | None:
        """The token that a text stands for, if it is valid."""
        kind, _, rest = text.partition("_")
        identity, _, encoded = rest.partition("_")
        secret = _decoded(encoded)
        with reading(self._engine) as connection:
            row = connection.execute(select(tokens).where(tokens.c.id == identity)).one_or_none()
        known = row.hash if row is not None else "0" * 64
        given = _hash(row.salt if row is not None else "", secret)
        fits = hmac.compare_digest(known, given)
        if kind != "fw" or row is None or not fits or row.revoked:
            return None
        return Token.model_validate(row._mapping)

    def list(self) -> list[Token]:
        """All tokens, oldest first."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(tokens).order_by(tokens.c.created)).all()
        return [Token.model_validate(row._mapping) for row in rows]

    def revoke(self, name: str) -> Token:
        """End a token at once.

        Raises
        ------
        AccessError
            No valid token has this name.
        """
        valid = (tokens.c.name == name) & (tokens.c.revoked == "")
        with self._engine.begin() as connection:
            row = connection.execute(select(tokens).where(valid)).one_or_none()
            if row is None:
                raise AccessError(
                    "the token must exist",
                    value=name,
                    fix="See fedward-server token list",
                    where="name",
                )
            ended = now()
            connection.execute(update(tokens).where(valid).values(revoked=ended))
        return Token.model_validate({**row._mapping, "revoked": ended})


def _hash(salt: str, secret: bytes) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret).hexdigest()


def _decoded(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return b""
