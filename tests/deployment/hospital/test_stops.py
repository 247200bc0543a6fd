"""A hospital that is stopped, runs out of disk, or loses its images."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fedward.plan.schema import Plan

pytestmark = pytest.mark.integration
Make = Callable[..., Any]


def full(folder: Path) -> Path:
    """Fill a disk to its last byte; gives the file that takes the room."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x")
    return ballast


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root makes a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_costs_a_round_and_no_more(
    coordinator: Any,
    make_hospital: Make,
    small_disk: Path,
    make_private: Make,
    until: Make,
    refusal_of: Make,
) -> None:
    """Cache, then ledger and audit log: nothing leaves that could not be written down."""
    plan, site = make_private(), make_hospital(3)
    shutil.copytree(site.state, small_disk, dirs_exist_ok=True)
    text = site.daemon.config.read_text()
    site.daemon.config.write_text(text.replace('state = "state"', f'state = "{small_disk}"'))
    site.state = small_disk
    site.start()
    until(lambda: site.online)
    # The cache: there is room for the log, but not for the prepared images.
    ballast = full(small_disk)
    os.truncate(ballast, ballast.stat().st_size - (100 << 10))
    assert "refusal" in coordinator.ask(site.node, coordinator.order(plan, 1, "full"))
    ballast.unlink()
    assert "outcome" in coordinator.ask(site.node, coordinator.order(plan, 2, "full"))
    # Ledger and log: the trainer is warm, and not a byte can be written.
    ballast = full(small_disk)
    kind, _ = refusal_of(coordinator.ask(site.node, coordinator.order(plan, 3, "full")))
    assert kind in ("budget", "error")
    ballast.unlink()
    assert "outcome" in coordinator.ask(site.node, coordinator.order(plan, 4, "full"))
    # A trainer that cannot start for want of room is started until it can.
    ballast = full(small_disk)
    site.daemon.kill("trainer")
    until(lambda: site.daemon.log.count("the trainer ended") >= 3)
    assert site.daemon.call("audit", "verify")["whole"] is True
    assert site.daemon.process.poll() is None
    ballast.unlink()
    assert "outcome" in coordinator.ask(site.node, coordinator.order(plan, 5, "full"))
    row = site.row("full")
    assert row["released"] == 3
    assert row["charged"] == row["released"] + row["lost"]
    assert site.daemon.call("audit", "verify")["whole"] is True
    assert site.daemon.stop() == 0


def nobody_listens() -> str:
    """An address on this machine where nothing answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{number}").exists() for number in pids)


def descendants(of: int) -> list[int]:
    """A process and all that it started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    found = [of]
    for one in found:
        found += [number for number, parent in parents.items() if parent == one]
    return found


@pytest.fixture(scope="module")
def stopped(make_hospital: Make) -> Any:
    """A hospital that does not run between tests; its budget is enough for all of them."""
    return make_hospital(2, "max_epsilon_per_cohort = 1000.0\nmax_delta = 0.01")


@pytest.fixture
def stopping(stopped: Any) -> Iterator[Any]:
    """A hospital that the test starts and stops, with nothing left over from the test before."""
    text = stopped.daemon.config.read_text()
    yield stopped
    if stopped.daemon.process is not None and stopped.daemon.process.poll() is None:
        stopped.daemon.stop()
    stopped.daemon.config.write_text(text)
    # An order without an answer would be resumed, and the next test's own would wait for it.
    for left in (stopped.daemon.folder / "connector" / "spool").glob("*"):
        left.unlink()


PHASES = ["idle", "starting", "preparing", "training", "evaluating", "sending", "no link"]


@contextmanager
def frozen(process: Any) -> Iterator[None]:
    """A process that takes and gives nothing for a while."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_is_prompt_and_clean_at_every_moment(
    coordinator: Any,
    stopping: Any,
    make_plan: Make,
    make_private: Make,
    until: Make,
    phase: str,
) -> None:
    if phase == "no link":
        text, address = stopping.daemon.config.read_text(), coordinator.superlink.address
        stopping.daemon.config.write_text(text.replace(address, nobody_listens()))
    (stopping.daemon.folder / "daemon.log").write_text("")
    stopping.start("run" if phase == "starting" else "")
    if phase == "starting":
        until(lambda: len(stopping.daemon.children()) == 2)
    else:
        wanted = "down" if phase == "no link" else "online"
        until(lambda: stopping.link.get("state") == wanted)
    if phase in ("preparing", "training"):
        long = make_private(1_000)
        coordinator.send(stopping.node, coordinator.order(long, 1, f"stop-{phase}"), ttl=20.0)
        until(lambda: stopping.step(f"stop-{phase}") >= int(phase == "training"))
    if phase == "evaluating":
        large = make_plan(
            task={"classes": ["clear", "opacity"]},
            split={"given": None},
            model={"name": "resnet50", "channels": None},
            preprocessing={"size": [320, 320]},
        )
        order = coordinator.order(large, 1, "stop-evaluating", task="evaluate")
        coordinator.send(stopping.node, order, "evaluate", ttl=20.0)
        until(lambda: stopping.trainer["doing"] == "evaluating")
    with ExitStack() as stack:
        if phase == "sending":
            before = len(stopping.told("sent"))
            some = coordinator.order(make_private(150), 1, "stop-sending")
            coordinator.send(stopping.node, some)
            until(lambda: stopping.step("stop-sending") > 0)
            stack.enter_context(frozen(coordinator.superlink.process))
            until(lambda: len(stopping.told("sent")) > before)
        running = descendants(stopping.daemon.process.pid)
        assert stopping.daemon.stop() == 0
        # The supervisor kills after ten seconds; neither process lets it come to that.
        assert "is killed" not in stopping.daemon.log
        until(lambda: gone(running), 5)
    assert "Traceback" not in stopping.daemon.log
    assert not (stopping.daemon.folder / "run" / "t.sock").exists()
    # Stopped before it had begun for the first time, it has nothing to say yet.
    if phase != "starting" or (stopping.state / "audit").exists():
        assert stopping.whole


def test_a_dataset_that_went_away_is_told_and_comes_back(
    coordinator: Any, stopping: Any, plan: Plan, until: Make, refusal_of: Make
) -> None:
    text = stopping.daemon.config.read_text()
    root = Path(text.split('root = "')[1].split('"')[0])
    away = root.with_name("away")
    shutil.copytree(root, away)
    stopping.daemon.config.write_text(text.replace(str(root), str(away)))
    stopping.start()
    until(lambda: stopping.link.get("state") == "online")
    shutil.rmtree(away)

    def ask(round_: int) -> Any:
        return coordinator.ask(stopping.node, coordinator.order(plan, round_, "away"))

    answer = ask(1)
    assert refusal_of(answer)[0] == "data"
    assert "away" not in str(refusal_of(answer))
    stopping.daemon.kill("trainer")  # which starts again without it
    until(lambda: stopping.trainer.get("connector") == "hidden")
    assert refusal_of(ask(2))[0] == "data"
    shutil.copytree(root, away)
    assert "outcome" in ask(3).config_records
    shutil.rmtree(away)
    assert stopping.daemon.stop() == 0
    # As after a boot at which the mount is late.
    stopping.start()
    until(lambda: stopping.online)
    assert "dataset chest is not there; studies that need it are refused" in stopping.daemon.log
    assert refusal_of(ask(4))[0] == "data"
    assert stopping.daemon.stop() == 0
