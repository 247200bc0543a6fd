"""Which studies get a runner, and which are given up."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedward.errors import ServiceError
from fedward_server import dispatch, runner
from fedward_server.config import ServerConfig
from fedward_server.dispatch import MOST_ENDS, Dispatcher
from fedward_server.registry import Registry
from fedward_server.results import Round

Make = Callable[..., Any]
PLANTED = "/data/ward-7/DOE^JANE"


class Ending(Dispatcher):
    """A dispatcher whose runners end at once; no pause is waited for."""

    starts = 0

    def until(self, done: Callable[[], bool]) -> None:
        """Look until it is done."""
        end = time.monotonic() + 30
        while not done() and time.monotonic() < end:
            self.look()
            self._not_before.clear()
            time.sleep(0.01)

    def _start(self, study: str) -> None:
        before = set(self._running)
        super()._start(study)
        self.starts += len(set(self._running) - before)


@pytest.fixture
def study(registry: Registry, make_plan: Make, new_site_key: str) -> str:
    registry.sites.add("north", new_site_key)
    made = registry.studies.submit(make_plan(participation={"sites": 1}), ["north"])
    return made.id


@pytest.fixture
def ending(
    config: ServerConfig, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Ending]]:
    made: list[Ending] = []

    def build(how: str) -> Ending:
        real = subprocess.Popen
        monkeypatch.setattr(
            dispatch.subprocess, "Popen", lambda command, **more: real(["sh", "-c", how], **more)
        )
        made.append(Ending(config.server.state, registry))
        return made[-1]

    yield build
    for one in made:
        one._end()


@pytest.mark.parametrize(
    ("how", "told"), [("exit 1", "exit code 1"), ("kill -9 $$", "signal 9")], ids=["code", "signal"]
)
def test_a_study_whose_runner_ends_each_time_after_the_same_round_is_given_up(
    ending: Callable[[str], Ending], registry: Registry, study: str, how: str, told: str
) -> None:
    ours = ending(how)
    registry.studies.set_state(study, "paused", "an unexpected error ended the runner (KeyError).")
    ours.until(lambda: registry.studies.get(study).ended)
    found = registry.studies.get(study)
    assert (found.state, ours.starts) == ("failed", MOST_ENDS)
    assert f"{told}, {MOST_ENDS} times in a row after round 0" in found.reason
    assert "(KeyError)" in found.reason
    # It stays so until an operator resumes it, and is then tried as often again.
    for _ in range(5):
        ours.look()
    assert ours.starts == MOST_ENDS
    registry.studies.want(study, "run", "operator")
    ours.until(lambda: registry.studies.get(study).ended)
    assert ours.starts == 2 * MOST_ENDS


def test_a_study_that_gets_on_between_its_runners_ends_is_not_given_up(
    ending: Callable[[str], Ending], registry: Registry, study: str
) -> None:
    ours = ending("exit 1")
    for number in range(1, 4):
        ours.until(lambda number=number: ours.starts >= number * (MOST_ENDS - 1))  # type: ignore[misc]
        registry.studies.save_round(study, Round(round=number, stage="all", seconds=1.0))
    assert registry.studies.get(study).state == "submitted"


def test_what_is_away_is_waited_for(
    ending: Callable[[str], Ending], registry: Registry, study: str
) -> None:
    ours = ending(f"exit {ServiceError.exit_code}")
    ours.until(lambda: ours.starts > 2 * MOST_ENDS)
    assert registry.studies.get(study).state == "submitted"


def test_each_end_waits_longer_than_the_one_before(
    ending: Callable[[str], Ending], study: str
) -> None:
    ours = ending("exit 1")
    pauses = []
    for _ in range(MOST_ENDS - 1):
        ours._note(study, 1)
        pauses.append(round(ours._not_before[study] - time.monotonic()))
    assert pauses == [0, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError(PLANTED), "an unexpected error ended the study's runner (KeyError)."),
        (PermissionError(13, "Permission denied", PLANTED), "(got Permission denied)"),
    ],
    ids=["unexpected", "disk"],
)
def test_a_runner_that_breaks_says_why_in_the_study(
    config: ServerConfig,
    registry: Registry,
    study: str,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    told: str,
) -> None:
    def fail(self: runner.Runner) -> None:
        raise error

    monkeypatch.setattr(runner.Runner, "run", fail)
    monkeypatch.setattr(
        sys,
        "argv",
        ["runner", "--config", str(config.server.state.parent / "server.toml"), "--study", study],
    )
    with pytest.raises(SystemExit) as ended:
        runner.main()
    expected = ServiceError.exit_code if isinstance(error, OSError) else 1
    assert ended.value.code == expected
    found = registry.studies.get(study)
    assert found.state == "paused"
    assert told in found.reason
    assert PLANTED not in found.reason
