"""A whole study on one machine: data, arms, results."""

from __future__ import annotations

import hashlib
import importlib.metadata
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from numpy.typing import NDArray

from fedward.errors import DataError, FedwardError, Interrupted, OutputError, PlanError, StudyError
from fedward.models import describe, to_arrays
from fedward.plan.load import plan_from, plan_hash
from fedward.plan.schema import Plan
from fedward_client.cohort.training import preparers
from fedward_client.data.sample import PreparedSite
from fedward_client.training.device import choose_device
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import site_facts
from fedward_client.worker_pool import Limits
from fedward_server.app import server_app
from fedward_server.events import Listener, ignore
from fedward_server.results import Arm, StudyResults, left_out_name
from fedward_server.round_loop import Job
from fedward_simulation.baselines import (
    arm_name,
    lone_arm,
    shares,
    test_everywhere,
    without,
)
from fedward_simulation.checkpoint import ArmCheckpoints, ArmFolder, RunCheckpoints
from fedward_simulation.classes import missing_classes, told
from fedward_simulation.divided import divided_sites
from fedward_simulation.feasible import check_privacy, start_model
from fedward_simulation.left_out import Missed, counted
from fedward_simulation.local import State, run_local
from fedward_simulation.options import Options as Options
from fedward_simulation.paired import SiteAnswers, answers_on_test, own_answers_on_test, paired
from fedward_simulation.pool import Pool, cores
from fedward_simulation.prepare import frozen_sites
from fedward_simulation.site_service import has_noise, limits_of, policy_of
from fedward_simulation.sites import SimulatedSites, digest_of_sites

Arrays = dict[str, NDArray[Any]]
Note = Callable[[str], None]


@dataclass
class Study:
    """One run of one plan.

    Attributes
    ----------
    results : StudyResults
        Grows while the study runs, so that an interrupted one keeps what is finished.
    model : dict or None
        The delivered model of the main arm.
    left_out : list of Missed
        Files and rows that were not taken, by name; stays on this machine.
    sites : list of PreparedSite
        The hospitals, once they are prepared.
    wrote : callable
        Called when the state of the run was written, with ``results`` and ``model`` up to date.
    resumed : bool
        Whether this run went on with an unfinished one.
    """

    plan: Plan
    options: Options
    listen: Listener = ignore
    note: Note = print
    stop: threading.Event = field(default_factory=threading.Event)
    results: StudyResults = field(init=False)
    model: Arrays | None = None
    left_out: list[Missed] = field(default_factory=list)
    sites: list[PreparedSite] = field(default_factory=list)
    wrote: Callable[[], None] = lambda: None
    resumed: bool = False

    def __post_init__(self) -> None:
        plan, options = self.plan, self.options
        self.policy = policy_of(options)
        self.results = StudyResults(
            study=plan.study.name,
            title=plan.study.title,
            plan=plan.model_dump(mode="json"),
            plan_sha256=plan_hash(plan),
            seed=options.seed,
            engine=options.engine,
            device=str(choose_device(options.device)),
            partition=options.division,
            figures="exact" if options.exact else limits_of(self.policy, plan).counts,
            primary=plan.metrics.primary,
            parameters=describe(plan).parameters,
            versions=_versions(),
        )
        self.results.evaluate_only = list(options.evaluate_only)
        self.checkpoints = RunCheckpoints(options.out, self._about(), options.checkpoint_seconds)
        self._arms: dict[str, ArmFolder] = {}

    def unfinished(self) -> bool:
        """Whether the output folder holds this run, broken off; with ``fresh`` it is removed.

        Raises
        ------
        OutputError
            It holds the unfinished run of another plan or with other options.
        """
        if self.options.fresh:
            self.checkpoints.clear()
        return self.checkpoints.found()

    def run(self) -> StudyResults:
        """Prepare, train all arms, measure; an unfinished run in the output folder goes on.

        Its state stays there until ``checkpoints.clear()``, so that results can be written first.

        Raises
        ------
        Interrupted
            KeyboardInterrupt; ``results`` and ``model`` hold what was finished.
        OutputError
            The output folder holds another unfinished run.
        """
        self._began = time.perf_counter()
        # What is wrong with the plan shows before an image is read.
        arrays, plans = self.initial(), self._plans()
        self.unfinished()
        everybody = self.prepare()
        unseen = self._unseen(everybody)
        names = {site.name for site in unseen}
        sites = self.sites = [site for site in everybody if site.name not in names]
        if self.options.leave_one_out and len(sites) < 2:
            raise PlanError(
                "a study without one of its hospitals needs two",
                value=len(sites),
                fix="Bring more sites, or leave out --leave-one-out",
                where="--leave-one-out",
            )
        self._describe(everybody)
        self.resumed = self.checkpoints.begin(digest_of_sites(everybody))
        self._arms = self._planned(plans, sites)
        if self.resumed:
            self.note(f"going on with an unfinished run; {self._stock()}")
        runtime, workers = self.machine(len(sites))
        pool = Pool(State(SimulatedSites(sites, runtime, self.policy)), workers)
        try:
            jobs = [self._job(plan, arrays) for plan in plans]
            self._federated(pool, sites, unseen, runtime, jobs)
            self._note_withheld()
            answers = self._baselines(pool, sites, arrays) if self.options.baselines else {}
            if self.options.leave_one_out:
                self._leave_one_out(pool, sites, arrays)
            self._pair(pool, jobs, answers)
            self.results.complete = True
        except KeyboardInterrupt as error:
            self.stop.set()
            raise Interrupted(
                "the study was interrupted",
                fix=f"The same command goes on from here; {self._stock()}",
            ) from error
        finally:
            pool.close()
            self._stock()
        return self.results

    def _about(self) -> dict[str, Any]:
        """What a run must share with an unfinished one to go on with it, beside the images."""
        results, options = self.results, self.options
        return {
            "plan": results.plan_sha256,
            "seed": options.seed,
            "partition": options.division,
            "sites": options.sites,
            "format": options.format,
            "engine": options.engine,
            "device": results.device,
            "baselines": options.baselines,
            "leave_one_out": options.leave_one_out,
            "evaluate_only": list(options.evaluate_only),
            "epsilons": list(options.epsilons),
            "policy": hashlib.sha256(self.policy.model_dump_json().encode()).hexdigest(),
            "patient_column": options.patient_column,
            "patient_folder": options.patient_folder,
            "images_are_patients": options.images_are_patients,
            "versions": results.versions,
        }

    def _planned(
        self, plans: Sequence[Plan], sites: Sequence[PreparedSite]
    ) -> dict[str, ArmFolder]:
        """All arms by name, in the order of the results, and where the state of each is kept."""
        federated = [(_arm(plan).name, plan) for plan in plans]
        open_plan = with_privacy(self.plan, None)
        alone = [(arm_name(site.name), open_plan) for site in sites] + [(arm_name(None), open_plan)]
        # Not where it is not asked for: a strategy may need every site that the plan has.
        left = sites if self.options.leave_one_out else ()
        left_out = [
            (left_out_name(site.name), without(self.plan, site.name, len(sites))[0])
            for site in left
        ]
        return {
            name: self.checkpoints.arm(f"arm-{place}", plan_hash(plan))
            for place, (name, plan) in enumerate(
                federated + alone * self.options.baselines + left_out
            )
        }

    def _stock(self) -> str:
        """Bring times and the list of what is missing up to date; the latter in words."""
        results = self.results
        here = time.perf_counter() - self._began
        results.seconds = self.checkpoints.spent + here
        done = {arm.name for arm in results.arms if arm.finished}
        results.missing = [
            f"{name}, {arm.rounds} of {self.plan.rounds} rounds done"
            for name, arm in self._arms.items()
            if name not in done
        ]
        return f"missing: {'; '.join(results.missing) or 'nothing'}"

    def _written(self) -> None:
        """Bring up to date what stays behind where this process is killed."""
        self._stock()
        self.checkpoints.note_time(time.perf_counter() - self._began)
        self.wrote()

    def prepare(self) -> list[PreparedSite]:
        """The hospitals' images, ready for the plan."""
        with preparers(Limits(workers=cores())) as crew:
            if self.options.hospitals:
                return frozen_sites(self.plan, self.options, crew, self.note)
            found = divided_sites(self.plan, self.options, crew, self.note)
        self.left_out = found.missed
        self.results.left_out = counted(one for one in found.missed if not one.site)
        return found.sites

    def _describe(self, sites: Sequence[PreparedSite]) -> None:
        self.results.sites = [site_facts(self.plan, site) for site in sites]
        self.results.synthetic = any(site.synthetic for site in sites)
        self.results.missing_classes = missing_classes(self.plan, sites)
        for line in told(self.results.missing_classes):
            self.note(line)

    def initial(self) -> Arrays:
        """The model that every arm starts from."""
        plan, options = self.plan, self.options
        model, report = start_model(plan, options.seed, options.plan_folder)
        if plan.model.initial_weights is not None:
            self.results.take_weights(report)
        return to_arrays(model)

    def machine(self, sites: int) -> tuple[Runtime, int]:
        """How trainers may use this machine, and how many processes there are for so many."""
        device = choose_device(self.options.device)
        on_gpu = device.type == "cuda"
        workers = 0 if on_gpu else min(cores(), sites)
        threads = max(1, cores() // max(1, workers))
        runtime = Runtime(
            device=str(device),
            threads=threads,
            randomness="seeded",
            cache=self.options.out / "cache",
            cache_bytes=self.options.cache_bytes,
            physical_batch=256 if on_gpu else 64,
            seeded_counts=True,
        )
        return runtime, workers

    def _unseen(self, sites: Sequence[PreparedSite]) -> list[PreparedSite]:
        """The hospitals that only evaluate."""
        known = {site.name: site for site in sites}
        for name in self.options.evaluate_only:
            if name not in known:
                raise DataError(
                    "a hospital that only evaluates must be one of the data",
                    value=name,
                    fix=f"Name one of {', '.join(known)}",
                    where="--evaluate-only",
                )
        return [known[name] for name in dict.fromkeys(self.options.evaluate_only)]

    def _federated(
        self,
        pool: Pool,
        sites: Sequence[PreparedSite],
        unseen: Sequence[PreparedSite],
        runtime: Runtime,
        jobs: Sequence[Job],
    ) -> None:
        elsewhere = State(SimulatedSites(unseen, runtime, self.policy))
        self.results.start_up_seconds = time.perf_counter() - self._began
        for job in jobs:
            kept = self._arms[job.arm.name].open(job)
            if self.options.engine == "ray" and job.plan.keeps_state and kept.standing:
                raise OutputError(
                    "a run whose strategy keeps state at the sites goes on with the local engine",
                    value=job.plan.strategy.name,
                    fix="Start afresh with --fresh, or use --engine local",
                    where="--engine",
                )
            self.results.arms.append(job.arm)
            kept.wrote = partial(self._stands, kept, tell=True)
            try:
                if not job.complete:
                    self._run(job, pool, sites, runtime)
                if unseen and job.arm.unseen is None:
                    _, (job.arm.unseen, _) = test_everywhere(elsewhere, job.plan, job.average)
                    job.save(job)
            finally:
                kept.flush()
                self._stands(kept)

    def _note_withheld(self) -> None:
        """Say which figures a hospital would not send, and how to see them all the same."""
        if self.options.exact:
            return
        tests = [arm.test for arm in self.results.arms if arm.test is not None]
        missing = {name for one in tests for name, sites in one.contributors.items() if not sites}
        refused = any(each.kind == "policy" for one in tests for each in one.not_measured)
        if refused or missing:
            what = ", ".join(sorted(missing)) or "those of some sites"
            self.note(
                f"figures that no hospital with this policy sends are missing ({what}): too few "
                "test images of a class, or withheld; --exact shows them"
            )

    def _stands(self, kept: ArmCheckpoints, *, tell: bool = False) -> None:
        """Take over what stands of the arm that runs."""
        if kept.standing is None:
            return
        self.results.arms[-1] = kept.standing.arm
        if len(self.results.arms) == 1:
            self.model = kept.standing.average
        if tell:
            self._written()

    def _run(self, job: Job, pool: Pool, sites: Sequence[PreparedSite], runtime: Runtime) -> None:
        if self.options.engine == "ray":
            from fedward_simulation.ray_engine import run_ray

            cache = self.options.out / "cache"
            run_ray(server_app(job), sites, runtime, cache, self.stop, self.policy)
        else:
            run_local(server_app(job), pool, len(sites), job.site_states)
        if job.error is not None:
            raise job.error
        if not job.complete:
            raise StudyError(
                "the engine must run the study to its end",
                value=self.options.engine,
                fix="See the engine's log above, or use --engine local",
            )

    def _job(self, plan: Plan, arrays: Arrays) -> Job:
        return Job(plan, dict(arrays), _arm(plan), self.options.seed, self.listen, self.stop)

    def _plans(self) -> list[Plan]:
        """The plan itself first; then the same with other ε, and without privacy."""
        plans = [self.plan]
        if self.plan.privacy.on:
            others = [e for e in self.options.epsilons if e != self.plan.privacy.epsilon]
            plans += [with_privacy(self.plan, epsilon) for epsilon in others]
            if self.options.baselines or others:
                plans.append(with_privacy(self.plan, None))
        elif self.options.epsilons:
            raise PlanError(
                "other values of epsilon need a plan with privacy", fix="Set [privacy] in the plan"
            )
        for plan in plans:
            check_privacy(plan)
        return plans

    def _pair(self, pool: Pool, jobs: Sequence[Job], answers: dict[str, SiteAnswers]) -> None:
        """Compare the arms patient by patient."""
        if len(self.results.arms) < 2 or has_noise(limits_of(self.policy, self.plan)):
            return  # beside figures with noise, exact differences would tell what it hides
        plan, metric = with_privacy(self.plan, None), self.plan.metrics.primary
        measure = partial(answers_on_test, surface=metric == "hd95")
        waiting = {
            job.arm.name: pool.submit(place, measure, plan, job.average)
            for place, job in enumerate(jobs)
        }
        lead = jobs[0]
        if (own := lead.arm.personal) is not None:
            waiting[own.name] = pool.submit(
                0,
                partial(own_answers_on_test, surface=metric == "hd95"),
                lead.plan,
                lead.average,
                dict(lead.site_states),
            )
        answers = answers | {name: future.result() for name, future in waiting.items()}
        self.results.paired = paired(metric, self.results.arms, answers)

    def _baselines(
        self, pool: Pool, sites: Sequence[PreparedSite], arrays: Arrays
    ) -> dict[str, SiteAnswers]:
        """Train the arms without federation; their answers on the test patients."""
        plan, places = with_privacy(self.plan, None), shares(list(sites), pool.workers)
        waiting: set[Future[tuple[Arm, SiteAnswers]]] = set()
        answers: dict[str, SiteAnswers] = {}
        errors: list[FedwardError] = []
        for name, place in sorted(places.items(), key=lambda item: item[0] or ""):
            self.note(f"training {'pooled data' if name is None else name + ' alone'}")
            folder = self._arms[arm_name(name)]
            waiting.add(pool.submit(place, lone_arm, plan, arrays, self.options.seed, name, folder))
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when="FIRST_COMPLETED")
            for future in done:
                try:
                    arm, own = future.result()
                except FedwardError as error:  # the other arms are not lost for it
                    errors.append(error)
                else:
                    self.results.arms.append(arm)
                    answers[arm.name] = own
            if done:
                order = list(self._arms)
                self.results.arms.sort(key=lambda arm: order.index(arm.name))
                self._written()
        if errors:
            raise errors[0]
        return answers

    def _leave_one_out(self, pool: Pool, sites: Sequence[PreparedSite], arrays: Arrays) -> None:
        """Run the study without each hospital in turn, and test it on all test patients.

        Always by the local engine, whose workers have the sites already.
        """
        for place, site in enumerate(sites):
            plan, arm = without(self.plan, site.name, len(sites))
            job = Job(plan, dict(arrays), arm, self.options.seed, self.listen, self.stop)
            kept = self._arms[arm.name].open(job)
            self.results.arms.append(job.arm)
            kept.wrote = partial(self._stands, kept, tell=True)
            try:
                if not job.complete:
                    others = [one for one in range(len(sites)) if one != place]
                    run_local(server_app(job), pool, others, job.site_states)
                    if job.error is not None:
                        raise job.error
                found = pool.submit(place, test_everywhere, plan, job.average)
                _, (job.arm.test, job.arm.unmeasured) = found.result()
                job.save(job)
            finally:
                kept.flush()
                self._stands(kept)
            if self.stop.is_set():
                return


def _arm(plan: Plan) -> Arm:
    epsilon, delta = plan.privacy.epsilon, plan.privacy.delta
    name = "federated" if epsilon is None else f"federated, ε = {epsilon:g}"
    return Arm(name=name, kind="federated", epsilon=epsilon, delta=delta)


def with_privacy(plan: Plan, epsilon: float | None) -> Plan:
    """The same plan with another ε, or without privacy."""
    content = plan.model_dump(mode="python")
    if epsilon is None:
        content["privacy"] = {"mechanism": "none"}
    else:
        content["privacy"]["epsilon"] = epsilon
    return plan_from(content)


def _versions() -> dict[str, str]:
    names = ("fedward", "flwr", "torch", "monai", "opacus", "pydicom")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
