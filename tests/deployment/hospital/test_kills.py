"""A hospital whose processes are killed while they work: what is lost, and what comes again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.integration
Make = Callable[..., Any]


@pytest.mark.parametrize("victims", [("trainer",), ("connector",), ("trainer", "connector")])
def test_killed_while_it_trains(
    coordinator: Any,
    hospital: Any,
    make_private: Make,
    until: Make,
    refusal_of: Make,
    bytes_of: Make,
    victims: tuple[str, ...],
) -> None:
    """A trainer's round is lost and stays charged; a connector's is answered all the same."""
    study, plan = "kill-" + "-".join(victims), make_private(150)
    first = coordinator.send(hospital.node, coordinator.order(plan, 1, study))
    until(lambda: hospital.step(study) > 2)
    before = hospital.daemon.children()
    for victim in victims:
        os.kill(before[victim], signal.SIGKILL)
    answer = coordinator.reply(first)
    if "trainer" in victims:
        assert refusal_of(answer)[0] in ("budget", "error")
    else:
        assert "refusal" not in answer, refusal_of(answer)
    assert bytes_of(coordinator.ask(hospital.node, coordinator.order(plan, 2, study)))
    row = hospital.row(study)
    lost = int("trainer" in victims)
    assert (row["charged"], row["lost"], row["released"]) == (2, lost, 2 - lost)
    after = hospital.daemon.children()
    assert all((after[name] == before[name]) == (name not in victims) for name in before)
    assert hospital.whole


def test_a_round_that_comes_again_gets_the_same_bytes_over_a_killed_connector(
    coordinator: Any, hospital: Any, make_private: Make, until: Make, bytes_of: Make
) -> None:
    """It is killed with the answer in hand: while it sends, or just before."""
    plan = make_private()
    first = coordinator.ask(hospital.node, coordinator.order(plan, 1, "again"))
    before = hospital.daemon.children()
    sent = len(hospital.told("sent"))
    again = coordinator.send(hospital.node, coordinator.order(plan, 1, "again"))
    until(lambda: len(hospital.told("sent")) > sent)
    os.kill(before["connector"], signal.SIGKILL)
    assert bytes_of(coordinator.reply(again)) == bytes_of(first)
    # Receiving: it is gone before it could take the order.
    until(lambda: "connector" in hospital.daemon.children())
    hospital.daemon.kill("connector")
    third = coordinator.ask(hospital.node, coordinator.order(plan, 1, "again"))
    assert bytes_of(third) == bytes_of(first)
    row = hospital.row("again")
    assert (row["charged"], row["released"], row["lost"]) == (1, 1, 0)
