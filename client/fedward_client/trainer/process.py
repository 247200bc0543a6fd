"""The trainer as a process: proves its walls, opens ledger and audit log, serves its sockets."""

from __future__ import annotations

import grp
import hashlib
import json
import logging
import os
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from fedward.console import stop_on_signals, wait_until
from fedward.errors import ConfigError, DataError
from fedward.files import write_private
from fedward.rule_codes import RuleCode
from fedward_client.audit.log import AuditLog, audit_folder, audit_key
from fedward_client.cohort.training import preparers
from fedward_client.config import SiteConfig
from fedward_client.daemon.isolation import find_network, undumpable
from fedward_client.ledger import Ledger, name_secret
from fedward_client.ledger.releases import Releases
from fedward_client.link.service import serve
from fedward_client.policy.approvals import Approvals
from fedward_client.secret import site_secret
from fedward_client.trainer.admin import Admin, serve_admin
from fedward_client.trainer.admin_client import admin_socket
from fedward_client.trainer.executor import Executor
from fedward_client.trainer.reload import watch_policy
from fedward_client.trainer.service import STRANGER, TrainerService
from fedward_client.trainer.status import StatusBoard
from fedward_client.trainer.study_context import StudyContexts
from fedward_client.trainer.trainer_cache import TrainerCache
from fedward_client.trainer.watchdog import OrdersInHand, watch
from fedward_client.training.device import choose_device
from fedward_client.training.runtime import Runtime
from fedward_client.worker_pool import Limits

_LOG = logging.getLogger("fedward.trainer")
_GRACE: Final = 5.0
NETWORKED: Final = "THE TRAINER HAS A NETWORK and site.toml allows it"
UNUSABLE: Final = "site.toml was changed and cannot be used; the policy before it still holds"
_BEGINNING: Final = 40  # of a text with a fingerprint in it
WALLS_DOWN: Final = "the trainer has a network: no dataset is opened; see fedward-client doctor"


def run_trainer(
    config: SiteConfig, stop: threading.Event | None = None, path: Path | None = None
) -> None:
    """Serve until a signal comes.

    Parameters
    ----------
    config : SiteConfig
        The site.
    stop : threading.Event, optional
        Ends it too.
    path : Path, optional
        The configuration's file: a policy that is changed in it holds from the next order on.

    Raises
    ------
    FedwardError
        Something that it needs cannot be used: the state folder, ledger, audit log or socket.
    """
    stop = stop or threading.Event()
    stop_on_signals(stop)
    undumpable()
    state, board = config.site.state, StatusBoard(config.site.name)
    secret = site_secret(state)
    audit = AuditLog(audit_folder(state), audit_key(state))
    ledger = Ledger(state, secret_id=name_secret(secret))
    audit.append("started", process="trainer")
    _tell_changes(state, audit, config)
    _prove_walls(config, audit, board)
    cases = StudyContexts(config, audit)
    _pin_studies(cases, ledger)
    releases, approvals = Releases(state / "releases"), Approvals(state)
    in_hand = OrdersInHand(state)
    _tell_last_stop(in_hand, audit, board)
    # Numbers near zero take a hundred times as long: chosen weights could make the time of an order
    # tell about one patient's image. Threads that start later inherit it.
    torch.set_flush_denormal(True)
    runtime = runtime_of(config)
    with preparers(Limits(workers=runtime.threads)) as crew:
        trainers = TrainerCache(config, ledger, board, secret, runtime, crew)
        work = Executor(cases, trainers, ledger, releases, audit)
        trainers.between_steps = work.check_going
        desk = TrainerService(cases, work, audit, approvals, board, in_hand)
        admin = Admin(config, desk, approvals, ledger, audit)
        if path is not None:
            _follow_policy(path, config, (cases, admin), audit, board, stop)
        end_watch = watch(in_hand.report, config.trainer.watchdog_seconds)
        end_admin = serve_admin(admin, admin_socket(config))
        end = serve(desk, config.trainer.socket, _most_bytes(config), _group(config))
        _LOG.info("the trainer serves %s", config.site.name)
        wait_until(stop)
        desk.close()
        end_admin()
        # What still runs is charged already; waiting for it would only hold up the machine.
        end(_GRACE)
        audit.append("stopped", process="trainer")
        ledger.close()
        end_watch()


def runtime_of(config: SiteConfig) -> Runtime:
    """The machine, within what the policy lets training take."""
    device = choose_device(config.trainer.device)
    cores = config.trainer.threads or len(os.sched_getaffinity(0))
    most = config.policy.max_gpu_memory_gib
    if device.type == "cuda" and most is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most * 2**30 / total), device)
    return Runtime(
        device=str(device),
        threads=min(cores, config.policy.max_threads or cores),
        cache=config.site.state / "cache",
        cache_bytes=round(config.site.cache_gib * 2**30),
        physical_batch=config.trainer.physical_batch,
    )


def _prove_walls(config: SiteConfig, audit: AuditLog, board: StatusBoard) -> None:
    found = find_network()
    allowed = config.trainer.allow_networked_trainer
    audit.append("isolation", process="trainer", holds=found.holds, allowed_anyway=allowed)
    board.set(network=found.text, walls=found.holds)
    if not found.holds:
        warning = NETWORKED if allowed else WALLS_DOWN
        _LOG.warning(warning)
        board.set(warnings=[warning])


def _tell_last_stop(in_hand: OrdersInHand, audit: AuditLog, board: StatusBoard) -> None:
    """Write down which orders ended the trainer before this one."""
    for order in in_hand.note_last_end():
        audit.append("watchdog", what=order.what, study=order.study, plan=order.plan)
        _LOG.warning("an order stopped the trainer, and is not carried out again")
        board.set(last_error=RuleCode.STOPS_TRAINER.text)


def _tell_changes(state: Path, audit: AuditLog, config: SiteConfig) -> None:
    """Write down that policy or release are not what they were when the trainer last ran."""
    policy = hashlib.sha256(config.policy.model_dump_json().encode()).hexdigest()
    now = {"policy": policy, "version": version("fedward")}
    path = state / "seen.json"
    try:
        before: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    if before.get("policy") != now["policy"]:
        audit.append("policy", sha256=policy)
    if before.get("version") != now["version"]:
        audit.append("version", version=now["version"], before=before.get("version", ""))
    if before != now:
        write_private(path, json.dumps(now).encode())


def _follow_policy(
    path: Path,
    config: SiteConfig,
    users: tuple[StudyContexts, Admin],
    audit: AuditLog,
    board: StatusBoard,
    stop: threading.Event,
) -> None:
    """Use a policy that was changed in the file, and write down that it was."""
    current = [config]

    def use(found: SiteConfig) -> None:
        if found.policy == current[0].policy:
            return
        current[0] = current[0].model_copy(update={"policy": found.policy})
        _tell_changes(config.site.state, audit, current[0])
        for one in users:
            one.use(current[0])
        others = [w for w in board.get()["warnings"] if not w.startswith(STRANGER[:_BEGINNING])]
        board.set(warnings=others)
        _LOG.info("the policy was changed, and holds from now on")

    def wrong(why: str) -> None:
        others = [w for w in board.get()["warnings"] if not w.startswith(UNUSABLE)]
        board.set(warnings=[*others, f"{UNUSABLE}: {why}"] if why else others)

    threading.Thread(
        target=watch_policy, args=(path, use, wrong, stop), daemon=True, name="policy"
    ).start()


def _pin_studies(cases: StudyContexts, ledger: Ledger) -> None:
    """A study goes on with the cohort that it began with, also where a newer one is there."""
    for row in ledger.studies():
        try:
            cases.pin(row["study"], row["dataset"], row["cohort"])
        except DataError:
            _LOG.warning("the cohort of study %s is not there any more", row["study"])


def _group(config: SiteConfig) -> int | None:
    name = config.trainer.group
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(
            "the socket's group must exist on this machine",
            value=name,
            fix="Make it, or another",
            where="trainer.group",
        ) from None


def _most_bytes(config: SiteConfig) -> int:
    return (config.server.max_download_mib if config.server else 1024) << 20
