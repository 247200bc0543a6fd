"""Hospitals and aggregator are upgraded one by one, while a study runs and before one starts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import warm_start
from wheel import NEXT, NEXT_SCHEMA

from fedward.plan import SCHEMA_VERSION, load_plan
from fedward.plan.load import plan_hash
from fedward_client.audit.log import audit_folder
from fedward_client.audit.verify import entries

pytestmark = pytest.mark.integration
Make = Callable[..., Any]
ROUNDS = 5


def shown(service: Any, study: str) -> dict[str, Any]:
    with suppress(httpx.HTTPError, ValueError):  # it starts again
        answer: dict[str, Any] = service.get(f"/v1/studies/{study}", service.token).json()
        return answer.get("study", {})
    return {}


def restart(process: Any, release: Path) -> None:
    assert process.stop() == 0
    process.release = release
    process.start()


def submit(service: Any, plan: Path) -> str:
    return str(service.ask("study", "submit", plan, "--sites", "hospital 1,hospital 2")["id"])


def test_a_running_study_survives_an_upgrade_and_a_newer_plan_waits_for_it(
    installed: Path,
    next_release: Path,
    make_service: Make,
    make_daemon: Make,
    plan_file: Path,
    until: Make,
) -> None:
    text = plan_file.read_text().replace('["no", "yes"]', '["clear", "opacity"]')
    text = text.replace("given = true", "given = false")
    text = text.replace("sites = 2", "sites = 2\nquorum = 2")  # a round waits for who restarts
    plan_file.write_text(text.replace("rounds = 2", f"rounds = {ROUNDS}"))
    before, now = plan_hash(load_plan(plan_file)), version("fedward")
    service = make_service(release=installed)
    ca = (service.folder / "tls" / "ca.crt").read_bytes()
    address = f"127.0.0.1:{service.sites_port}"
    one, two = (
        make_daemon(number, address, ca, service.coordinator, release=installed)
        for number in (1, 2)
    )
    for daemon in (one, two):
        service.ask("site", "add", daemon.name, daemon.folder / "connector" / "site.pub")
        daemon.start()

    # A study is in its rounds: one hospital goes to the next release, then the aggregator.
    study = submit(service, plan_file)
    until(lambda: shown(service, study).get("round", 0) >= 1)
    restart(two, next_release)
    restart(service, next_release)
    until(lambda: shown(service, study).get("state") == "finished")
    found = service.get(f"/v1/studies/{study}", service.token).json()
    assert found["study"]["plan_sha256"] == before
    answered = [sorted(one["sites"]) for one in found["rounds"]]
    failures = [one["failures"] for one in found["rounds"]]
    assert answered == [["hospital 1", "hospital 2"]] * ROUNDS, failures
    results = service.get(f"/v1/studies/{study}/results", service.token).json()
    assert results["complete"]
    assert [fact["release"] for fact in results["sites"]] == [now, now]

    # A plan with a new key does not start while a hospital has the old release.
    newer = plan_file.with_name("newer.toml")
    newer.write_text(plan_file.read_text().replace("rounds = 5", "rounds = 1\nwarmup = 2"))
    study = submit(service, newer)
    until(lambda: shown(service, study).get("state") == "paused")
    until(lambda: "(schema)" in shown(service, study)["reason"])
    reason = shown(service, study)["reason"]
    old = f"it supports plan schema {SCHEMA_VERSION} (release {now})"
    assert f"1 of 2; hospital 1 (schema): {old}" in reason
    assert f"this plan needs {NEXT_SCHEMA} because of training.warmup" in reason
    assert shown(service, study)["round"] == 0
    log = entries(audit_folder(one.folder / "state"))
    assert [e.fields["kind"] for e in log if e.event == "refused"][-1:] == ["schema"]

    # With the upgrade of that hospital it starts by itself.
    restart(one, next_release)
    until(lambda: shown(service, study).get("state") == "finished")
    for site in service.get("/v1/sites", service.token).json():
        facts = site["facts"]
        told = (facts["release"], facts["plan_schema"], facts["cores"])
        assert told == (NEXT, NEXT_SCHEMA, 2)
    assert service.stop() == 0
    for daemon in (one, two):
        assert daemon.stop() == 0
    for release in (installed, next_release):
        warm_start.template(release).close()
