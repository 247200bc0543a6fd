"""What the site's officer may ask and tell a running trainer, over a socket of its own.

The socket lies in the site's state folder, which the connector does not see.
"""

from __future__ import annotations

import json
import os
import pwd
import socket
import socketserver
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, cast

from fedward.errors import ConfigError, DataError, FedwardError
from fedward_client.audit.log import AuditLog
from fedward_client.cohort.freeze import load
from fedward_client.cohort.open import cohort_path
from fedward_client.config import SiteConfig
from fedward_client.ledger import Caps, Ledger
from fedward_client.link.state import link_file, read_state
from fedward_client.policy.approvals import Approval, Approvals
from fedward_client.trainer.service import TrainerService
from fedward_client.trainer.status import Activity
from fedward_client.trainer.study_card import in_full, study_card

_MOST: Final = 1 << 16
_SECONDS: Final = 30.0


class Admin:
    """The officer's commands."""

    def __init__(
        self,
        config: SiteConfig,
        desk: TrainerService,
        approvals: Approvals,
        ledger: Ledger,
        audit: AuditLog,
    ) -> None:
        self._config, self._desk, self._approvals = config, desk, approvals
        self._ledger, self._audit = ledger, audit

    def use(self, config: SiteConfig) -> None:
        """Tell of another policy from now on."""
        self._config = config

    def do(self, command: str, arguments: dict[str, Any], who: str) -> dict[str, Any]:
        """Carry out a command.

        Raises
        ------
        FedwardError
            It cannot be.
        """
        act: dict[str, Callable[[], dict[str, Any]]] = {
            "status": self._status,
            "pending": self._pending,
            "plan": lambda: self._plan(arguments),
            "approve": lambda: self._settle("approved", arguments, who),
            "deny": lambda: self._settle("denied", arguments, who),
            "pause": lambda: self._pause(paused=True),
            "resume": lambda: self._pause(paused=False),
            "budget": self._budget,
            "audit": lambda: {"last": self._audit.last},
        }
        if command not in act:
            raise ConfigError("a command must be known", value=command[:40], fix="See --help")
        return act[command]()

    def _status(self) -> dict[str, Any]:
        now, pending = self._desk.status(), len(self._approvals.pending())
        return {"trainer": now, "link": self._desk.link, "pending": pending, **self._budget()}

    def _pending(self) -> dict[str, Any]:
        cards = [self._card(one) for one in self._approvals.pending()]
        return {"pending": cards, "warnings": self._desk.status()["warnings"]}

    def _card(self, one: Approval) -> dict[str, Any]:
        plan = self._approvals.plan(one)
        return cast("dict[str, Any]", study_card(one, plan, self._config, self._ledger))

    def _plan(self, arguments: dict[str, Any]) -> dict[str, Any]:
        study, plan = str(arguments.get("study", "")), str(arguments.get("plan", ""))
        found = self._approvals.find(study, plan)
        return {"study": in_full(self._card(found), self._approvals.plan(found))}

    def _settle(self, state: Any, arguments: dict[str, Any], who: str) -> dict[str, Any]:
        study, plan = str(arguments.get("study", "")), str(arguments.get("plan", ""))
        found = self._approvals.find(study, plan)

        def tell() -> None:
            self._audit.append("approval", study=found.study, plan=found.plan_hash, state=state)

        # What allows something is written down first; what ends something holds at once.
        if state == "approved":
            tell()
            self._desk.forgive(found.study)
        made = self._approvals.settle(found.study, state, who, found.plan_hash)
        if state == "denied":
            self._desk.cancel(made.study)
            tell()
            self._desk.end(made.study)
        return {"approval": made.model_dump()}

    def _pause(self, *, paused: bool) -> dict[str, Any]:
        self._desk.pause(paused=paused)
        return {"paused": paused}

    def _budget(self) -> dict[str, Any]:
        policy = self._config.policy
        caps = Caps(policy.max_epsilon_per_study, policy.max_epsilon_per_cohort, policy.max_delta)
        rows = []
        for sha, dataset, patients in self._ledger.cohorts():
            now = self._ledger.standing(sha, caps)
            rows.append(
                {
                    "dataset": dataset,
                    "cohort": sha[:12],
                    "patients": patients,
                    "delta": now.delta,
                    "images_are_patients": _per_image(self._config.site.state, dataset, sha),
                    "spent": round(now.spent, 4),
                    "cap": caps.cohort,
                    "left": round(now.left, 4),
                    "unbounded": {"studies": now.unbounded_studies, "rounds": now.unbounded_rounds},
                    "evaluations": {
                        "spent": round(self._ledger.evaluations.epsilon_of_cohort(sha), 4),
                        "cap": policy.max_evaluation_epsilon_per_cohort,
                        "unbounded_studies": len(self._ledger.evaluations.without_bound(sha)),
                    },
                }
            )
        return {
            "budget": rows,
            "studies": self._ledger.studies(policy.max_delta),
            "older_ledgers_accepted": self._ledger.accepted(),
        }


@lru_cache
def _per_image(state: Path, dataset: str, sha256: str) -> bool:
    """Whether a cohort names no patients; kept, since its record may be long and never changes."""
    try:
        return load(cohort_path(state, dataset, sha256)).per_image
    except DataError:  # the record was removed since
        return False


class _Handler(socketserver.StreamRequestHandler):
    timeout = _SECONDS

    def handle(self) -> None:
        try:
            asked = json.loads(self.rfile.readline(_MOST))
            command, arguments = str(asked["command"]), dict(asked.get("arguments", {}))
            answer = cast("_Server", self.server).admin.do(command, arguments, self._who())
        except FedwardError as error:
            answer = {
                "error": [
                    type(error).__name__,
                    error.rule,
                    str(error.value or ""),
                    error.fix,
                    error.where,
                    error.exit_code,
                ]
            }
        except (OSError, ValueError, KeyError, TypeError):
            answer = {"error": ["ConfigError", "a command must be a JSON object", "", "", "", 19]}
        with suppress(OSError):
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _who(self) -> str:
        """Who asks, as the kernel knows it."""
        raw = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        user = int.from_bytes(raw[4:8], "little")
        with suppress(KeyError):
            return pwd.getpwuid(user).pw_name
        return str(user)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, admin: Admin) -> None:
        self.admin = admin
        super().__init__(path, _Handler)


def serve_admin(admin: Admin, path: Path) -> Callable[[], None]:
    """Serve the officer; gives what ends it.

    Raises
    ------
    ConfigError
        The socket cannot be made.
    """
    if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
        path.unlink()  # the ledger's lock says that no other trainer is there
    before = os.umask(0o177)
    try:
        server = _Server(str(path), admin)
    except OSError as error:
        raise ConfigError(
            "the state folder must take a socket, so its path must be short",
            value=os.strerror(error.errno or 0) if error.errno else str(error),
            fix="Move site.state to a shorter path",
            where="site.state",
        ) from None
    finally:
        os.umask(before)
    threading.Thread(target=server.serve_forever, daemon=True, name="officer").start()

    def end() -> None:
        server.shutdown()
        server.server_close()
        path.unlink(missing_ok=True)

    return end


# How the site's officer asks a running trainer; imports nothing that takes time.

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
    from fedward_client.audit.log import AuditLog, audit_folder, audit_key
    from fedward_client.policy.approvals import Approvals

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
