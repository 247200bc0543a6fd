"""Hospitals: enrol, list, cut off, give another key."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from fedward.flower.control_client import Node
from fedward.protocol import SITE_NAME, SiteFacts
from fedward_server.api.access import Access
from fedward_server.enrolment import Enrolment
from fedward_server.registry import Registry
from fedward_server.registry.sites import Site, SiteState

# As many as an SQL integer holds.
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Name = Annotated[str, Field(pattern=SITE_NAME, description="the site's name")]


class NewSite(BaseModel):
    """A hospital to enrol."""

    name: Name
    public_key: str = Field(max_length=4096, description="PEM, made by `fedward-client enrol`")
    max_patients: Size | None = Field(
        default=None, description="the most patients that it may claim; null: not checked"
    )
    max_images: Size | None = Field(
        default=None, description="the most images that it may claim; null: not checked"
    )


class SizeLimits(BaseModel):
    """The most that a hospital may claim; what is left out stays, null: not checked."""

    max_patients: Size | None = None
    max_images: Size | None = None


class Release(BaseModel):
    """Where a quarantine ends."""

    study: str | None = Field(default=None, description="a study's id; null: in all studies")


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
    max_patients: int | None = Field(description="the most patients that it may claim")
    max_images: int | None = Field(description="the most images that it may claim")
    quarantined: dict[str, str] = Field(description="studies that have put it out, and why")
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
        sizes = {"max_patients": site.max_patients, "max_images": site.max_images}
        return _answer(registry, enrolment.add(site.name, site.public_key, **sizes), {})

    @router.post("/{name}/limit", dependencies=[Depends(access.need("admin"))])
    def limit_site(name: str, limits: SizeLimits) -> SiteAnswer:
        """Set the most patients and images that a hospital may claim."""
        given = limits.model_dump(exclude_unset=True)
        return _answer(registry, registry.sites.limit(name, **given), {})

    @router.delete("/{name}", dependencies=[Depends(access.need("admin"))])
    def remove_site(name: str) -> SiteAnswer:
        """Cut a hospital off, at once."""
        return _answer(registry, enrolment.remove(name), {})

    @router.post("/{name}/rotate", dependencies=[Depends(access.need("admin"))])
    def rotate_site(name: str, key: NewKey) -> SiteAnswer:
        """Take another key for a hospital; the old one ends at once."""
        return _answer(registry, enrolment.rotate(name, key.public_key), {})

    @router.post("/{name}/release", dependencies=[Depends(access.need("admin"))])
    def release_site(name: str, where: Release | None = None) -> SiteAnswer:
        """End a hospital's quarantine, in one study or in all."""
        site = registry.sites.get(name)
        if where is not None and where.study is not None:
            registry.studies.get(where.study)
        registry.studies.release(name, where.study if where else None)
        return _answer(registry, site, {})

    return router


def _answer(registry: Registry, site: Site, nodes: dict[int, Node]) -> SiteAnswer:
    node = nodes.get(site.node_id or 0)
    running = [
        one
        for one in registry.studies.list("submitted", "running", "paused", "failed")
        if site.name in (*one.sites, *one.evaluate_only)
    ]
    put_out = {one.id: registry.studies.quarantined(one.id) for one in running}
    return SiteAnswer(
        name=site.name,
        fingerprint=site.fingerprint,
        state=site.state,
        max_patients=site.max_patients,
        max_images=site.max_images,
        quarantined={s: sites[site.name] for s, sites in put_out.items() if site.name in sites},
        status=node.status if node else "registered",
        last_seen=node.last_seen if node else "",
        facts=site.facts,
        version=site.facts.release if site.facts else "",
        datasets=list(site.datasets),
        studies=[one.id for one in running if one.state != "failed"],
    )
