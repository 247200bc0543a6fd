"""Hospitals: enrol, list, cut off, give another key."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from fedward.protocol import SITE_NAME, SiteFacts
from server.api.access import Access
from server.enrolment import Enrolment
from server.flower.control import Node
from server.registry import Registry
from server.registry.sites import Site, SiteState

Name = Annotated[str, Field(pattern=SITE_NAME, description="the site's name")]


class NewSite(BaseModel):
    """A hospital to enrol."""

    name: Name
    public_key: str = Field(max_length=4096, description="PEM, made by `fedward-client enrol`")


class NewKey(BaseModel):
    """Another key of a hospital."""

    public_key: str = Field(max_length=4096, description="PEM")


class SiteAnswer(BaseModel):
    """A hospital as operators see it."""

    name: str
    fingerprint: str = Field(description="SHA-256 of the key's DER form, to compare by telephone")
    state: SiteState
    status: str = Field(description="online, offline or registered (never seen)")
    last_seen: str = Field(description="now, or its last sign of life, UTC")
    reason: str = Field(description="why it is quarantined")
    version: str = Field(description="the release that it runs; known after its first study")
    facts: SiteFacts | None = Field(description="what it said last, as its policy lets it be told")
    datasets: list[SiteFacts] = Field(
        description="sizes of each dataset; their names where the site's policy tells them"
    )
    studies: list[str] = Field(description="studies that name it and have not ended")


def sites_router(enrolment: Enrolment, access: Access) -> APIRouter:
    """The calls about hospitals."""
    registry, link = enrolment.registry, enrolment.link
    router = APIRouter(prefix="/v1/sites", tags=["sites"])

    @router.get("", dependencies=[Depends(access.need("viewer"))])
    def list_sites() -> list[SiteAnswer]:
        """Every enrolled hospital."""
        nodes = {node.node_id: node for node in link.nodes()}
        return [_answer(registry, site, nodes) for site in registry.sites.list()]

    @router.post("", status_code=201, dependencies=[Depends(access.need("admin"))])
    def add_site(site: NewSite) -> SiteAnswer:
        """Enrol a hospital by its public key."""
        return _answer(registry, enrolment.add(site.name, site.public_key), {})

    @router.delete("/{name}", dependencies=[Depends(access.need("admin"))])
    def remove_site(name: str) -> SiteAnswer:
        """Cut a hospital off, at once."""
        return _answer(registry, enrolment.remove(name), {})

    @router.post("/{name}/rotate", dependencies=[Depends(access.need("admin"))])
    def rotate_site(name: str, key: NewKey) -> SiteAnswer:
        """Take another key for a hospital; the old one ends at once."""
        return _answer(registry, enrolment.rotate(name, key.public_key), {})

    @router.post("/{name}/release", dependencies=[Depends(access.need("admin"))])
    def release_site(name: str) -> SiteAnswer:
        """End a hospital's quarantine."""
        return _answer(registry, registry.sites.release(name), {})

    return router


def _answer(registry: Registry, site: Site, nodes: dict[int, Node]) -> SiteAnswer:
    node = nodes.get(site.node_id or 0)
    running = registry.studies.list("submitted", "running", "paused")
    return SiteAnswer(
        name=site.name, fingerprint=site.fingerprint, state=site.state, reason=site.reason,
        status=node.status if node else "registered", last_seen=node.last_seen if node else "",
        facts=site.facts, version=site.facts.release if site.facts else "",
        datasets=list(site.datasets), studies=[one.id for one in running if site.name in one.sites],
    )  # fmt: skip
