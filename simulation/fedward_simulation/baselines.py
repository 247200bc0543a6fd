"""The arms that federation is measured against: each hospital alone, and all data in one place.

Each runs the same rounds as the federated study, by the same code, over one site: so they differ
from it in how the patients are divided and in nothing that the plan was tuned for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedward.flower import identity
from fedward.models import build_model, trainable_names
from fedward.plan.load import plan_from
from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode
from fedward_client.data.sample import PreparedSite
from fedward_client.training.fit import Fit
from fedward_client.training.optimizers import build_optimizer
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_server.metrics_summary import tested
from fedward_server.results import Arm, TestFigures, left_out_name
from fedward_server.round_loop import Job, StudyRun
from fedward_simulation.checkpoint import ArmFolder
from fedward_simulation.local import LocalGrid, State
from fedward_simulation.paired import SiteAnswers, answers_on_test
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites, pool_sites

Arrays = Mapping[str, NDArray[Any]]
Tested = tuple[TestFigures | None, str]
_MOST_IMAGES: Final = 4096  # of a step, and
_MOST_STEPS: Final = 100_000  # of a round: the plan's own bounds


def without(plan: Plan, site: str, sites: int) -> tuple[Plan, Arm]:
    """The plan and the arm of a study in which one of its hospitals takes no part."""
    content = plan.model_dump(mode="python")
    part = content["participation"]
    part["sites"] = min(part["sites"], sites - 1)
    if part["quorum"] is not None:
        part["quorum"] = min(part["quorum"], sites - 1)
    content["personal"] = None  # what is asked is how the shared model does elsewhere
    epsilon, delta = plan.privacy.epsilon, plan.privacy.delta
    arm = Arm(name=left_out_name(site), kind="left-out", site=site, epsilon=epsilon, delta=delta)
    return plan_from(content), arm


def test_everywhere(state: State, plan: Plan, arrays: Arrays) -> tuple[SiteAnswers, Tested]:
    """A model's answers at all hospitals, and its figures as :func:`tested` gives them."""
    sizes = {each.name: test_size(each) for each in state.sites.sites}
    answers = answers_on_test(state, plan, arrays)
    let_out = {name: state.sites.released(plan, each) for name, each in answers.items()}
    counts = {name: each for name, each in let_out.items() if each is not None}
    withheld = RuleCode.WITHHELD.text
    return answers, tested(plan, counts, sizes, missing=withheld, answers_by_site=False)


def arm_name(site: str | None) -> str:
    """The name of a hospital's lone arm, or of the pooled one for None."""
    return "pooled" if site is None else f"alone: {site}"


def lone_arm(
    state: State,
    plan: Plan,
    arrays: Arrays,
    seed: int,
    site: str | None,
    folder: ArmFolder | None = None,
) -> tuple[Arm, SiteAnswers]:
    """Train on one hospital's patients, or on all when ``site`` is None, and test everywhere.

    Parameters
    ----------
    state : State
        The hospitals.
    plan : Plan
        The study's, without privacy; :func:`lone_plan` says what is run of it.
    arrays : mapping
        The model that all arms start from.
    seed : int
        The study's.
    site : str or None
        Whose patients.
    folder : ArmFolder, optional
        Where the state of its rounds is kept; an arm that was broken off goes on from there.

    Returns
    -------
    arm : Arm
        With its test figures.
    answers : mapping
        The model's answers on each site's test patients.

    Raises
    ------
    StudyError, DivergenceError
        The arm cannot be trained; the error names it.
    """
    identity.become_server()
    data = pool_sites(state.sites.sites) if site is None else state.sites.by_name()[site]
    own = lone_plan(plan, len(state.sites.sites) if site is None else 1)
    arm = Arm(name=arm_name(site), kind="pooled" if site is None else "alone", site=site)
    job = Job(own, dict(arrays), arm, seed)
    kept = None if folder is None else folder.open(job)
    one = _OneSite(own, data, state.sites.runtime, job)
    try:
        # A run that was broken off between its last round and the test below is complete as well.
        if not job.complete:
            StudyRun(job, LocalGrid(Pool(State(one), 0), 1)).run()
        started = time.perf_counter()
        answers, (job.arm.test, job.arm.unmeasured) = test_everywhere(state, plan, job.average)
        job.arm.seconds += time.perf_counter() - started
        for result in job.arm.rounds:  # nothing travels, and the site is the arm
            result.bytes_down = result.bytes_up = 0
            result.sites = {}
        job.complete = True
        job.save(job)
    finally:
        if kept is not None:
            kept.flush()
    return job.arm, answers


def test_size(site: PreparedSite) -> tuple[int, int]:
    """Test images and test patients of a site."""
    own = site.split["test"]
    return len(own), len(np.unique(site.patients[own]))


def lone_plan(plan: Plan, sites: int) -> Plan:
    """The plan of a study over one site that has the patients of so many.

    With an optimiser at the server, the strategy stays: its steps are what the plan was tuned for.
    A local step then takes as many images as the steps of all sites together. Every other strategy
    takes one site's model as it is, so that this is plain training: batches stay as they are, and
    there are as many steps as at all sites together. Either way the arm sees as many images in a
    round as the sites do together.
    """
    content, training = plan.model_dump(mode="python"), plan.training
    given, steps = content["training"], training.local_steps
    content["personal"] = content["compression"] = None
    if plan.strategy.spec.server_optimizer:
        given["batch_size"] = min(_MOST_IMAGES, training.batch_size * sites)
        if steps is not None:
            ratio = training.batch_size * sites / given["batch_size"]
            given["local_steps"] = min(_MOST_STEPS, round(steps * ratio))
    else:
        content["strategy"] |= {"name": "fedavg", "settings": {}}
        if steps is not None:
            given["local_steps"] = min(_MOST_STEPS, steps * sites)
    # A round of one site waits for nobody, and takes what it takes.
    content["participation"] = {
        "sites": 1,
        "quorum": 1,
        "retries": 0,
        "minimum_patients": 1,
        "deadline": 1e9,
    }
    return plan_from(content)


class _OneTrainer(Trainer):
    """Goes on with one optimiser within a stage, as training in one place does.

    In a federated round a site's optimiser starts anew, its state being about a model that the
    server has replaced; here the server replaces nothing. The state stands in the job's memory
    under ``optimizer/``, where checkpoints find it.
    """

    def __init__(self, plan: Plan, site: PreparedSite, runtime: Runtime, job: Job) -> None:
        super().__init__(plan, site, runtime)
        self._optimizer: tuple[tuple[str, ...], torch.optim.Optimizer] | None = None
        self._job, keep = job, job.save
        before = {n[10:]: value for n, value in job.memory.items() if n.startswith("optimizer/")}
        done = plan.stage_of(max(1, len(job.arm.rounds)))[0]
        self._before = (trainable_names(build_model(plan, seed=0), done.train), before)

        def save(job: Job) -> None:
            job.memory = {f"optimizer/{name}": value for name, value in self._state().items()}
            keep(job)

        job.save = save

    def optimizer(self, fit: Fit) -> torch.optim.Optimizer:
        """The stage's."""
        names = self.trained
        if self._optimizer is None or self._optimizer[0] != names:
            made = build_optimizer(
                self.plan, [p for p in fit.module.parameters() if p.requires_grad]
            )
            if self._optimizer is None and self._before[0] == names:
                _remember(made, self._before[1])
            self._optimizer = names, made
        return self._optimizer[1]

    def _state(self) -> dict[str, NDArray[Any]]:
        if self._optimizer is None:
            return self._before[1]
        return {
            f"{place}/{kind}": value.detach().cpu().numpy().copy()
            for place, state in self._optimizer[1].state_dict()["state"].items()
            for kind, value in state.items()
            if value is not None  # momentum that is off
        }


def _remember(optimizer: torch.optim.Optimizer, arrays: Arrays) -> None:
    content = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in arrays.items():
        place, _, kind = name.partition("/")
        state.setdefault(int(place), {})[kind] = torch.from_numpy(np.array(value))
    optimizer.load_state_dict({**content, "state": state})


class _OneSite(SimulatedSites):
    """The one site of a lone arm; it is tested with the hospitals' own trainers afterwards."""

    def __init__(self, plan: Plan, site: PreparedSite, runtime: Runtime, job: Job) -> None:
        untested = {**site.split, "test": np.empty(0, np.int64)}
        super().__init__([replace(site, split=untested)], runtime)
        ours = self.sites[0]
        server = plan.strategy.spec.server_optimizer
        self._trainer = (
            Trainer(plan, ours, runtime) if server else _OneTrainer(plan, ours, runtime, job)
        )

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        return self._trainer


def shares(sites: list[PreparedSite], workers: int) -> dict[str | None, int]:
    """Which worker trains which lone arm: the largest first, to the one with the least to do."""
    sizes: dict[str | None, int] = {site.name: len(site.split["train"]) for site in sites}
    sizes[None] = sum(sizes.values())
    load, places = [0] * max(1, workers), {}
    for name in sorted(sizes, key=lambda key: (-sizes[key], key or "")):
        place = load.index(min(load))
        places[name], load[place] = place, load[place] + sizes[name]
    return places
