"""What the calls answer: sites, studies, health, figures, and problems in Fedward's words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedward import errors
from fedward.errors import FedwardError
from fedward.flower.control_client import Node
from fedward.models import save_model
from fedward.plan.load import plan_hash
from fedward.protocol import SiteFacts
from fedward_server.api.problems import Missing, problem_of, status_of
from fedward_server.results import Arm, Round, StudyResults

Key = Callable[[], str]
MakePlan = Callable[..., Any]


def facts(site: str, **more: Any) -> SiteFacts:
    return SiteFacts(
        site=site,
        patients=20,
        images=40,
        train_patients=14,
        validation_patients=2,
        test_patients=4,
        train_images=28,
        validation_images=4,
        test_images=8,
        **more,
    )


def enrol(api: Any, site_key: Key, *names: str) -> None:
    for name in names:
        answer = api.call("POST", "/v1/sites", json={"name": name, "public_key": site_key()})
        assert answer.status_code == 201, answer.text


def submit(api: Any, plan: Any, **more: Any) -> Any:
    body = {"plan": plan.model_dump(mode="json"), "sites": ["north", "south"], **more}
    return api.call("POST", "/v1/studies", role="coordinator", json=body)


def test_a_site_from_its_key_to_its_end(api: Any, site_key: Key, make_plan: MakePlan) -> None:
    enrol(api, site_key, "north", "south")
    study = submit(api, make_plan()).json()["id"]
    api.registry.sites.set_facts("north", facts("north", release="0.1.0", dataset="chest"))
    api.registry.sites.set_facts("north", facts("north", release="0.1.1", dataset="skull"))
    node = api.registry.sites.get("north").node_id
    api.link.known[node] = Node(node, "online", "2026-01-02T03:04:05Z")
    north, south = api.call("GET", "/v1/sites", role="viewer").json()
    assert (north["status"], north["last_seen"]) == ("online", "2026-01-02T03:04:05Z")
    assert north["version"] == "0.1.1" and north["studies"] == [study]
    assert [(one["dataset"], one["patients"]) for one in north["datasets"]] == [
        ("chest", 20),
        ("skull", 20),
    ]
    assert (south["version"], south["datasets"], south["facts"]) == ("", [], None)

    old = api.registry.sites.get("north")
    rotated = api.call("POST", "/v1/sites/north/rotate", json={"public_key": site_key()}).json()
    assert rotated["fingerprint"] != old.fingerprint and rotated["datasets"]
    assert old.node_id not in api.link.known and len(api.link.known) == 2
    assert api.call("DELETE", "/v1/sites/north").status_code == 200
    assert len(api.link.known) == 1
    gone = api.call("DELETE", "/v1/sites/north")
    assert gone.status_code == 409 or gone.status_code == 404
    assert [one["name"] for one in api.call("GET", "/v1/sites").json()] == ["south"]


def test_a_study_names_sites_that_only_evaluate(
    api: Any, site_key: Key, make_plan: MakePlan
) -> None:
    enrol(api, site_key, "north", "south")
    unknown = submit(api, make_plan(), evaluate_only=["east", "west"])
    assert unknown.status_code == 409 and "must be enrolled" in unknown.text
    assert unknown.json()["value"] == "east, west"
    enrol(api, site_key, "east")
    made = submit(api, make_plan(), evaluate_only=["east"]).json()
    assert made["sites"] == ["north", "south"] and made["evaluate_only"] == ["east"]
    known = {one["name"]: one["studies"] for one in api.call("GET", "/v1/sites").json()}
    assert known["east"] == [made["id"]]


def test_a_site_has_a_size_and_a_quarantine_in_one_study(
    api: Any, site_key: Key, make_plan: MakePlan
) -> None:
    new = {"name": "north", "public_key": site_key(), "max_patients": 500}
    made = api.call("POST", "/v1/sites", json=new).json()
    assert (made["max_patients"], made["max_images"]) == (500, None)
    enrol(api, site_key, "south")
    changed = api.call("POST", "/v1/sites/north/limit", json={"max_images": 900}).json()
    assert (changed["max_patients"], changed["max_images"]) == (500, 900)
    cleared = api.call("POST", "/v1/sites/north/limit", json={"max_patients": None}).json()
    assert (cleared["max_patients"], cleared["max_images"]) == (None, 900)
    wrong = api.call("POST", "/v1/sites/north/limit", json={"max_patients": -1})
    assert wrong.status_code == 422

    studies = [submit(api, make_plan()).json()["id"] for _ in range(3)]
    for study in studies[:2]:
        api.registry.studies.quarantine(study, "north", "not finite")
    north, south = api.call("GET", "/v1/sites").json()
    assert north["quarantined"] == dict.fromkeys(studies[:2], "not finite")
    assert south["quarantined"] == {}
    assert api.call("GET", f"/v1/studies/{studies[0]}").json()["quarantined"] == {
        "north": "not finite"
    }
    release = "/v1/sites/north/release"
    told = api.call("POST", release, json={"study": studies[0]}).json()
    assert list(told["quarantined"]) == [studies[1]]
    assert api.call("POST", release, json={"study": "no-such"}).status_code == 404
    assert api.call("POST", release).json()["quarantined"] == {}


def test_a_site_is_not_half_enrolled(api: Any, site_key: Key) -> None:
    api.link.broken = True
    answer = api.call("POST", "/v1/sites", json={"name": "north", "public_key": site_key()})
    assert answer.status_code == 409
    assert api.registry.sites.list() == []


def test_a_wrong_key_is_told_with_the_next_step(api: Any) -> None:
    answer = api.call("POST", "/v1/sites", json={"name": "north", "public_key": "no key"})
    told = answer.json()
    assert answer.status_code == 409 and told["error"] == "ConfigError"
    assert told["where"] == "public_key" and "enrol" in told["fix"]


def test_a_study_and_what_it_leaves(api: Any, site_key: Key, make_plan: MakePlan) -> None:
    enrol(api, site_key, "north", "south")
    plan = make_plan()
    made = submit(api, plan, request="once").json()
    assert submit(api, plan, request="once").json()["id"] == made["id"]
    place = f"/v1/studies/{made['id']}"
    assert made["plan_sha256"] == plan_hash(plan) and made["state"] == "submitted"
    for part in ("report", "results", "model", "card"):
        assert api.call("GET", f"{place}/{part}", role="viewer").status_code == 404, part
    round_ = Round(round=1, stage="all", seconds=1.0)
    api.registry.studies.save_round(made["id"], round_)
    arm = Arm(name="federated", kind="federated", rounds=[round_])
    api.registry.studies.save_results(
        made["id"],
        StudyResults(
            study="tiny",
            plan=plan.model_dump(mode="json"),
            plan_sha256=plan_hash(plan),
            seed=0,
            engine="superlink",
            device="cpu",
            primary="auc",
            parameters=10,
            arms=[arm],
            sites=[facts("north")],
        ),
    )
    assert "<html" in api.call("GET", f"{place}/report", role="viewer").text
    card = api.call("GET", f"{place}/card", role="viewer")
    assert card.headers["content-type"].startswith("text/markdown") or "text/plain" in str(
        card.headers
    )
    assert plan_hash(plan) in card.text and "north" in card.text
    folder = api.config.study_folder(made["id"])
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    save_model(path, {"w": np.ones(3, np.float32)}, {})
    assert api.call("GET", f"{place}/model", role="viewer").content == path.read_bytes()

    assert api.call("POST", f"{place}/pause", role="coordinator").json()["state"] == "paused"
    assert api.call("POST", f"{place}/resume", role="coordinator").json()["state"] == "submitted"
    assert api.call("POST", f"{place}/stop", role="coordinator").json()["state"] == "stopped"
    assert api.call("POST", f"{place}/resume", role="coordinator").status_code == 409
    assert api.call("POST", f"{place}/dance", role="coordinator").status_code == 404
    shown = api.call("GET", place, role="viewer").json()
    assert shown["study"]["state"] == "stopped" and shown["rounds"][0]["round"] == 1

    lines = api.call("GET", f"{place}/events?follow=true", role="viewer")
    assert lines.headers["content-type"].startswith("application/x-ndjson")
    events = [json.loads(line) for line in lines.text.splitlines()]
    assert [one["seq"] for one in events] == list(range(1, len(events) + 1))
    assert events[0]["kind"] == "submitted" and events[-1]["payload"]["state"] == "stopped"
    later = api.call("GET", f"{place}/events?after={len(events) - 1}", role="viewer")
    assert len(later.text.splitlines()) == 1


def test_a_study_names_only_sites_that_are_enrolled(
    api: Any, site_key: Key, make_plan: MakePlan
) -> None:
    enrol(api, site_key, "north")
    answer = submit(api, make_plan())
    assert answer.status_code in (404, 409) and answer.json()["value"] == "south"
    broken = submit(api, make_plan(), quorum=0)
    assert broken.status_code == 422 and broken.json()["where"] == "body.quorum"
    assert api.registry.studies.list() == []


def test_ready_means_that_a_study_could_run(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedward_server.api.health as module

    monkeypatch.setattr(module, "_FRESH", -1.0)
    assert api.client.get("/healthz").json() == {"status": "ok"}
    assert api.client.get("/readyz").json() == {
        "ready": True,
        "parts": {"database": "ok", "superlink": "ok", "disk": "ok"},
    }
    api.link.broken = True
    answer = api.client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["parts"]["superlink"] == "the SuperLink must answer"
    assert "fedward_ready 0.0" in api.client.get("/metrics").text


def test_a_full_disk_is_not_ready(make_api: Callable[..., Any]) -> None:
    answer = make_api(free_bytes=1 << 60).client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["parts"]["disk"].endswith("MiB free")


def test_figures_for_prometheus(api: Any, site_key: Key, make_plan: MakePlan) -> None:
    enrol(api, site_key, "north", "south")
    study = submit(api, make_plan()).json()["id"]
    text = api.client.get("/metrics").text
    for line in (
        "fedward_ready 1.0",
        'fedward_studies{state="submitted"} 1.0',
        f'fedward_study_rounds{{study="{study}"}} 0.0',
        'fedward_site_online{site="north"} 0.0',
    ):
        assert line in text


def test_a_fault_of_ours_tells_nothing_of_itself(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("/secret/place")

    monkeypatch.setattr(api.registry.studies, "list", broken)
    answer = api.call("GET", "/v1/studies")
    assert answer.status_code == 500
    assert "secret" not in answer.text and answer.json()["error"] == "FedwardError"


KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FedwardError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_error_has_a_status_and_keeps_its_exit_code(kind: type[FedwardError]) -> None:
    error = kind("must be even", value=3, fix="Add one", where="a.b")
    assert 400 <= status_of(error) < 600
    told = problem_of(error)
    assert (told.error, told.exit_code) == (kind.__name__, kind.exit_code)
    assert (told.rule, told.value, told.fix, told.where) == ("must be even", "3", "Add one", "a.b")


def test_what_is_missing_is_a_404_with_the_name_of_a_known_error() -> None:
    error = Missing("the study must exist", value="x")
    assert (status_of(error), problem_of(error).error) == (404, "StudyError")
