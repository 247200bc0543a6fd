"""The aggregator service as its coordinator uses it, with real hospitals; killed at will."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from fedward.flower.control_client import ControlClient, stored_key
from fedward_server.config import load_config
from fedward_simulation.options import Hospital, Options
from fedward_simulation.study import Study

pytestmark = pytest.mark.integration
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def service(make_service: Make) -> Any:
    return make_service()


@pytest.fixture(scope="module")
def hospitals(service: Any, make_daemon: Make) -> list[Any]:
    """Two hospitals, enrolled by the command line, that run."""
    made = []
    ca = (service.folder / "tls" / "ca.crt").read_bytes()
    for number in (1, 2):
        daemon = make_daemon(number, f"127.0.0.1:{service.sites_port}", ca, service.coordinator)
        key = daemon.folder / "connector" / "site.pub"
        enrolled = service.call("site", "add", daemon.name, key)
        assert enrolled["status"] == "registered"
        daemon.start()
        made.append(daemon)
    return made


@pytest.fixture
def plan_path(tmp_path: Path, plan_file: Path) -> Path:
    text = plan_file.read_text().replace('["no", "yes"]', '["clear", "opacity"]')
    plan_file.write_text(
        text.replace("given = true", "given = false").replace("rounds = 2", "rounds = 3")
    )
    return plan_file


SITES = ("--sites", "hospital 1,hospital 2")


def submit(service: Any, plan: Path, *more: object) -> str:
    return str(service.ask("study", "submit", plan, *SITES, *more)["id"])


def events(service: Any, study: str) -> list[dict[str, Any]]:
    text = service.get(f"/v1/studies/{study}/events?follow=true", service.token).text
    return [json.loads(line) for line in text.splitlines()]


def test_a_study_from_the_laptop_to_the_model(
    service: Any, hospitals: list[Any], plan_path: Path, tmp_path: Path
) -> None:
    study = service.call("study", "submit", plan_path, *SITES, "--seed", 4)["id"]
    kinds = [event["kind"] for event in events(service, study)]
    assert kinds[0] == "submitted"
    assert kinds.count("round") == 3
    shown = service.call("study", "show", study)
    assert shown["study"]["state"] == "finished"
    assert [len(one["sites"]) for one in shown["rounds"]] == [2, 2, 2]
    service.call("study", "model", study, "--out", tmp_path / "model.safetensors")
    service.call("study", "report", study, "--out", tmp_path / "report.html")
    card = (tmp_path / "model.md").read_text()
    for part in (shown["study"]["plan_sha256"], "hospital 1", "synthetic", "Not a medical device"):
        assert part in card
    assert "hospital 2" in (tmp_path / "report.html").read_text()

    from fedward.plan import load_plan

    sites = tuple(Hospital(daemon.config) for daemon in hospitals)
    alone = Study(
        load_plan(plan_path), Options(data=None, out=tmp_path / "sim", seed=4, hospitals=sites)
    )
    alone.run()
    assert alone.model is not None
    delivered = load_file(tmp_path / "model.safetensors")
    for name, value in alone.model.items():
        np.testing.assert_array_equal(delivered[name], value)

    listed = {one["name"]: one for one in service.call("site", "list")["sites"]}
    assert listed["hospital 1"]["status"] == "online"
    assert listed["hospital 1"]["facts"]["patients"] == 20


def test_whatever_is_killed_the_same_study_goes_on(
    service: Any, hospitals: list[Any], plan_path: Path, until: Make
) -> None:
    plan_path.write_text(plan_path.read_text().replace("rounds = 3", "rounds = 6"))
    study = submit(service, plan_path, "--deadline", 30)

    def shown() -> dict[str, Any]:
        with suppress(httpx.HTTPError, ValueError):  # it starts again
            answer: dict[str, Any] = service.get(f"/v1/studies/{study}", service.token).json()
            return answer.get("study", {})
        return {}

    def goes_on(reached: int) -> bool:
        now = shown()
        return now.get("round", 0) > reached or now.get("state") == "finished"

    for victim in ("fedward_server.runner", "fedward.flower.superlink", "fedward_server.service"):
        until(partial(goes_on, shown()["round"]))
        os.kill(service.processes()[victim], signal.SIGKILL)
    until(lambda: shown().get("state") == "finished")
    told = events(service, study)
    assert [e["payload"]["round"] for e in told if e["kind"] == "round"] == list(range(1, 7))
    until(service.ready)


def test_a_plan_that_diverges_fails_and_the_next_study_has_every_hospital(
    service: Any, hospitals: list[Any], plan_path: Path, until: Make, tmp_path: Path
) -> None:
    good = plan_path.read_text()
    plan_path.write_text(good.replace("learning_rate = 0.01", "learning_rate = 1e6"))
    diverging = submit(service, plan_path)
    until(lambda: service.ask("study", "show", diverging)["study"]["state"] == "failed")
    shown = service.ask("study", "show", diverging)
    assert "training diverges (got 2 of 2 sites in round 1" in shown["study"]["reason"]
    assert "Lower the learning rate" in shown["study"]["reason"]
    assert shown["quarantined"] == {}
    plan_path.write_text(good)
    study = submit(service, plan_path)
    told = events(service, study)
    assert [len(e["payload"]["sites"]) for e in told if e["kind"] == "round"] == [2, 2, 2]
    # Nobody enrolled the sizes of these hospitals, which is told of each once.
    warned = [e["payload"] for e in told if e["kind"] == "warned"]
    assert sorted(one["site"] for one in warned) == ["hospital 1", "hospital 2"]
    assert all("no enrolled size" in one["reason"] for one in warned)
    assert service.ask("site", "limit", "hospital 1", "--max-patients", 5)["max_patients"] == 5
    plan_path.write_text(good.replace("given = false", "given = false\ntest = 0.0"))
    small = submit(service, plan_path, "--quorum", 1, "--deadline", 30)

    def shown_small() -> Any:
        return service.ask("study", "show", small)["study"]

    # The quorum does not start a study whose plan needs two hospitals.
    until(lambda: shown_small()["state"] == "paused")
    for one in (shown_small(), service.ask("study", "list")["studies"][-1]):
        assert "(got 1 of 2; hospital 1 (invalid): " in one["reason"]
        assert "(got 20 of 5)" in one["reason"] and one["round"] == 0
    service.ask("site", "limit", "hospital 1", "--max-patients", 0)
    assert service.ask("study", "resume", small)["state"] == "submitted"
    told = events(service, small)
    (refused,) = (e["payload"] for e in told if e["kind"] == "refused")
    assert refused["site"] == "hospital 1"
    assert next(e["payload"]["reason"] for e in told if e["kind"] == "state") == one["reason"]
    assert [len(e["payload"]["sites"]) for e in told if e["kind"] == "round"] == [2, 2, 2]
    # It has no test patients: it ends all the same, once, with its model.
    assert [e["payload"]["state"] for e in told if e["kind"] == "state"][-2:] == [
        "running",
        "finished",
    ]
    assert shown_small()["reason"] == (
        "Not measured on test patients, because no site has test patients (split.test is 0)."
    )
    model = tmp_path / "untested.safetensors"
    service.ask("study", "model", small, "--out", model)
    assert "Not measured on test patients, because" in model.with_suffix(".md").read_text("utf-8")


def test_pause_resume_and_stop(
    service: Any, hospitals: list[Any], plan_path: Path, until: Make
) -> None:
    plan_path.write_text(plan_path.read_text().replace("rounds = 3", "rounds = 40"))
    study = submit(service, plan_path)

    def state() -> Any:
        return service.get(f"/v1/studies/{study}", service.token).json()["study"]

    until(lambda: state()["round"] >= 1)
    assert service.ask("study", "pause", study)["state"] == "paused"
    until(lambda: "fedward_server.runner" not in service.processes())
    reached = state()["round"]
    assert service.ask("study", "resume", study)["state"] == "submitted"
    until(lambda: state()["round"] > reached)
    assert service.ask("study", "stop", study)["state"] == "stopped"
    until(lambda: "fedward_server.runner" not in service.processes())
    refused = service.call("study", "resume", study, code=17)
    assert "stays so" in refused["message"]


def test_roles_tokens_and_wrong_calls(service: Any) -> None:
    viewer = service.call("token", "create", "eve", "--role", "viewer")["text"]
    assert service.get("/v1/studies", viewer).status_code == 200
    context = ssl.create_default_context(cafile=str(service.folder / "tls" / "ca.crt"))
    base = f"https://127.0.0.1:{service.api_port}"
    with httpx.Client(verify=context, base_url=base) as client:
        as_viewer = {"Authorization": f"Bearer {viewer}"}
        body = {"name": "x", "public_key": "y"}
        assert client.post("/v1/sites", json=body).status_code == 401
        denied = client.post("/v1/sites", json=body, headers=as_viewer)
        assert denied.status_code == 403
        assert denied.json()["exit_code"] == 24
        admin = {"Authorization": f"Bearer {service.token}"}
        assert client.post("/v1/sites", json=body, headers=admin).status_code in (409, 422)
        assert client.post("/v1/studies", json={}, headers=admin).status_code == 422
        assert client.get("/v1/studies/none", headers=admin).status_code == 404
        large = client.post("/v1/studies", content=b"x" * 3_000_000, headers=admin)
        assert large.status_code == 422
        text = client.get("/metrics").text
        assert "fedward_ready 1.0" in text
        assert service.call("health")["ready"] is True
        described = client.get("/openapi.json").json()
        assert "paths" in described, described
        assert "/v1/studies/{study}/events" in described["paths"]
    service.call("token", "revoke", "eve")
    assert service.get("/v1/studies", viewer).status_code == 401
    wrong = service.call(
        "study",
        "list",
        "--url",
        base,
        "--ca",
        service.folder / "tls" / "ca.crt",
        "--token",
        viewer,
        code=24,
    )
    assert wrong["error"] == "AccessError"
    assert (
        service.call("health", "--url", "https://127.0.0.1:1", code=25)["error"] == "ServiceError"
    )
    gone = service.call("study", "list", "--url", "https://127.0.0.1:1", "--token", "x", code=25)
    assert gone["error"] == "ServiceError"


def test_a_removed_site_is_cut_off_in_the_middle_of_a_study(
    service: Any, hospitals: list[Any], plan_path: Path, until: Make
) -> None:
    plan_path.write_text(plan_path.read_text().replace("rounds = 3", "rounds = 6"))
    study = submit(service, plan_path, "--quorum", 1, "--deadline", 20)
    until(lambda: service.get(f"/v1/studies/{study}", service.token).json()["study"]["round"] >= 1)
    service.ask("site", "remove", "hospital 2")
    until(
        lambda: (
            json.loads((hospitals[1].folder / "connector" / "link.json").read_text())["state"]
            == "refused"
        )
    )
    told = events(service, study)
    last = [event["payload"] for event in told if event["kind"] == "round"][-1]
    assert last["round"] == 6
    assert list(last["sites"]) == ["hospital 1"]


@contextmanager
def without_superlink(service: Any, until: Make) -> Iterator[None]:
    """The SuperLink is down, and nobody starts it again meanwhile."""
    os.kill(service.process.pid, signal.SIGSTOP)
    os.kill(service.processes()["fedward.flower.superlink"], signal.SIGKILL)
    try:
        yield
    finally:
        os.kill(service.process.pid, signal.SIGCONT)

    def listens() -> bool:
        # What is told of it may be two seconds old.
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", service.sites_port)).close()
            return True
        return False

    until(listens)


def test_site_calls_that_failed_with_the_superlink_down_are_done_again(
    service: Any, hospitals: list[Any], new_key: Make, tmp_path: Path, until: Make
) -> None:
    keys = [tmp_path / f"{number}.pub" for number in range(3)]
    for path in keys:
        path.write_bytes(new_key()[1])
    service.ask("site", "add", "third", keys[0])
    with without_superlink(service, until):
        assert "reachable" in service.call("site", "add", "fourth", keys[1], code=17)["message"]
        service.call("site", "rotate", "third", keys[2], code=17)
    service.ask("site", "add", "fourth", keys[1])
    service.ask("site", "rotate", "third", keys[2])
    with without_superlink(service, until):
        for name in ("third", "fourth"):
            assert service.ask("site", "remove", name)["state"] == "removed"

    config = load_config(service.config)
    secret = config.control_secret.read_bytes()
    link = ControlClient(config.superlink_address, config.tls.ca.read_bytes(), secret)
    gone = {stored_key(path.read_bytes()) for path in keys}
    until(lambda: {n.status for n in link.nodes() if n.public_key in gone} == {"unregistered"})
    assert len([n for n in link.nodes() if n.public_key in gone]) == 3
    link.close()


def test_a_service_that_runs_is_alone_and_is_not_restored_over(
    service: Any, tmp_path: Path, until: Make
) -> None:
    service.call("backup", tmp_path / "b.tar.gz")
    refused = service.call("restore", tmp_path / "b.tar.gz", code=25)
    assert "one aggregator at a time" in refused["message"]
    command = [sys.executable, "-m", "fedward_server.cli", "run", "--config", str(service.config)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 25
    assert "one aggregator at a time" in second.stderr and "Traceback" not in second.stderr
    until(service.ready)


def test_the_whole_ends_cleanly(service: Any, hospitals: list[Any]) -> None:
    children = service.processes()
    assert {"fedward.flower.superlink", "fedward_server.service"} <= set(children)
    assert service.stop() == 0
    assert not any(Path(f"/proc/{number}").exists() for number in children.values())
    log = (service.folder / "server.log").read_text()
    assert service.token not in log
    for daemon in hospitals:
        assert str(daemon.folder) not in log
