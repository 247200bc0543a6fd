"""The walls as real processes find them: on a kernel that makes none, and started without."""

from __future__ import annotations

import ctypes
import platform
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import warm_start

from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode

pytestmark = pytest.mark.integration
Make = Callable[..., Any]
UNSHARE = {"x86_64": 272, "aarch64": 97}
ALLOW, EPERM, ERRNO = 0x7FFF0000, 1, 0x00050000


def no_namespaces() -> None:
    """As on a kernel that makes no namespaces for users: unshare(2) fails (seccomp(2))."""
    number = UNSHARE[platform.machine()]
    # Load the call's number; unshare gives EPERM, all else is let through.
    give = [(0x06, 0, 0, ERRNO | EPERM), (0x06, 0, 0, ALLOW)]
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), *give]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    rule = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.create_string_buffer(rule), 0, 0) == 0  # PR_SET_SECCOMP


@pytest.fixture
def run(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a command of a hospital that ends with the test."""
    made: list[subprocess.Popen[bytes]] = []

    def start(site: Any, which: str, **how: Any) -> subprocess.Popen[bytes]:
        (site.daemon.folder / "connector" / "link.json").unlink(missing_ok=True)
        words = [
            sys.executable,
            "-m",
            "fedward_client.cli",
            which,
            "--config",
            str(site.daemon.config),
        ]
        with (site.daemon.folder / "daemon.log").open("ab") as log:
            popen = subprocess.Popen if how else warm_start.popen
            made.append(popen(words, env=environment, stdout=log, stderr=log, **how))
        return made[-1]

    yield start
    for process in made:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.skipif(platform.machine() not in UNSHARE, reason="knows two kinds of machine")
def test_without_walls_no_dataset_is_opened_unless_the_site_says_so_aloud(
    coordinator: Any, make_hospital: Make, plan: Plan, until: Make, refusal_of: Make, run: Make
) -> None:
    site = make_hospital(3)
    daemon = run(site, "run", preexec_fn=no_namespaces)
    until(lambda: site.online and site.trainer.get("connector") == "can read images")
    answer = coordinator.ask(site.node, coordinator.order(plan, 1, "walls"))
    assert refusal_of(answer)[0] == "policy"
    assert refusal_of(answer)[1] == RuleCode.CONNECTOR.text
    shouted = " ".join(site.trainer["warnings"])
    assert "no dataset is opened" in shouted
    assert "can read images" in shouted
    assert site.daemon.call("status")["trainer"]["warnings"] == site.trainer["warnings"]
    for process, entry in zip(("trainer", "connector"), site.told("isolation"), strict=True):
        assert (entry["process"], entry["holds"]) == (process, False)
    assert not site.told("charge")
    daemon.terminate()
    assert daemon.wait(20) == 0

    # Each by itself, as a service manager starts them, and nobody made walls for them.
    text = site.daemon.config.read_text()
    allowed = text.replace(
        "[trainer]", "[trainer]\nallow_networked_trainer = true\nallow_unconfined_connector = true"
    )
    site.daemon.config.write_text(allowed)
    both = [run(site, which) for which in ("trainer", "connector")]
    until(lambda: site.online and site.trainer.get("connector") == "can read images")
    assert (
        "outcome" in coordinator.ask(site.node, coordinator.order(plan, 2, "walls")).config_records
    )
    assert "site.toml allows it" in " ".join(site.trainer["warnings"])
    assert site.told("isolation")[2]["allowed_anyway"] is True
    for process in reversed(both):
        process.terminate()
    assert [process.wait(20) for process in both] == [0, 0]
    assert site.whole
