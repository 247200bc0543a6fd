"""Studies: submit, watch, pause, resume, stop, and what they leave."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field

from fedward.integrity import check_model
from fedward.plan.load import plan_from
from fedward_server.api.access import Access
from fedward_server.api.problems import Missing
from fedward_server.api.sites import Name
from fedward_server.artifacts.card import model_card
from fedward_server.config import ServerConfig
from fedward_server.registry import Registry
from fedward_server.registry.records import Event, Study, Wanted
from fedward_server.report.page import render
from fedward_server.results import Round, StudyResults

_LOOK: Final = 0.3
_MOST: Final = 500


_FILE: Final[dict[int | str, dict[str, Any]]] = {200: {"content": {"application/octet-stream": {}}}}
_LINES: Final[dict[int | str, dict[str, Any]]] = {200: {"content": {"application/x-ndjson": {}}}}


class _Lines(StreamingResponse):
    media_type = "application/x-ndjson"


class NewStudy(BaseModel):
    """A study to submit."""

    plan: dict[str, Any] = Field(description="the plan, as `study.toml` has it")
    sites: list[Name] = Field(
        min_length=1, max_length=1000, description="the only sites that train"
    )
    evaluate_only: list[Name] = Field(
        default_factory=list,
        max_length=1000,
        description="sites besides that take no part in training and evaluate the delivered model",
    )
    quorum: int | None = Field(default=None, ge=1, description="updates that make a round count")
    deadline: float | None = Field(default=None, gt=0, description="seconds that a round waits")
    seed: int = Field(default=0, ge=0, lt=2**31)
    request: str | None = Field(
        default=None, max_length=64, description="the caller's mark; used again, it submits nothing"
    )


class StudyAnswer(BaseModel):
    """A study and its rounds."""

    study: Study
    rounds: list[Round]
    quarantined: dict[str, str] = Field(description="sites that are put out of it, and why")


def studies_router(config: ServerConfig, registry: Registry, access: Access) -> APIRouter:
    """The calls about studies."""
    router = APIRouter(prefix="/v1/studies", tags=["studies"])
    viewer, coordinator = access.need("viewer"), access.need("coordinator")
    studies = registry.studies

    @router.get("", dependencies=[Depends(viewer)])
    def list_studies() -> list[Study]:
        """Every study, oldest first."""
        return studies.list()

    @router.post("", status_code=201, dependencies=[Depends(coordinator)])
    def submit_study(new: NewStudy) -> Study:
        """Submit a plan to sites that are enrolled."""
        plan = plan_from(new.plan)
        registry.sites.check((*new.sites, *new.evaluate_only))
        return studies.submit(
            plan,
            new.sites,
            new.quorum,
            new.deadline,
            new.seed,
            new.request,
            new.evaluate_only,
        )

    @router.get("/{study}", dependencies=[Depends(viewer)])
    def show_study(study: str) -> StudyAnswer:
        """Where a study stands, and its rounds."""
        return StudyAnswer(
            study=studies.get(study),
            rounds=list(studies.rounds(study)),
            quarantined=studies.quarantined(study),
        )

    @router.get(
        "/{study}/events", dependencies=[Depends(viewer)], response_class=_Lines, responses=_LINES
    )
    async def watch_study(
        study: str,
        after: Annotated[int, Query(ge=0, description="number of the last event seen")] = 0,
        follow: Annotated[bool, Query(description="wait for more until the study ends")] = False,
    ) -> StreamingResponse:
        """What happened, one JSON object per line; with `follow` as it happens, to the end."""
        await asyncio.to_thread(studies.get, study)
        lines = _follow(registry, study, after, follow=follow)
        return _Lines(lines)

    @router.post("/{study}/{wish}", dependencies=[Depends(coordinator)])
    def change_study(study: str, wish: str, request: Request) -> Study:
        """`pause`, `resume` or `stop` a study; it holds at once."""
        wanted: dict[str, Wanted] = {"pause": "pause", "resume": "run", "stop": "stop"}
        if wish not in wanted:
            raise Missing("the call must exist", value=wish[:40], fix="pause, resume or stop")
        return studies.want(study, wanted[wish], request.state.token.name)

    @router.get("/{study}/report", dependencies=[Depends(viewer)], response_class=HTMLResponse)
    def report(study: str) -> HTMLResponse:
        """The report as one HTML file, of what stands so far."""
        return HTMLResponse(render([_results(registry, study)]))

    @router.get("/{study}/results", dependencies=[Depends(viewer)])
    def results(study: str) -> StudyResults:
        """Everything measured so far (the schema of metrics.json)."""
        return _results(registry, study)

    @router.get(
        "/{study}/model",
        dependencies=[Depends(viewer)],
        response_class=FileResponse,
        responses=_FILE,
    )
    def model(study: str) -> FileResponse:
        """The model (safetensors) of a study that has finished."""
        path, digest = _model(config, registry, study)
        # RFC 9530: the command line checks what arrived.
        headers = {"Repr-Digest": f"sha-256=:{b64encode(bytes.fromhex(digest)).decode()}:"}
        return FileResponse(path, filename=f"{study}.safetensors", headers=headers)

    @router.get("/{study}/card", dependencies=[Depends(viewer)], response_class=PlainTextResponse)
    def card(study: str) -> PlainTextResponse:
        """The model's card (Markdown)."""
        found = studies.get(study)
        text = model_card(found.id, found.read_plan(), _results(registry, study))
        return PlainTextResponse(text, media_type="text/markdown")

    return router


async def _follow(
    registry: Registry, study: str, after: int, *, follow: bool
) -> AsyncIterator[bytes]:
    while True:
        ended = (await asyncio.to_thread(registry.studies.get, study)).ended
        found: list[Event] = list(
            await asyncio.to_thread(registry.studies.events_after, study, after, _MOST)
        )
        for event in found:
            after = event.seq
            yield event.model_dump_json().encode() + b"\n"
        if not found and (ended or not follow):
            return
        if not found:
            await asyncio.sleep(_LOOK)


def _results(registry: Registry, study: str) -> StudyResults:
    registry.studies.get(study)
    found = registry.studies.results(study)
    if found is None:
        raise Missing("a study's results must exist", value=study, fix="Wait for its first round")
    return found


def _model(config: ServerConfig, registry: Registry, study: str) -> tuple[Path, str]:
    """The delivered model and its SHA-256, checked against the one that was written down."""
    registry.studies.get(study)
    path = config.study_folder(study) / "model.safetensors"
    if not path.exists():
        raise Missing("a study's model must exist", value=study, fix="Wait until it has finished")
    results = registry.studies.results(study)
    return path, check_model(path, results.model_sha256 if results else "")
