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
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, cast

from fedward.errors import ConfigError, DataError, FedwardError
from fedward_client.audit.log import AuditLog
from fedward_client.cohort.freeze import load
from fedward_client.cohort.open import cohort_path
from fedward_client.config import SiteConfig
from fedward_client.ledger import Caps, Ledger
from fedward_client.policy.approvals import Approval, Approvals
from fedward_client.trainer.service import TrainerService
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
