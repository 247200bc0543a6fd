"""The hospitals that were enrolled, by their public keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from sqlalchemy import Connection, Engine, Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from fedward.errors import ConfigError
from fedward.protocol import SiteFacts
from fedward_server.registry.database import reading
from fedward_server.registry.schema import now, sites

SiteState = Literal["active", "removed", "rotated"]
_LIST: TypeAdapter[list[SiteFacts]] = TypeAdapter(list[SiteFacts])


class Site(BaseModel):
    """One enrolled key of a hospital."""

    model_config = ConfigDict(frozen=True)
    name: str
    public_key: str = Field(description="PEM")
    fingerprint: str = Field(description="SHA-256 of the key's DER form, hexadecimal")
    node_id: int | None = Field(description="its number at the SuperLink")
    state: SiteState
    max_patients: int | None = Field(default=None, description="enrolled; none: not checked")
    max_images: int | None = Field(default=None, description="enrolled; none: not checked")
    facts: SiteFacts | None = Field(description="what it last said of itself")
    datasets: tuple[SiteFacts, ...] = Field(default=(), description="the newest of each dataset")
    added: str = Field(description="UTC, ISO 8601")
    updated: str = Field(description="UTC, ISO 8601")


class SiteStore:
    """Enrolled keys; of each name at most one is present, the others are history."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(
        self, name: str, public_key: str, node_id: int | None = None, **limits: int | None
    ) -> Site:
        """Enrol a hospital's key; the limits are ``max_patients`` and ``max_images``.

        Raises
        ------
        ConfigError
            The name is taken, the key is no public EC key, or was enrolled before.
        """
        with self._engine.begin() as connection:
            _insert(connection, name, public_key, node_id)
            return _update(connection, _locked(connection, name), **limits)

    def find(self, name: str) -> Site | None:
        """The present site of a name."""
        with reading(self._engine) as connection:
            row = connection.execute(select(sites).where(_present(name))).one_or_none()
        return None if row is None else _site(row)

    def check(self, names: Iterable[str]) -> None:
        """Hold names against the sites that are enrolled.

        Raises
        ------
        ConfigError
            Some are not; all of them are told.
        """
        if unknown := [name for name in names if self.find(name) is None]:
            raise _unknown(", ".join(unknown))

    def get(self, name: str) -> Site:
        """The present site of a name.

        Raises
        ------
        ConfigError
            There is none.
        """
        site = self.find(name)
        if site is None:
            raise _unknown(name)
        return site

    def list(self, *, history: bool = False) -> list[Site]:
        """Present sites by name; with history also keys that were removed or rotated."""
        query = select(sites).order_by(sites.c.name, sites.c.id)
        if not history:
            query = query.where(sites.c.state == "active")
        with reading(self._engine) as connection:
            return [_site(row) for row in connection.execute(query).all()]

    def remove(self, name: str) -> Site:
        """End a site; its key is not taken again (see :meth:`get` for errors)."""
        return self._change(name, state="removed")

    def forget(self, name: str) -> None:
        """Take back :meth:`add`, as if it had never been (see :meth:`get` for errors)."""
        with self._engine.begin() as connection:
            connection.execute(delete(sites).where(sites.c.id == _locked(connection, name).id))

    def check_new(self, public_key: str) -> str:
        """A key as PEM, if it may be enrolled (see :meth:`add` for errors)."""
        with reading(self._engine) as connection:
            return _new_key(connection, public_key)[0]

    def rotate(self, name: str, public_key: str, node_id: int | None = None) -> Site:
        """Replace a site's key; the old one is not taken again (see :meth:`add`, :meth:`get`)."""
        with self._engine.begin() as connection:
            old = _locked(connection, name)
            _update(connection, old, state="rotated")
            _insert(connection, name, public_key, node_id)
            new, kept = _locked(connection, name), ("facts", "max_patients", "max_images")
            return _update(connection, new, **{key: getattr(old, key) for key in kept})

    def limit(self, name: str, **limits: int | None) -> Site:
        """Set ``max_patients`` and ``max_images``; None: not checked (see :meth:`get`)."""
        return self._change(name, **limits)

    def set_node(self, name: str, node_id: int) -> Site:
        """Note the site's number at the SuperLink (see :meth:`get`)."""
        return self._change(name, node_id=str(node_id))

    def set_facts(self, name: str, facts: SiteFacts) -> Site:
        """Note what the site said of itself, beside other datasets of it (see :meth:`get`)."""
        with self._engine.begin() as connection:
            row = _locked(connection, name)
            others = [one for one in _facts(row.facts) if one.dataset != facts.dataset]
            text = _LIST.dump_json([*others, facts]).decode()
            return _update(connection, row, facts=text)

    def _change(self, name: str, **values: str | int | None) -> Site:
        with self._engine.begin() as connection:
            row = _locked(connection, name)
            return _update(connection, row, **values)


def normal_key(text: str) -> tuple[str, str]:
    """A public key as PEM, and its fingerprint; PEM and OpenSSH are read.

    Raises
    ------
    ConfigError
        It is no public EC key.
    """
    raw = text.strip().encode("utf-8", "surrogateescape")
    read = (
        serialization.load_ssh_public_key
        if raw.startswith(b"ecdsa-")
        else serialization.load_pem_public_key
    )
    try:
        key: object = read(raw)
    except Exception:  # the parser has more kinds of error than it documents
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            "a site's key must be a public EC key, in PEM or OpenSSH form",
            fix="Use the file that fedward-client enrol made at the hospital",
            where="public_key",
        )
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = key.public_bytes(serialization.Encoding.PEM, form).decode()
    der = key.public_bytes(serialization.Encoding.DER, form)
    return pem, hashlib.sha256(der).hexdigest()


def _new_key(connection: Connection, public_key: str) -> tuple[str, str]:
    pem, mark = normal_key(public_key)
    if connection.execute(select(sites.c.id).where(sites.c.fingerprint == mark)).first():
        raise ConfigError(
            "a key is enrolled once",
            value=f"fingerprint {mark[:16]}…",
            where="public_key",
            fix="Make a new key at the hospital with fedward-client enrol",
        )
    return pem, mark


def _insert(connection: Connection, name: str, public_key: str, node_id: int | None) -> Site:
    pem, mark = _new_key(connection, public_key)
    at = now()
    values = {
        "name": name,
        "public_key": pem,
        "fingerprint": mark,
        "state": "active",
        "node_id": "" if node_id is None else str(node_id),
        "added": at,
        "updated": at,
    }
    try:
        connection.execute(insert(sites).values(values))
    except IntegrityError:
        raise ConfigError(
            "a site's name is given once",
            value=name,
            where="name",
            fix="Choose another name, or use fedward-server site rotate",
        ) from None
    return _site(connection.execute(select(sites).where(_present(name))).one())


def _locked(connection: Connection, name: str) -> Row[Any]:
    row = connection.execute(select(sites).where(_present(name)).with_for_update()).one_or_none()
    if row is None:
        raise _unknown(name)
    return row


def _update(connection: Connection, row: Row[Any], **values: str | int | None) -> Site:
    values["updated"] = now()
    connection.execute(update(sites).where(sites.c.id == row.id).values(**values))
    return _site(connection.execute(select(sites).where(sites.c.id == row.id)).one())


def _present(name: str) -> Any:
    return (sites.c.name == name) & (sites.c.state == "active")


def _site(row: Row[Any]) -> Site:
    values = dict(row._mapping)
    known = _facts(row.facts)
    node = int(row.node_id) if row.node_id else None
    facts = known[-1] if known else None
    return Site.model_validate({**values, "facts": facts, "datasets": known, "node_id": node})


def _facts(text: str) -> list[SiteFacts]:
    """Of each dataset, the newest last; older releases kept one alone."""
    if not text:
        return []
    return _LIST.validate_json(text if text.startswith("[") else f"[{text}]")


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        "the site must be enrolled",
        value=name,
        fix="See fedward-server site list; fedward-server site add enrols one",
        where="site",
    )
