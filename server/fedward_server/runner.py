"""Run one study of the registry to its end, over a SuperLink that may come and go.

A process of its own: ``python -m fedward_server.runner --config server.toml --study ID``. Whatever
kills it, the next one goes on at the round after the last that was kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from fedward.startup import prepare

if __name__ == "__main__":
    prepare()  # before Flower and torch are imported

import httpx

from fedward.console import log_to_stderr
from fedward.errors import (
    DivergenceError,
    FedwardError,
    Interrupted,
    OutputError,
    ServiceError,
    StudyError,
)
from fedward.flower.control_client import ControlClient
from fedward.flower.server_session import RunSession
from fedward.models import build_model, describe, load_initial, to_arrays
from fedward_server import events
from fedward_server.config import ServerConfig, load_config
from fedward_server.job import Arrays, Job, SizeLimit
from fedward_server.privacy_spent import carry_over, charge_ordered
from fedward_server.registry import Registry, open_registry
from fedward_server.registry.records import Study
from fedward_server.registry.sites import Site
from fedward_server.reply_validation import InvalidReply
from fedward_server.results import Arm, StudyResults
from fedward_server.round_loop import StudyRun
from fedward_server.study_persistence import AWAY, StudyPersistence

_LOG = logging.getLogger("fedward.server")
_LOOK: Final = 0.5
_LONGEST: Final = 15.0
_SHORT: Final = 4.0
PACKAGES: Final = ("fedward", "flwr", "torch", "monai", "opacus")


@dataclass
class Runner:
    """Runs one study.

    Attributes
    ----------
    config : ServerConfig
        The aggregator.
    registry : Registry
        Where the study stands, and is told what happens.
    study : Study
        What to run.
    """

    config: ServerConfig
    registry: Registry
    study: Study
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.plan = self.study.read_plan()
        self.folder = self.config.study_folder(self.study.id)
        self.results = self._results()
        self.results.named = list(self.study.sites)
        self.results.evaluate_only = list(self.study.evaluate_only)
        self.keeper = StudyPersistence(
            self.folder, self.registry, self.study, self.plan, self.results, self.stop
        )
        self._looking = threading.Lock()
        self._waits = False
        self.job = self._job()

    def run(self) -> None:
        """Go on until the study is complete or an operator wants it to stand still.

        Raises
        ------
        FedwardError
            It cannot go on at all.
        """
        began = time.perf_counter() - self.results.seconds
        if self.keeper.restore(self.job):
            self._tell("restored", {"round": len(self.job.arm.rounds)})
        else:
            self.job.arrays = self._initial()
            self.job.average = dict(self.job.arrays)
        if self.results.arms:
            carry_over(self.job.arm, self.results.arms[0])
        self._charge_what_was_open()
        self.results.arms = [self.job.arm]
        threading.Thread(target=self._watch, daemon=True, name="wishes").start()
        pause = 0.5
        while not self.job.complete and not self.stop.is_set():
            try:
                self._session()
                pause = 0.5
            except DivergenceError:
                raise  # of the plan: no other session mends it
            except (httpx.HTTPError, StudyError, OSError, *AWAY) as error:
                self._broke(error, pause)
                self.stop.wait(pause)
                pause = min(2 * pause, _LONGEST)
        self.results.seconds = time.perf_counter() - began
        self.keeper.tell(self.job)
        if self.job.complete:
            self.keeper.deliver(self.job)

    def _charge_what_was_open(self) -> None:
        """A runner before this one may have ordered the next round, and not lived to count it."""
        if self.job.round <= self.plan.last_trained_round:
            known = {one.site: one for one in self.results.sites} | self.job.facts
            for name in known.keys() - self.job.evaluate_only:
                facts = known[name]
                charge_ordered(self.job.arm, self.plan, facts, self.job.round)

    def _broke(self, error: Exception, pause: float) -> None:
        """A break is mended at once in most cases; an operator hears of one that lasts."""
        _LOG.warning("the run broke: %s", type(error).__name__)
        if pause > _SHORT:
            told = isinstance(error, StudyError)
            self._state("paused", str(error) if told else "the SuperLink must be reachable")

    def _session(self) -> None:
        """One Flower run, from its start to the end of the study or a break."""
        secret = self.config.control_secret.read_bytes().strip()
        link = ControlClient(self.config.superlink_address, self.config.tls.ca.read_bytes(), secret)
        try:
            self._stop_last_run(link)
            if not self._see_members():
                raise StudyError("a study needs sites that are enrolled", fix="Enrol them")
            runtime = self.config.runtime_secret.read_bytes().strip()
            session = RunSession(link, runtime, self.config.server.state / "runs")
            (self.folder / "run").write_text(str(session.run_id))
            try:
                StudyRun(self.job, session.grid).run()
            finally:
                session.close(complete=self.job.complete)
        finally:
            link.close()

    def _stop_last_run(self, link: ControlClient) -> None:
        """What a killed runner left running must reach no hospital any more."""
        try:
            last = int((self.folder / "run").read_text())
        except (OSError, ValueError):
            return
        link.stop_run(last)

    def _see_members(self) -> Mapping[int, str]:
        """The study's sites that may take part: enrolled, not quarantined, with their last key."""
        with self._looking:
            there = {one.name: one for one in self.registry.sites.list()}
            put_out = self.registry.studies.quarantined(self.study.id)
            reached = (*self.study.sites, *self.study.evaluate_only)
            named = {name: there.get(name) for name in reached}
            self.job.left_out = {
                name: bad
                for name, site in named.items()
                if (bad := _left_out(site, put_out.get(name))) is not None
            }
            self.job.limits = {
                name: SizeLimit(site.max_patients, site.max_images)
                for name, site in named.items()
                if site is not None
            }
            self.job.members = {
                site.node_id: name
                for name, site in named.items()
                if site is not None and site.node_id is not None and name not in self.job.left_out
            }
            return self.job.members

    def _job(self) -> Job:
        epsilon, delta = self.plan.privacy.epsilon, self.plan.privacy.delta
        name = "federated" if epsilon is None else f"federated, ε = {epsilon:g}"
        arm = Arm(name=name, kind="federated", epsilon=epsilon, delta=delta)
        return Job(
            self.plan,
            {},
            arm,
            self.study.seed,
            self._listen,
            self.stop,
            study=self.study.id,
            sign=self.registry.sign,
            save=self.keeper.keep,
            patient=True,
            ask_again_seconds=5.0,
            quorum=self.study.quorum,
            deadline=self.study.deadline,
            evaluate_only=frozenset(self.study.evaluate_only),
        )

    def _initial(self) -> Arrays:
        model = build_model(self.plan, self.study.seed)
        if self.plan.model.initial_weights is not None:
            report = load_initial(model, self.plan, self.config.weights)
            self.results.take_weights(report)
        return to_arrays(model)

    def _listen(self, event: events.Event) -> None:
        try:
            self._note(event)
        except AWAY as error:
            # Whoever watches misses it; what counts is kept with the round.
            _LOG.warning("the registry did not answer: %s", type(error).__name__)

    def _note(self, event: events.Event) -> None:
        told = _telling(event)
        if told is not None:
            self._tell(*told)
        if self.plan.privacy.on and isinstance(event, events.StudyStarted | events.SiteJoined):
            # Before a site is ordered anything: who was, is known to whoever goes on after a crash.
            self.keeper.tell(self.job)
        if isinstance(event, events.StudyPaused):
            self._state("paused", event.reason)
        elif isinstance(event, events.StudyResumed | events.StudyStarted):
            self._state("running")
        elif isinstance(event, events.SiteQuarantined):
            self.registry.studies.quarantine(self.study.id, event.site, event.reason)
            self._see_members()

    def _state(self, state: Any, reason: str = "") -> None:
        # An operator may have ended the study in this moment; the watch then stops it.
        if not self.stop.is_set():
            try:
                self.registry.studies.set_state(self.study.id, state, reason)
                self._waits = state == "paused"
            except StudyError as error:
                _LOG.info("%s", error.rule)

    def _tell(self, kind: str, payload: dict[str, Any]) -> None:
        self.registry.studies.add_event(self.study.id, kind, payload)

    def _watch(self) -> None:
        """See what an operator wants of the study, and who may take part."""
        while not self.stop.wait(_LOOK):
            try:
                self._see_members()
                self._see_wish()
            except Exception as error:  # a database that is away for a moment
                _LOG.warning("the registry did not answer: %s", type(error).__name__)

    def _see_wish(self) -> None:
        """Stop where the study is to stand still; where it waits and was resumed, try again."""
        now = self.registry.studies.get(self.study.id)
        if now.wanted != "run":
            self.stop.set()
        elif self._waits and now.state == "submitted":
            self._waits = False
            self.job.again.set()

    def _results(self) -> StudyResults:
        kept = self.registry.studies.results(self.study.id)
        if kept is not None:
            return kept
        return StudyResults(
            study=self.plan.study.name,
            title=self.plan.study.title,
            plan=self.plan.model_dump(mode="json"),
            plan_sha256=self.study.plan_sha256,
            seed=self.study.seed,
            engine="superlink",
            device="hospitals'",
            partition="hospitals",
            primary=self.plan.metrics.primary,
            parameters=describe(self.plan).parameters,
            versions=_versions(),
        )


def _telling(event: events.Event) -> tuple[str, dict[str, Any]] | None:
    """What those who watch a study hear of an event; rounds are told when they are kept."""
    match event:
        case events.StudyStarted():
            return "started", {"sites": list(event.sites), "rounds": event.rounds}
        case events.SiteJoined():
            return "joined", {"site": event.site, "round": event.round}
        case events.SiteRefused():
            return "refused", {
                "site": event.site,
                "round": event.round,
                "kind": event.kind,
                "reason": event.reason,
            }
        case events.SiteQuarantined():
            return "quarantined", {"site": event.site, "round": event.round, "reason": event.reason}
        case events.SiteWarned():
            return "warned", {"site": event.site, "round": event.round, "reason": event.reason}
        case events.SiteAnswered():
            return "answered", {"site": event.site, "round": event.round, "what": event.what}
    return None


def _left_out(site: Site | None, quarantined: str | None) -> InvalidReply | None:
    """Why a site of the study may take no part now."""
    if site is None:
        return InvalidReply("not enrolled any more", "silent")
    if quarantined is not None:
        return InvalidReply(f"quarantined in this study: {quarantined}")
    return (
        None
        if site.node_id is not None
        else InvalidReply("not known to the SuperLink yet", "silent")
    )


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description="Run one study.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--study", required=True)
    given = parser.parse_args()
    log_to_stderr()
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    try:
        config = load_config(given.config)
        log_to_stderr(config.server.log_level)
        _run(config, given.study)
    except FedwardError as error:
        _LOG.error("%s", error)
        sys.exit(error.exit_code)
    except (OSError, *AWAY) as error:
        _LOG.error("disk or registry did not answer: %s", type(error).__name__)
        sys.exit(ServiceError.exit_code)


def _run(config: ServerConfig, study: str) -> None:
    os.environ["FLWR_HOME"] = str(config.server.state / "flwr")
    registry = open_registry(config)
    found = registry.studies.get(study)
    if found.ended or found.wanted != "run":
        return
    try:
        Runner(config, registry, found).run()
    except Interrupted:
        raise
    except FedwardError as error:
        registry.studies.set_state(study, "failed", str(error)[:1000])
        raise
    except AWAY:
        raise  # it may be back for the next runner
    except OSError as error:
        registry.studies.set_state(study, "paused", str(_disk(error)))
        raise
    except Exception as error:
        _LOG.exception("an unexpected error ended the runner of %s", study)
        # The dispatcher starts it again, a few times.
        registry.studies.set_state(study, "paused", unexpected(error))
        sys.exit(FedwardError.exit_code)


def _disk(error: OSError) -> OutputError:
    return OutputError(
        "the state folder must be readable and writable",
        value=error.strerror,
        fix="Mend it; the study goes on by itself",
    )


def unexpected(error: Exception) -> str:
    """What an operator reads of an error that has no words of its own; the log has the rest."""
    return f"an unexpected error ended the study's runner ({type(error).__name__})."


def _end(number: int, frame: FrameType | None) -> None:
    raise Interrupted("the runner was told to end", fix="It goes on when it is started again")


if __name__ == "__main__":
    main()
