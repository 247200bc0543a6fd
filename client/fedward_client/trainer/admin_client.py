"""How the site's officer asks a running trainer, over the socket of its admin service.

Without torch and Flower: a container asks for its health again and again, in a process of its own.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fedward.errors import ConfigError, FedwardError
from fedward_client.audit.log import AuditLog, audit_folder, audit_key
from fedward_client.config import SiteConfig
from fedward_client.link.state import link_file, read_state
from fedward_client.policy.approvals import Approvals
from fedward_client.trainer.status import Activity

_SECONDS: Final = 30.0
# What is answered without the trainer when it stays silent.
_URGENT: Final = {"status": 5.0, "deny": 5.0, "pause": 5.0}


class TrainerSilent(ConfigError):
    """A trainer is there but does not answer: it is busy beyond measure, or starts again."""


def admin_socket(config: SiteConfig) -> Path:
    """Where a site's officer talks to the trainer."""
    return config.site.state / "admin.sock"


def ask(path: Path, command: str, **arguments: Any) -> dict[str, Any]:
    """Ask a running trainer.

    Raises
    ------
    TrainerSilent
        It does not answer.
    ConfigError
        None runs.
    FedwardError
        What it answered, with its exit code.
    """
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(_URGENT.get(command, _SECONDS))
            link.connect(str(path))
            link.sendall(json.dumps({"command": command, "arguments": arguments}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(link.makefile("rb").readline())
    except (TimeoutError, ConnectionError, ValueError):
        raise TrainerSilent(
            "the trainer must answer", fix="Its watchdog starts it again; see the daemon's log"
        ) from None
    except OSError:
        raise ConfigError(
            "the daemon must run", fix="Start it with `fedward-client run`; only its owner may ask"
        ) from None
    if "error" in answer:
        raise _error(*answer["error"])
    return answer


def _error(name: str, rule: str, value: str, fix: str, where: str, code: int) -> FedwardError:
    from fedward import errors

    kind = getattr(errors, name, FedwardError)
    made: FedwardError = kind(rule, value=value or None, fix=fix, where=where)
    made.exit_code = code
    return made


def answer_for_silent(
    config: SiteConfig, command: str, arguments: dict[str, Any], who: str
) -> dict[str, Any]:
    """Do without the trainer what must not wait for it: status, deny and pause.

    What forbids something is written to the approvals that the trainer reads before each order, and
    to the audit log. What allows something waits for the trainer.

    Raises
    ------
    TrainerSilent
        The command waits.
    FedwardError
        It cannot be written, or no such study was seen.
    """
    state = config.site.state
    with _as_owner(state):
        approvals = Approvals(state)
        if command == "status":
            return _status(config, approvals)
        if command not in _URGENT:
            raise TrainerSilent(
                "the trainer must answer", fix="Ask again when its watchdog has started it again"
            )
        audit = AuditLog(audit_folder(state), audit_key(state))
        if command == "pause":
            approvals.pause(paused=True)
            audit.append("paused")
            return {"paused": True}
        made = approvals.settle(arguments["study"], "denied", who, arguments["plan"])
        audit.append("approval", study=made.study, plan=made.plan_hash, state="denied")
        return {"approval": made.model_dump()}


def _status(config: SiteConfig, approvals: Approvals) -> dict[str, Any]:
    """What can be known; the ledger is the trainer's alone."""
    now = Activity(config.site.name, doing="not answering", paused=approvals.paused)
    now.warnings.append(
        f"the trainer does not answer; after {config.trainer.watchdog_seconds:g} s its watchdog "
        "starts it again"
    )
    link: dict[str, Any] = {}
    if config.server is not None:
        with suppress(FedwardError):
            link = read_state(link_file(config.server.state))[0].model_dump()
    return {
        "trainer": asdict(now),
        "link": link,
        "pending": len(approvals.pending()),
        "budget": [],
        "studies": [],
        "older_ledgers_accepted": 0,
    }


@contextmanager
def _as_owner(folder: Path) -> Iterator[None]:
    """Where root asks, act as the trainer's user, so that it can read what is written."""
    if os.geteuid() != 0:
        yield
        return
    owner = folder.stat()
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
