"""What hostile sites do to a study, by strategy; writes ``benchmarks/attacks.md``.

Run ``python benchmarks/attacks.py --data FOLDER`` where FOLDER holds ``pneumonia``. Seven sites
train a small network in few rounds; one or two of them attack in every round. Finished runs stand
in ``benchmarks/attacks.json`` by strategy, attack, attackers and seed, with the hash of their plan,
so that a later call goes on; the page is written of all that is known.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and its simulation.py would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

import numpy as np
from numpy.typing import NDArray

from fedward.console import interruptible
from fedward.errors import FedwardError
from fedward.flower import identity
from fedward.plan import Plan, load_plan, plan_from, plan_hash
from fedward.protocol import RoundOrder, TrainOutcome
from fedward_client.data.sample import PreparedSite
from fedward_client.training.trainer import Trainer
from fedward_server.app import server_app
from fedward_server.job import Job
from fedward_server.results import Arm
from fedward_simulation.local import State, run_local
from fedward_simulation.paired import answers_on_test
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SimulatedSites
from fedward_simulation.study import Options, Study

REPOSITORY = HERE.parent
RECORD, PAGE = HERE / "attacks.json", HERE / "attacks.md"
SITES: Final = 7
SEEDS: Final = 3
MISSING: Final = "not measured"
MARKER: Final = "<!-- notes -->"
NOBODY: Final = "none"
TARGET: Final = 0  # the class that a patch is to bring
SCALE: Final = 9.0  # below the default of strategy.max_norm_ratio, 10
Arrays = dict[str, NDArray[Any]]

ATTACKS: Final = {
    "label flips": "the attacker trains on the opposite labels",
    "sign flips": "it sends its update with the opposite sign",
    "scaled": f"the same, {SCALE:g} times as large, which `strategy.max_norm_ratio` lets pass",
    "noise": "it sends Gaussian noise with three times the norm of its update",
    "backdoor": "half of its sick images carry a bright patch and the label healthy",
}
STRATEGIES: Final[dict[str, dict[str, float]]] = {
    "fedavg": {},
    "norm-clipping": {},
    "rfa": {},
    "fedmedian": {},
    "fedtrimmedavg": {"beta": 0.3},
    "multikrum": {},
    "bulyan": {},
}


def plan_of(strategy: str, attackers: int) -> Plan:
    """The quick study with a strategy that knows how many sites may attack."""
    content = load_plan(REPOSITORY / "studies" / "pneumonia.toml").model_dump(mode="python")
    content["preprocessing"]["augmentation"] = {}
    content["training"] |= {
        "rounds": 12,
        "local_steps": 10,
        "learning_rate": 3e-3,
        "optimizer": "adamw",
    }
    selects = strategy in ("multikrum", "bulyan")  # they need all updates
    settings: dict[str, float] = dict(STRATEGIES[strategy])
    if selects:
        settings["malicious"] = max(1, attackers)
    if strategy == "multikrum":
        settings["keep"] = SITES - max(1, attackers)
    content["strategy"] |= {"name": strategy, "settings": settings, "averaging": 0.0}
    content["participation"] |= {"sites": SITES, "quorum": SITES if selects else SITES - 2}
    content["metrics"] |= {"report": ("auc",), "evaluate_every": 12}
    return plan_from(content)


def patched(images: NDArray[Any]) -> NDArray[Any]:
    """Images with a bright square in a corner."""
    marked = np.array(images)
    marked[..., 1:5, 1:5] = marked.max()
    return marked


def poisoned(site: PreparedSite, attack: str) -> PreparedSite:
    """What an attacker trains on."""
    targets, images = np.array(site.targets), np.array(site.images)
    if attack == "label flips":
        targets = 1 - targets
    elif attack == "backdoor":
        sick = np.flatnonzero(targets != TARGET)[::2]
        images[sick], targets[sick] = patched(images)[sick], TARGET
    return replace(site, images=images, targets=targets)


class _Attacker(Trainer):
    """Changes what it sends."""

    attack = ""

    def train(
        self, arrays: Mapping[str, NDArray[Any]], order: RoundOrder
    ) -> tuple[Arrays, TrainOutcome]:
        update, outcome = super().train(arrays, order)
        factor = {"sign flips": -1.0, "scaled": -SCALE}.get(self.attack)
        steps = {name: value - arrays[name] for name, value in update.items()}
        if factor is not None:
            steps = {name: factor * step for name, step in steps.items()}
        elif self.attack == "noise":
            draw = np.random.default_rng([order.round, *self.site.name.encode()])
            noise = {name: draw.normal(size=step.shape) for name, step in steps.items()}
            ratio = 3 * _norm(steps) / _norm(noise)
            steps = {name: ratio * step for name, step in noise.items()}
        sent = {name: arrays[name] + step for name, step in steps.items()}
        return {name: value.astype(np.float32) for name, value in sent.items()}, outcome


def _norm(arrays: Arrays) -> float:
    return float(np.sqrt(sum(float((value**2).sum()) for value in arrays.values())))


class _Sites(SimulatedSites):
    """Some of them attack."""

    hostile: frozenset[str] = frozenset()
    attack = ""

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        if site.name not in self.hostile:
            return super().trainer_of(site, plan)
        made = _Attacker(plan, poisoned(site, self.attack), self.runtime)
        made.attack = self.attack
        return made


@dataclass
class Bench:
    """Seven sites with one seed."""

    study: Study
    sites: list[PreparedSite]
    seed: int

    @classmethod
    def prepare(cls, seed: int, data: Path, out: Path) -> Bench:
        """Divide the images among the sites."""
        options = Options(
            data=data / "pneumonia",
            out=out,
            partition="dirichlet:0.5",
            sites=SITES,
            seed=seed,
            images_are_patients=True,
            exact=True,
        )
        study = Study(plan_of("fedavg", 0), options, note=lambda text: None)
        return cls(study, study.prepare(), seed)

    def measure(self, strategy: str, attack: str, attackers: int) -> dict[str, Any]:
        """AUC on all test patients, and how often the patch brings its class."""
        plan = plan_of(strategy, attackers)
        runtime = replace(self.study.machine(1)[0], threads=1)
        sites = _Sites(self.sites, runtime, self.study.policy)
        # Those of middle size: neither the heaviest vote nor one without weight.
        order = sorted(self.sites, key=lambda site: len(site.split["train"]))
        sites.hostile = frozenset(site.name for site in order[3 : 3 + attackers])
        sites.attack = attack
        job = Job(plan, self.study.initial(), Arm(name=strategy, kind="federated"), self.seed)
        run_local(server_app(job), Pool(State(sites), 0), SITES, job.site_states)
        if job.error is not None:
            raise job.error
        honest = State(SimulatedSites(self.sites, runtime, self.study.policy))
        if job.arm.test is None:
            raise SystemExit("the study has no figure")
        made: dict[str, Any] = {"plan": plan_hash(plan), "auc": 0.0, "success": 0.0}
        counts = [one.exact() for one in answers_on_test(honest, plan, job.average).values()]
        total = sum(counts[1:], counts[0])
        made["auc"] = round(float(total.figures(["auc"])["auc"] or 0.0), 4)
        marked = [replace(site, images=patched(site.images)) for site in self.sites]
        state = State(SimulatedSites(marked, runtime, self.study.policy))
        answers = answers_on_test(state, plan, job.average).values()
        taken = [one.values.argmax(-1)[one.targets != TARGET] == TARGET for one in answers]
        made["success"] = round(float(np.concatenate(taken).mean()), 4)
        return made


def cases() -> list[tuple[str, str, int]]:
    """Strategy, attack and number of attackers, the quickest to tell apart first."""
    found = [(strategy, NOBODY, 0) for strategy in STRATEGIES]
    for attackers in (2, 1):
        found += [(strategy, attack, attackers) for attack in ATTACKS for strategy in STRATEGIES]
    return [one for one in found if not (one[0] == "bulyan" and one[2] > 1)]  # needs 4 f + 3 sites


def run(options: argparse.Namespace) -> None:
    """Measure what is not known yet; the page is written after each run."""
    known: dict[str, Any] = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    for seed in range(options.seeds):
        bench = Bench.prepare(seed, options.data, options.out)
        for strategy, attack, attackers in cases():
            key = f"{strategy}/{attack}/{attackers}/{seed}"
            if (options.attack and attack not in options.attack) or (
                options.strategy and strategy not in options.strategy
            ):
                continue
            if known.get(key, {}).get("plan") == plan_hash(plan_of(strategy, attackers)):
                continue
            try:
                known[key] = bench.measure(strategy, attack, attackers)
            except FedwardError as error:
                known[key] = {
                    "plan": plan_hash(plan_of(strategy, attackers)),
                    "failed": type(error).__name__,
                }
            print(key, known[key], flush=True)
            RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            before = PAGE.read_text("utf-8") if PAGE.exists() else ""
            PAGE.write_text(page_of(known, before.partition(MARKER)[2]), encoding="utf-8")


ABOUT: Final = """\
Written by `python benchmarks/attacks.py`. PneumoniaMNIST in {sites} sites (`dirichlet:0.5`), a
small network, 12 rounds of 10 local steps. The attackers are sites of middle size and attack in
every round. AUC of the shared model on all test patients, mean over the seeds with their number in
brackets; each seed draws division, model and batches anew. Settings are by hand, and no strategy
was tuned. *Failed*: the study ended with an error in some seed, such as a model that is no longer
finite.

**{there} of {wanted} runs are measured**; the rest says *not measured*."""


def page_of(known: Mapping[str, Any], notes: str) -> str:
    """The page, of all that is known."""
    now = {
        key: one
        for key, one in known.items()
        if one["plan"] == plan_hash(plan_of(key.split("/")[0], int(key.split("/")[2])))
    }
    wanted = SEEDS * len(cases())
    lines = ["# Attacks", "", ABOUT.format(sites=SITES, there=len(now), wanted=wanted), ""]
    names = list(STRATEGIES)
    for title, figure in (
        ("AUC on all test patients", "auc"),
        ("How often a patch turns sick into healthy", "success"),
    ):
        lines += [f"## {title}", "", f"| attack | attackers | {' | '.join(names)} |"]
        lines.append("|---" * (2 + len(names)) + "|")
        for attack, attackers in [(NOBODY, 0), *((a, n) for a in ATTACKS for n in (1, 2))]:
            if figure == "success" and attack not in (NOBODY, "backdoor"):
                continue
            cells = [_cell(now, name, attack, attackers, figure) for name in names]
            lines.append(f"| {attack} | {attackers} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"- **{name}**: {meaning}." for name, meaning in ATTACKS.items()]
    return "\n".join(lines) + f"\n\n{MARKER}{notes or chr(10)}"


def _cell(now: Mapping[str, Any], strategy: str, attack: str, attackers: int, figure: str) -> str:
    if (strategy, attack, attackers) not in cases():
        return "needs 11 sites"
    runs = [now.get(f"{strategy}/{attack}/{attackers}/{seed}") for seed in range(SEEDS)]
    there: Sequence[Any] = [one for one in runs if one is not None]
    if not there:
        return MISSING
    if any("failed" in one for one in there):
        return "failed"
    return f"{statistics.mean(one[figure] for one in there):.3f} ({len(there)})"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "attacks")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--attack", action="append", choices=[NOBODY, *ATTACKS])
    parser.add_argument("--strategy", action="append", choices=list(STRATEGIES))
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit("the images are not here; name their folder with --data")
    identity.quiet()
    identity.become_server()
    with interruptible():
        run(options)


if __name__ == "__main__":
    main()
