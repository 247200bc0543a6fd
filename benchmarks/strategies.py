"""What each strategy gives each hospital on its own patients; writes ``benchmarks/strategies.md``.

Run ``python benchmarks/strategies.py --data FOLDER`` where FOLDER holds ``covid-ct``, ``lungs``,
``ham10000-sites``, ``lgg-mri-sites`` and ``hippocampus``. Each set has a plan in ``studies`` whose
name ends in ``-wan``: at most 60 exchanges and 200 MB for each hospital. Each arm is that plan with
another strategy or another ``[personal]``.

``--choose`` runs the grid of settings of each arm with seed 0 and records figures on validation
patients alone; a run takes the best of them. Settings and figures of finished runs stand in
``benchmarks/strategies.json`` by set, arm and seed, each with the hash of its plan, so that another
machine goes on where this one ended. ``--only SET`` and ``--arm ARM`` run a part; the page is
written of all that is known.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and its simulation.py would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

import numpy as np

from fedward.console import interruptible
from fedward.errors import FedwardError
from fedward.flower import identity
from fedward.models import to_arrays
from fedward.plan import Plan, load_plan, plan_from, plan_hash
from fedward.plan.load import canonical
from fedward.protocol import RoundOrder
from fedward_client.data.sample import PreparedSite
from fedward_client.training.evaluate import Answers
from fedward_client.training.trainer import Trainer
from fedward_server.app import server_app
from fedward_server.job import Job
from fedward_server.metrics_summary import figures
from fedward_server.results import Arm
from fedward_simulation.baselines import lone_arm, test_everywhere, without
from fedward_simulation.feasible import start_model
from fedward_simulation.local import State, run_local
from fedward_simulation.paired import SiteAnswers, answers_on_test, difference_at_home
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites
from fedward_simulation.study import Options, Study

REPOSITORY = HERE.parent
RECORD = HERE / "strategies.json"
PAGE = HERE / "strategies.md"
Changes = dict[str, dict[str, Any]]
Run = dict[str, Any]
ALONE, POOLED = "alone", "pooled"
MALIGNANT = ("mel", "bcc", "akiec")


def photographs(source: Path, folder: Path) -> Path:
    """Dermoscopic photographs, a folder for each source, benign or malignant."""
    rows: dict[str, list[list[str]]] = {}
    with (source / "labels.csv").open(encoding="utf-8") as table:
        for row in csv.DictReader(table):
            inside = row["image"].removeprefix(f"{row['site']}/")
            label = "malignant" if row["dx"] in MALIGNANT else "benign"
            rows.setdefault(row["site"], []).append([inside, label, row["lesion"]])
    for site, own in rows.items():
        shutil.copytree(source / site / "images", folder / site / "images")
        _write(folder / site / "labels.csv", ["image", "label", "patient"], own)
    return folder


def slices(source: Path, folder: Path) -> Path:
    """Brain MRI slices with tumour masks, a folder for each institution, with their patients.

    An institution with one patient, who cannot be divided into training and test, is left out.
    """
    rows: dict[str, list[list[str]]] = {}
    with (source / "slices.csv").open(encoding="utf-8") as table:
        for row in csv.DictReader(table):
            rows.setdefault(row["site"], []).append([Path(row["image"]).stem, row["patient"]])
    for site, own in rows.items():
        if len({patient for _, patient in own}) == 1:
            continue
        for part in ("images", "masks"):
            shutil.copytree(source / site / part, folder / site / part)
        _write(folder / site / "patients.csv", ["image", "patient"], own)
    return folder


def _write(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as table:
        csv.writer(table).writerows([head, *rows])


@dataclass(frozen=True)
class Case:
    """One set of images.

    Attributes
    ----------
    plan : str
        Of ``studies``.
    lay : callable or None
        Makes folders that the plan can read of the set; None: it is in them already.
    halved : bool
        Whether ``--choose`` holds half of the patients that are not tested for validation, so that
        figures on them tell settings apart; else those that the plan holds.
    base : sequence of Changes
        Rates and local steps that `choose` tries for FedAvg, training alone and pooled training.
    """

    name: str
    plan: str
    data: str
    title: str
    partition: str = "folders"
    sites: int | None = None
    lay: Callable[[Path, Path], Path] | None = None
    halved: bool = False
    base: tuple[Changes, ...] = ({},)
    sgd: bool = False
    left_out: tuple[str, ...] = ()

    def arms(self) -> dict[str, tuple[Changes, ...]]:
        """By name of an arm, the settings that are tried for it, beside those of FedAvg."""
        both: dict[str, tuple[Changes, ...]] = dict.fromkeys((ALONE, POOLED, "FedAvg"), self.base)
        if self.sgd:
            own = [
                {"method": "fine-tuning", "rounds": 10, "learning_rate": rate, "alone": True}
                for rate in (0.1, 0.3)
            ]
            both["fine-tuning"] = tuple({"personal": one} for one in own)
            own = [
                {"method": "ditto", "weight": weight, "alone": True}
                for weight in (0.003, 0.03, 0.3)
            ]
            both["Ditto"] = tuple({"personal": one} for one in own)
        else:
            own = [{"method": "fine-tuning", "rounds": n} for n in (5, 10)]
            both["fine-tuning"] = tuple({"personal": one} for one in own)
            both["Ditto"] = ({"personal": {"method": "ditto", "weight": 0.1}},)
            both["FedBN"] = ({"personal": {"method": "fedbn"}},)
            both["FedPer"] = ({"personal": {"method": "fedper"}},)
        both["FedProx"] = (_strategy("fedprox", mu=0.1),)
        # The round that measures the mean of the features has no place for what a site keeps.
        plain: Changes = {"model": {"feature_centering": False}} if self.sgd else {}
        both["FedDyn"] = tuple(_strategy("feddyn", alpha=a) | plain for a in (0.1, 1.0))
        if self.sgd:
            epochs = {"local_epochs": 2, "local_steps": None}
            both["SCAFFOLD"] = (_strategy("scaffold") | plain,)
            both["FedNova"] = ({**_strategy("fednova"), "training": epochs},)
        both["norm clipping"] = (_strategy("norm-clipping"),)
        both["RFA"] = (_strategy("rfa"),)
        return both


def _strategy(name: str, **settings: float) -> Changes:
    return {"strategy": {"name": name, "settings": settings}}


def _training(rates: Sequence[float], steps: Sequence[int]) -> tuple[Changes, ...]:
    return tuple(
        {"training": {"local_steps": n}, "stages": {"learning_rate": rate}}
        for n in steps
        for rate in rates
    )


CASES = (
    Case(
        "covid-ct",
        "covid-ct-wan",
        "covid-ct",
        "COVID-19 on CT slices, 3 sources, AUC",
        halved=True,
        sgd=True,
        base=_training((0.1, 0.3, 1.0), (40,)),
    ),
    Case(
        "ham10000-sites",
        "ham10000-wan",
        "ham10000-sites",
        "malignant skin lesions, 4 sources, AUC",
        lay=photographs,
        halved=True,
        sgd=True,
        base=_training((0.1, 0.3, 1.0), (40,)),
    ),
    Case("lungs", "lungs-wan", "lungs", "lung fields, 7 sites, Dice"),
    Case(
        "lgg-mri-sites",
        "lgg-mri-wan",
        "lgg-mri-sites",
        "gliomas on MRI, 4 institutions, Dice",
        lay=slices,
    ),
    Case(
        "hippocampus",
        "hippocampus-wan",
        "hippocampus",
        "hippocampus on MRI, 4 sites made of one set, Dice",
        partition="iid",
        sites=4,
    ),
)
PERSONAL = ("fine-tuning", "Ditto", "FedBN", "FedPer")
WHOSE = (ALONE, POOLED, "FedAvg", *PERSONAL)  # of which each hospital's figures are shown
SEEDS: Final = 3
MISSING: Final = "not measured"
MARKER: Final = "<!-- notes -->"


def plan_of(case: Case, *changes: Changes) -> Plan:
    """The set's plan with one shared model, and then with these changes.

    HD95 is not measured: it takes most of the time of a test.
    """
    path = REPOSITORY / "studies" / f"{case.plan}.toml"
    content = load_plan(path).model_dump(mode="python")
    content["personal"] = None
    content["strategy"] |= {"name": "fedavg", "settings": {}}
    report = content["metrics"]["report"]
    content["metrics"]["report"] = tuple(one for one in report if one != "hd95")
    for section, values in ((s, v) for each in changes for s, v in each.items()):
        if section == "stages" and not content["stages"]:
            section = "training"
        if section == "stages":
            content["stages"] = [{**one, **values} for one in content["stages"]]
        elif section == "personal":
            content["personal"] = values
        else:
            content[section] = content[section] | values
    return plan_from(content)


class Record:
    """What is known: settings by validation figure, and finished runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text("utf-8") if path.exists() else '{"choices": {}, "runs": {}}'
        self.content: dict[str, dict[str, Any]] = json.loads(text)

    @property
    def runs(self) -> dict[str, Run]:
        """By set, arm and seed."""
        return self.content["runs"]

    def save(self) -> None:
        """Write it, whole or not at all."""
        part = self.path.with_suffix(".part")
        text = json.dumps(self.content, indent=1, sort_keys=True)
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(self.path)

    def chosen(self, case: Case, arm: str) -> Changes:
        """The settings of an arm that did best on validation patients; else the first ones."""
        grid = case.arms()[arm]
        tried = self.content["choices"].get(f"{case.name}/{arm}", {})
        return max(grid, key=lambda one: tried.get(_name(one), {}).get("validation", -1.0))

    def plan(self, case: Case, arm: str) -> Plan:
        """The plan of an arm, with the settings that were chosen for it."""
        own = self.chosen(case, arm)
        if arm in (ALONE, POOLED, "FedAvg"):
            return plan_of(case, own)
        return plan_of(case, self.chosen(case, "FedAvg"), own)


def _name(changes: Changes) -> str:
    values = [(k, v) for section in changes.values() for k, v in section.items()]
    flat = [(k, v) for k, v in values if not isinstance(v, dict)]
    flat += [pair for _, v in values if isinstance(v, dict) for pair in v.items()]
    return ", ".join(f"{key} = {value}" for key, value in flat if value is not None) or "as shipped"


@dataclass
class Bench:
    """One division of one set, its sites warm in this process."""

    case: Case
    seed: int
    out: Path
    sites: list[PreparedSite]
    study: Study
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.out / f"{self.case.name}-seed{self.seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        runtime = replace(self.study.machine(1)[0], threads=1)
        self.state = State(SimulatedSites(self.sites, runtime, self.study.policy))
        self.pool = Pool(self.state, 0)
        self.arrays = self.study.initial()
        self._lone: dict[str, SiteAnswers] = {}

    @classmethod
    def prepare(cls, case: Case, seed: int, data: Path, out: Path) -> Bench:
        """Read the set and divide its patients."""
        options = Options(
            data=data,
            out=out,  # one cache: the frozen layers see each image once
            partition=case.partition,
            sites=case.sites,
            seed=seed,
            plan_folder=REPOSITORY / "studies",
            images_are_patients=True,
            exact=True,
        )
        study = Study(plan_of(case), options, note=lambda text: None)
        return cls(case, seed, out, study.prepare(), study)

    def untested(self) -> Bench:
        """The same without the test patients."""
        sites = [_halved(site) for site in self.sites] if self.case.halved else self.sites
        return Bench(self.case, self.seed, self.out, sites, self.study)

    @property
    def metric(self) -> Any:
        """The primary one."""
        return self.study.plan.metrics.primary

    def train(self, plan: Plan, arm: Arm, nodes: Sequence[int] | None = None) -> Job:
        """Run a study over all sites, or over some."""
        start, _ = start_model(plan, self.seed, REPOSITORY / "studies")  # not all are centred
        job = Job(plan, to_arrays(start), arm, self.seed)
        places = list(range(len(self.sites))) if nodes is None else list(nodes)
        run_local(server_app(job), self.pool, places, job.site_states)
        if job.error is not None:
            raise job.error
        return job

    def validation(self, plan: Plan, arm: str) -> float:
        """Mean over the sites of what each site's model gives its validation patients."""
        if arm in (ALONE, POOLED):
            own = [None] if arm == POOLED else [site.name for site in self.sites]
            found = [self._alone(plan, site).rounds[-1].validation.get(self.metric) for site in own]
        elif plan.personal is None:
            sites = self.train(plan, _arm(arm)).arm.rounds[-1].sites.values()
            found = [one.validation.get(self.metric) for one in sites]
        else:
            answers = self.own(plan, self.train(plan, _arm(arm)), "validation")
            found = [one.exact().figures([self.metric])[self.metric] for one in answers.values()]
        return statistics.mean(one for one in found if one is not None)

    def _alone(self, plan: Plan, site: str | None) -> Arm:
        return lone_arm(self.state, plan, self.arrays, self.seed, site)[0]

    def own(self, plan: Plan, job: Job, part: Any = "test") -> SiteAnswers:
        """What the sites' own models answer, each on its site's patients."""
        order = RoundOrder(
            plan=canonical(plan), plan_hash=plan_hash(plan), round=plan.own_round or 0, part=part
        )
        found = {}
        for place, site in enumerate(self.sites):
            if len(site.split[part]):
                trainer = Trainer(plan, site, self.state.sites.runtime)
                trainer.state.from_arrays(job.site_states.get(place, {}))
                found[site.name] = trainer.answers(job.average, order, surface=False)
        return found

    def measure(self, record: Record, arm: str) -> Run:
        """One arm on the test patients, each site against what it has alone."""
        plan, started = record.plan(self.case, arm), time.perf_counter()
        known = self.alone(record.plan(self.case, ALONE))
        if arm == ALONE:
            return self._of_alone(plan, known)
        if arm == POOLED:
            got, answers = lone_arm(self.state, plan, self.arrays, self.seed, None)
            return self._result(plan, answers, known, got.seconds)
        job = self.train(plan, _arm(arm))
        seconds = time.perf_counter() - started
        own = plan.personal is not None
        answers = self.own(plan, job) if own else answers_on_test(self.state, plan, job.average)
        moved = sum(one.bytes_down + one.bytes_up for one in job.arm.rounds)
        return self._result(plan, answers, known, seconds) | {
            "megabytes": round(moved / len(self.sites) / 1e6, 2),
            "exchanges": exchanges(plan),
        }

    def left_out(self, plan: Plan) -> dict[str, float]:
        """The figure at each hospital of the study without it."""
        found = {}
        for place, site in enumerate(self.sites):
            if len(self.sites) < 2 or not len(site.split["test"]):
                continue
            less, arm = without(plan, site.name, len(self.sites))
            others = [one for one in range(len(self.sites)) if one != place]
            job = self.train(less, arm, others)
            answers, _ = test_everywhere(self.state, less, job.average)
            value = answers[site.name].exact().figures([self.metric])[self.metric]
            if value is not None:
                found[site.name] = round(value, 4)
        return found

    def alone(self, plan: Plan) -> dict[str, SiteAnswers]:
        """By site, what its model alone answers at each site; trained once for a plan."""
        for site in self.sites:
            if site.name in self._lone:
                continue
            place = self.folder / f"alone-{site.name}-{plan_hash(plan)[:16]}.npz"
            if place.exists():
                self._lone[site.name] = _load(plan, place)
                continue
            started = time.perf_counter()
            _, answers = lone_arm(self.state, plan, self.arrays, self.seed, site.name)
            _save(answers, time.perf_counter() - started, place)
            self._lone[site.name] = answers
        return self._lone

    def _of_alone(self, plan: Plan, known: Mapping[str, SiteAnswers]) -> Run:
        homes = {name: known[name][name] for name in known if name in known[name]}
        places = self.folder.glob(f"alone-*-{plan_hash(plan)[:16]}.npz")
        seconds = sum(float(np.load(place)["seconds"]) for place in places)
        made = self._result(plan, homes, known, seconds)
        everywhere = [self._together(plan, answers) for answers in known.values()]
        elsewhere = {
            name: statistics.mean(
                value
                for other, answers in known.items()
                if other != name and (value := self._figure(answers[name])) is not None
            )
            for name in homes
        }
        made["together"] = round(statistics.mean(everywhere), 4)
        made["left_out"] = {name: round(value, 4) for name, value in elsewhere.items()}
        return made

    def _figure(self, answers: Answers) -> float | None:
        return answers.exact().figures([self.metric])[self.metric]

    def _together(self, plan: Plan, answers: SiteAnswers) -> float:
        counts = {name: one.exact() for name, one in answers.items()}
        return float(figures(plan, counts)[1][self.metric] or 0.0)

    def _result(
        self, plan: Plan, answers: SiteAnswers, known: Mapping[str, SiteAnswers], seconds: float
    ) -> Run:
        sites = {}
        for name, one in answers.items():
            value = self._figure(one)
            if value is None:
                continue
            entry: dict[str, Any] = {"figure": round(value, 4)}
            pair = difference_at_home(self.metric, answers, {name: known[name]})
            if pair is not None:
                entry["difference"] = round(pair[0], 4)
                entry["interval"] = [round(end, 4) for end in pair[1]]
            sites[name] = entry
        return {
            "plan": plan_hash(plan),
            "sites": sites,
            "together": round(self._together(plan, answers), 4),
            "seconds": round(seconds, 1),
        }


def _arm(name: str) -> Arm:
    return Arm(name=name, kind="federated")


def _halved(site: PreparedSite) -> PreparedSite:
    """The site with no test patient at all, and half of the others for validation."""
    there = np.sort(np.concatenate([site.split["train"], site.split["validation"]]))
    people = np.random.default_rng(0).permutation(np.unique(site.patients[there]))
    held = np.isin(site.patients[there], people[::2])
    split = {"train": there[~held], "validation": there[held], "test": there[:0]}
    return replace(site, split={**site.split, **split})


def _save(answers: SiteAnswers, seconds: float, place: Path) -> None:
    arrays: dict[str, Any] = {"seconds": np.array(seconds)}
    for name, one in answers.items():
        masks = one.plan.task.spec.target == "masks"  # not needed any more, and large
        targets = np.zeros(0, np.uint8) if masks else one.targets
        parts = {"values": one.values, "targets": targets, "patients": one.patients}
        arrays |= {f"{name}/{part}": value for part, value in parts.items()}
    np.savez(place, **arrays)


def _load(plan: Plan, place: Path) -> SiteAnswers:
    with np.load(place) as found:
        names = {name.partition("/")[0] for name in found.files} - {"seconds"}
        parts = ("values", "targets", "patients")
        return {name: Answers(plan, *(found[f"{name}/{p}"] for p in parts)) for name in names}


def exchanges(plan: Plan) -> int:
    """Orders that a hospital answers in a study: to say who it is, to train and to evaluate."""
    rounds = range(1, plan.rounds + 1)
    validated = sum(plan.is_evaluated(round_, "validation") for round_ in rounds)
    own = plan.own_round is not None and plan.passes(plan.own_round) > 0
    return 1 + plan.rounds + validated + own + len(plan.tests)


def choose(case: Case, bench: Bench, record: Record, arms: Sequence[str]) -> None:
    """Try the settings of each arm and record what validation patients say of them."""
    for arm in arms:
        grid = case.arms()[arm]
        if len(grid) < 2:
            continue
        tried = record.content["choices"].setdefault(f"{case.name}/{arm}", {})
        base = () if arm in (ALONE, POOLED, "FedAvg") else (record.chosen(case, "FedAvg"),)
        for own in grid:
            plan = plan_of(case, *base, own)
            if tried.get(_name(own), {}).get("plan") == plan_hash(plan):
                continue
            started = time.perf_counter()
            try:
                value = round(bench.untested().validation(plan, arm), 4)
            except FedwardError as error:
                print(f"{case.name}, {arm}, {_name(own)}: {error}", flush=True)
                continue
            tried[_name(own)] = {"plan": plan_hash(plan), "validation": value}
            record.save()
            took = time.perf_counter() - started
            print(f"{case.name}, {arm}, {_name(own)}: {value:.4f}, {took:.0f} s", flush=True)


def measure(case: Case, bench: Bench, record: Record, arms: Sequence[str], left: bool) -> None:
    """Measure what is not measured yet under the same plan."""
    for arm in arms:
        key = f"{case.name}/{arm}/{bench.seed}"
        plan = record.plan(case, arm)
        known = record.runs.get(key, {})
        if known.get("plan") != plan_hash(plan):
            started = time.perf_counter()
            known = record.runs[key] = bench.measure(record, arm)
            record.save()
            own = statistics.mean(one["figure"] for one in known["sites"].values())
            took = time.perf_counter() - started
            print(f"{key}: own {own:.4f}, {took:.0f} s", flush=True)
        shared = arm not in (ALONE, POOLED) and plan.personal is None
        if left and shared and "left_out" not in known:
            known["left_out"] = bench.left_out(plan)
            record.save()


ABOUT: Final = """\
Written by `python benchmarks/strategies.py`. Each set has a plan `studies/…-wan.toml`; each line is
that plan with another strategy, or with a model of each hospital's own. *Own*: mean over the
hospitals of the figure on each one's own test patients, mean ± standard deviation over the seeds,
which draw the division of the patients, the model and the batches. *Worst*: the hospital with the
lowest figure. *Together*: all test patients (own models: each patient answered by the model of
their hospital; alone: mean over the hospitals' models). *Against alone*: how many hospitals were
better than with what they train alone, level, or worse, by a paired 95 % interval over each one's
test patients; hospitals of all seeds together. *Left out*: mean figure at a hospital that took no
part (alone: of the other hospitals' models). *MB* and *exchanges*: for each hospital; the arrays of
all rounds both ways, and all orders that it answers.

**{there} of {wanted} runs are measured** (arm, set and seed); the rest says *not measured*.
Settings were chosen on validation patients of seed 0 (`--choose`) where the table of settings has
their figures; elsewhere they were set by hand before any figure was known."""


def page_of(record: Record, notes: str) -> str:
    """The page, of all that is known under the present plans."""
    known = {(case.name, arm): _runs(record, case, arm) for case in CASES for arm in case.arms()}
    there, wanted = sum(map(len, known.values())), SEEDS * len(known)
    lines = [
        "# Strategies, hospital by hospital",
        "",
        ABOUT.format(there=there, wanted=wanted),
        "",
    ]
    for case in CASES:
        lines += _section(record, case, {arm: known[case.name, arm] for arm in case.arms()})
    lines += ["## Settings", "", *_settings(record)]
    return "\n".join(lines) + f"\n\n{MARKER}{notes or chr(10)}"


def _runs(record: Record, case: Case, arm: str) -> list[Run]:
    """What is known of an arm under its present plan, seed by seed."""
    plan = plan_hash(record.plan(case, arm))
    found = [record.runs.get(f"{case.name}/{arm}/{seed}", {}) for seed in range(SEEDS)]
    return [one for one in found if one.get("plan") == plan]


def _section(record: Record, case: Case, known: Mapping[str, list[Run]]) -> Iterator[str]:
    yield from (f"## {case.name}", "", f"{case.title[0].upper()}{case.title[1:]}.", "")
    yield "| arm | seeds | own | worst | together | against alone | left out | s | MB | exchanges |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for arm, runs in known.items():
        yield f"| {arm} | {len(runs)} | {' | '.join(_cells(arm, runs))} |"
    yield ""
    yield from _verdict(known)
    shown = [arm for arm, runs in known.items() if runs and (arm in WHOSE)]
    if known[ALONE] and shown:
        yield from ("", f"| hospital | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|")
        for site in known[ALONE][0]["sites"]:
            cells = [_of_site(site, arm, known[arm]) for arm in shown]
            yield f"| {site} | {' | '.join(cells)} |"
    yield ""


def _of_site(site: str, arm: str, runs: Sequence[Run]) -> str:
    """Its figure, mean over the seeds, and the mean difference to what it has alone."""
    found = [one["sites"][site] for one in runs if site in one["sites"]]
    text = f"{statistics.mean(one['figure'] for one in found):.3f}" if found else MISSING
    pairs = [one["difference"] for one in found if "difference" in one]
    return text if arm == ALONE or not pairs else f"{text} ({statistics.mean(pairs):+.3f})"


def _cells(arm: str, runs: Sequence[Run]) -> Iterator[str]:
    if not runs:
        yield from [MISSING] * 8
        return
    yield spread([_own(run) for run in runs])
    yield spread([min(one["figure"] for one in run["sites"].values()) for run in runs])
    yield spread([run["together"] for run in runs])
    yield "–" if arm == ALONE else " / ".join(map(str, _tally(runs)))
    left = [statistics.mean(run["left_out"].values()) for run in runs if run.get("left_out")]
    own = arm == POOLED or arm in PERSONAL
    yield spread(left) if left else ("–" if own else MISSING)
    yield f"{statistics.mean(run['seconds'] for run in runs):.0f}"
    moved = [run["megabytes"] for run in runs if "megabytes" in run]
    yield f"{statistics.mean(moved):.1f}" if moved else "–"
    yield str(runs[0].get("exchanges", "–"))


def _own(run: Run) -> float:
    return statistics.mean(one["figure"] for one in run["sites"].values())


def _tally(runs: Sequence[Run]) -> tuple[int, int, int]:
    """How many hospitals are better, level and worse than alone, over all seeds."""
    pairs = [one["interval"] for run in runs for one in run["sites"].values() if "interval" in one]
    better, worse = sum(low > 0 for low, _ in pairs), sum(high < 0 for _, high in pairs)
    return better, len(pairs) - better - worse, worse


def _verdict(known: Mapping[str, list[Run]]) -> Iterator[str]:
    if not known[ALONE] or not known[POOLED]:
        yield "Not measured far enough for a verdict."
        return
    alone, pooled = (statistics.mean(map(_own, known[arm])) for arm in (ALONE, POOLED))
    arms = {arm: runs for arm, runs in known.items() if runs and arm not in (ALONE, POOLED)}
    safe = [arm for arm, runs in arms.items() if not _tally(runs)[2]]
    ahead = [arm for arm in safe if statistics.mean(map(_own, arms[arm])) > max(alone, pooled)]
    yield (
        f"No hospital worse than alone (within its interval) with: {', '.join(safe) or 'none'}. Of "
        f"these ahead of both alone ({alone:.3f}) and pooled ({pooled:.3f}) on the mean: "
        f"{', '.join(ahead) or 'none'}."
    )


def _settings(record: Record) -> Iterator[str]:
    yield "| set | arm | chosen | validation | tried |"
    yield "|---|---|---|---|---|"
    for case in CASES:
        for arm in case.arms():
            own, tried = (
                record.chosen(case, arm),
                record.content["choices"].get(f"{case.name}/{arm}", {}),
            )
            others = [f"{name}: {one['validation']:.3f}" for name, one in tried.items()]
            found = tried.get(_name(own), {}).get("validation")
            value = "not chosen" if found is None else f"{found:.3f}"
            yield f"| {case.name} | {arm} | {_name(own)} | {value} | {'; '.join(others) or '–'} |"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def write_page(record: Record) -> None:
    """Write the page; notes after the marker are kept."""
    before = PAGE.read_text("utf-8") if PAGE.exists() else ""
    PAGE.write_text(page_of(record, before.partition(MARKER)[2]), encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "strategies")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--arm", action="append", help="one arm; several times for several")
    parser.add_argument("--choose", action="store_true", help="settings, by validation patients")
    parser.add_argument("--leave-one-out", action="store_true", help="each hospital in turn too")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit("the images are not here; name their folder with --data")
    identity.quiet()
    with interruptible(), TemporaryDirectory() as folder:
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    """Run what is asked for; seeds outside, so that a call that is ended leaves some of each."""
    identity.become_server()
    record = Record(RECORD)
    laid: dict[str, Path] = {}
    for seed in range(1 if options.choose else options.seeds):
        for case in CASES:
            arms = [arm for arm in case.arms() if not options.arm or arm in options.arm]
            if options.only and case.name not in options.only:
                continue
            if case.name not in laid:
                source, own = options.data / case.data, folder / case.name
                laid[case.name] = case.lay(source, own) if case.lay else source
            bench = Bench.prepare(case, seed, laid[case.name], options.out)
            if options.choose:
                choose(case, bench, record, arms)
            else:
                measure(case, bench, record, arms, options.leave_one_out)
            write_page(record)


if __name__ == "__main__":
    main()
