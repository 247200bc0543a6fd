"""Keep what a study reached; where disk or database cannot take it, wait until they can."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from sqlalchemy.exc import InterfaceError, OperationalError

from fedward.errors import FedwardError, OutputError
from fedward.integrity import about_model
from fedward.models import save_model
from fedward.plan.load import canonical
from fedward.plan.schema import Plan
from fedward_server.checkpoints import Checkpoints
from fedward_server.job import Job
from fedward_server.registry import Registry
from fedward_server.registry.records import State, Study
from fedward_server.report import write_metrics, write_report
from fedward_server.report.summary import delivered, few_sites, unmeasured
from fedward_server.results import StudyResults

_LOG = logging.getLogger("fedward.server")
_LONGEST: Final = 30.0
# A database that is away, locked for long, or has no room.
AWAY: Final = (OperationalError, InterfaceError)


class StudyPersistence:
    """What stands of a study, on disk and in the registry.

    Parameters
    ----------
    folder : Path
        The study's.
    registry, study, plan : Registry, Study, Plan
        What is kept, and where.
    results : StudyResults
        The report's data; brought up to date.
    stop : threading.Event
        Ends the waiting.
    """

    def __init__(
        self,
        folder: Path,
        registry: Registry,
        study: Study,
        plan: Plan,
        results: StudyResults,
        stop: threading.Event,
    ) -> None:
        self._folder, self._registry, self._study, self._plan = folder, registry, study, plan
        self._results, self._stop, self._unwritten = results, stop, ""
        self._checkpoints = Checkpoints(folder / "rounds", study.plan_sha256)

    def restore(self, job: Job) -> bool:
        """Bring a job to its last checkpoint, and the registry to it too; whether there was one.

        Whoever was killed between the two has finished a round that the registry lacks.
        """
        if not self._checkpoints.restore(job):
            return False
        self._until_done(lambda: self._catch_up(job))
        return True

    def keep(self, job: Job) -> None:
        """Checkpoint first: what the registry tells has happened for good."""
        if self._until_done(lambda: self._checkpoints.save(job)):
            self.tell(job)

    def tell(self, job: Job) -> None:
        """Bring the registry up to date."""
        self._until_done(lambda: self._tell(job))

    def deliver(self, job: Job) -> None:
        """Write model and report, and end the study."""
        self._results.complete = True
        if self._until_done(lambda: self._deliver(job)):
            self._until_done(lambda: self._finish(job))

    def _finish(self, job: Job) -> None:
        self._registry.studies.save_results(self._study.id, self._results)
        told = [unmeasured(job.arm)] if job.arm.unmeasured else []
        chosen = delivered(job.arm, self._plan.metrics.primary)
        told += [one for one in (chosen, few_sites(job.arm, self._plan), self._unwritten) if one]
        self._registry.studies.set_state(self._study.id, "finished", " ".join(told))

    def _catch_up(self, job: Job) -> None:
        known = {one.round for one in self._registry.studies.rounds(self._study.id)}
        for result in job.arm.rounds:
            if result.round not in known:
                self._registry.studies.save_round(self._study.id, result)

    def _tell(self, job: Job) -> None:
        self._results.arms = [job.arm]
        self._results.sites = [job.facts[name] for name in sorted(job.facts)]
        self._results.unchecked = [
            name
            for name in sorted(job.facts)
            if (limit := job.limits.get(name)) is None or None in (limit.patients, limit.images)
        ]
        self._results.synthetic = any(one.synthetic for one in self._results.sites)
        if job.arm.rounds:
            self._registry.studies.save_round(self._study.id, job.arm.rounds[-1])
        self._registry.studies.save_results(self._study.id, self._results)
        for name, facts in job.facts.items():
            if self._registry.sites.find(name) is not None:
                self._registry.sites.set_facts(name, facts)

    def _deliver(self, job: Job) -> None:
        try:
            about = about_model(self._study.id, self._plan, "shared")
            about = self._registry.sign_model(about, job.average)
            self._results.model_sha256 = save_model(
                self._folder / "model.safetensors", job.average, about
            )
            (self._folder / "plan.json").write_text(canonical(self._plan), "utf-8")
            write_metrics(self._results, self._folder / "metrics.json")
            self._report()
        except OSError as error:
            raise OutputError(
                "results must be written", value=error.strerror, fix="Free the disk"
            ) from None

    def _report(self) -> None:
        self._unwritten = ""
        try:
            write_report([self._results], self._folder / "report.html")
        except OSError:
            raise  # there may be room later
        except Exception as error:  # the model is delivered without it
            _LOG.exception("the report could not be written")
            self._unwritten = f"The report could not be written ({type(error).__name__})."

    def _until_done(self, act: Callable[[], None]) -> bool:
        """Do it, now or when there is room again; whether it was done before the stop."""
        pause = 0.5
        while True:
            try:
                act()
            except (OutputError, *AWAY) as error:
                self._hindered(error)
                if self._stop.wait(pause):
                    return False
                pause = min(2 * pause, _LONGEST)
            else:
                if pause > 0.5:
                    self._state("running")
                return True

    def _hindered(self, error: Exception) -> None:
        reason = "the registry must be writable. Make room, or bring its database back."
        if isinstance(error, FedwardError):
            reason = str(error)
        _LOG.warning("the study waits: %s", reason)
        self._state("paused", reason)

    def _state(self, state: State, reason: str = "") -> None:
        # On a full disk the reason may have no room either; the log has it.
        if not self._stop.is_set():
            with suppress(FedwardError, *AWAY):
                self._registry.studies.set_state(self._study.id, state, reason)
