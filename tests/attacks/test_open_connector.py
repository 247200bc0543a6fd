"""A connector that can read the images: the wall is not there, and it says so itself.

Without the check the trainer would carry out every order that comes through it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import warm_start

from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode

pytestmark = pytest.mark.integration
Make = Callable[..., Any]


def test_no_order_comes_through_a_connector_that_can_read_images(
    coordinator: Any,
    make_hospital: Make,
    plan: Plan,
    until: Make,
    refusal_of: Make,
    environment: dict[str, str],
) -> None:
    # Each process by itself and by the same user, as a careless operator starts them.
    site = make_hospital(1, trainer="allow_networked_trainer = true")
    running: dict[str, subprocess.Popen[bytes]] = {}

    def start(which: str) -> None:
        arguments = [
            sys.executable,
            "-m",
            "fedward_client.cli",
            which,
            "--config",
            str(site.daemon.config),
        ]
        with (site.daemon.folder / "daemon.log").open("ab") as log:
            running[which] = warm_start.popen(arguments, env=environment, stdout=log, stderr=log)

    def stop(which: str) -> None:
        running[which].terminate()
        assert running.pop(which).wait(30) == 0

    try:
        start("trainer")
        start("connector")
        until(lambda: site.online and site.trainer.get("connector") == "can read images")
        for what, task in (("query", "describe"), ("train", "train"), ("evaluate", "evaluate")):
            order = coordinator.order(plan, 1, "open", task=task)
            answer = coordinator.ask(site.node, order, what)
            assert refusal_of(answer) == ("policy", RuleCode.CONNECTOR.text)
        assert "no order is carried out" in " ".join(
            site.daemon.call("status")["trainer"]["warnings"]
        )
        assert not site.told("charge") and not site.told("sent")
        # In so many words it goes on, and is shouted.
        stop("trainer")
        text = site.daemon.config.read_text()
        said = text.replace("[trainer]", "[trainer]\nallow_unconfined_connector = true")
        site.daemon.config.write_text(said)
        start("trainer")
        until(lambda: site.trainer.get("connector") == "can read images")
        answer = coordinator.ask(site.node, coordinator.order(plan, 1, "open"))
        assert "outcome" in answer.config_records
        warnings = " ".join(site.daemon.call("status")["trainer"]["warnings"])
        assert "CONNECTOR CAN READ IMAGES and site.toml allows it" in warnings
        told = [one for one in site.told("isolation") if one["process"] == "connector"]
        assert [(one["holds"], one["allowed_anyway"]) for one in told][-1] == (False, True)
        # Behind walls nothing is allowed that need not be.
        stop("connector")
        stop("trainer")
        site.daemon.config.write_text(text)
        site.start()
        until(lambda: site.trainer.get("connector") == "hidden")
        answer = coordinator.ask(site.node, coordinator.order(plan, 2, "open"))
        assert "outcome" in answer.config_records
        assert site.daemon.stop() == 0
    finally:
        for process in running.values():
            process.kill()
            process.wait()
