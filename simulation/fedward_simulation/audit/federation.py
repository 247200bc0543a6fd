"""One more federation over the same hospitals: same plan, same start, other patients or noise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.dp.accounting import calibrate
from fedward.errors import StudyError
from fedward.plan.schema import Plan
from fedward_client.data.sample import PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.app import server_app
from fedward_server.events import Listener
from fedward_server.results import Arm
from fedward_server.round_loop import Job
from fedward_simulation.audit.view import SiteView
from fedward_simulation.local import State, run_local
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites

Arrays = dict[str, NDArray[Any]]
TrainerOf = Callable[[Plan, PreparedSite, Runtime], Trainer]
_NOBODY = np.empty(0, np.int64)


@dataclass(frozen=True)
class Outcome:
    """A federation that has ended.

    Attributes
    ----------
    model : dict
        The delivered model.
    arm : Arm
        Its rounds, and what each site spent.
    losses, confidences : list of NDArray
        Per site ``(N,)``, of each of its images under the delivered model.
    trainers : dict
        What each site's trainer kept for :attr:`Federation.collect`.
    """

    model: Arrays
    arm: Arm
    losses: list[NDArray[np.float64]]
    confidences: list[NDArray[np.float64]]
    trainers: dict[str, Any]


class _Sites(SimulatedSites):
    """Hospitals whose trainers are made by the audit."""

    def __init__(self, sites: Sequence[PreparedSite], runtime: Runtime, make: TrainerOf) -> None:
        super().__init__(sites, runtime)
        self._make, self._made = make, {}  # type: ignore[var-annotated]

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        if site.name not in self._made:
            self._made[site.name] = self._make(plan, site, self.runtime)
        made: Trainer = self._made[site.name]
        return made


@dataclass(frozen=True)
class Federation:
    """How the federations of an audit run.

    Attributes
    ----------
    plan : Plan
        The study's.
    arrays : dict
        The model that all of them start from.
    runtime : Runtime
        The machine.
    workers : int
        Processes, see :class:`fedward_simulation.pool.Pool`.
    listen, stop :
        As of a :class:`fedward_server.job.Job`.
    """

    plan: Plan
    arrays: Arrays
    runtime: Runtime
    workers: int
    listen: Listener
    stop: threading.Event

    def run(
        self, name: str, sites: Sequence[PreparedSite], seed: int, make: TrainerOf = Trainer
    ) -> Outcome:
        """Train on the sites' training patients; then look at all of their images.

        Raises
        ------
        StudyError
            The federation did not come to its end.
        """
        plan = unmeasured(self.plan)
        if plan.privacy.on:
            for site in sites:
                calibrate(plan, site.patients_in("train"))  # once, before the workers fork
        trained = [replace(site, split=_train_only(site)) for site in sites]
        pool = Pool(State(_Sites(trained, self.runtime, make)), self.workers)
        try:
            arm = Arm(name=name, kind="federated", epsilon=plan.privacy.epsilon)
            job = Job(plan, dict(self.arrays), arm, seed, self.listen, self.stop)
            run_local(server_app(job), pool, len(sites), job.site_states)
            if job.error is not None:
                raise job.error
            if len(arm.rounds) < plan.rounds:
                raise StudyError("a federation of the audit must come to its end", fix="Try again")
            return self._look(name, pool, job, sites)
        finally:
            pool.close()

    def look(self, name: str, sites: Sequence[PreparedSite], model: Arrays) -> Outcome:
        """Look at all images with a model that is there already."""
        pool = Pool(State(_Sites(sites, self.runtime, Trainer)), self.workers)
        try:
            job = Job(self.plan, model, Arm(name=name, kind="federated"))
            return self._look(name, pool, job, sites)
        finally:
            pool.close()

    def _look(self, name: str, pool: Pool, job: Job, sites: Sequence[PreparedSite]) -> Outcome:
        model = job.average
        waiting = [
            pool.submit(place, _signals, self.plan, model, place) for place in range(len(sites))
        ]
        found = [future.result() for future in waiting]
        return Outcome(
            model,
            job.arm,
            [one[0] for one in found],
            [one[1] for one in found],
            {site.name: one[2] for site, one in zip(sites, found, strict=True)},
        )


def unmeasured(plan: Plan) -> Plan:
    """The same training, also of few patients, without evaluations, which no attack reads.

    Nothing is chosen by them either: all rounds are trained, and the last model is attacked.
    """
    metrics = plan.metrics.model_copy(update={"evaluate_every": plan.rounds})
    part = plan.participation.model_copy(update={"minimum_patients": 1})
    training = plan.training.model_copy(update={"patience": None})
    if training.keep == "best":
        training = training.model_copy(update={"keep": "last"})
    return plan.model_copy(update={"metrics": metrics, "participation": part, "training": training})


def _train_only(site: PreparedSite) -> dict[Any, NDArray[np.int64]]:
    return {"train": site.split["train"], "validation": _NOBODY, "test": _NOBODY}


def _signals(
    state: State, plan: Plan, model: Arrays, place: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], Any]:
    site = state.sites.sites[place]
    state.sites.runtime.enter()
    view = SiteView(plan, site, state.sites.runtime)
    view.load(model, plan.rounds)
    made = state.sites._made.get(site.name) if isinstance(state.sites, _Sites) else None
    kept = made.kept() if made is not None and hasattr(made, "kept") else None
    return *view.signals(np.arange(len(site.images))), kept
