"""What models of the shipped private plans remember; writes ``benchmarks/privacy.md``.

Run ``python benchmarks/privacy.py --data FOLDER`` where FOLDER holds ``pneumonia`` and ``lungs``.
Each study is audited at ε = 8, 3, 1 and without privacy, in the rounds, shadows and canaries that
the options say; the page states them. Finished audits, and finished federations of one that was
ended, are kept. The page is written anew after each audit; a cell that was not measured is empty.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and its simulation.py would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

from rich.console import Console

from fedward.flower import identity
from fedward.plan import load_plan, plan_hash
from fedward.plan.load import plan_from
from fedward.plan.schema import Plan
from fedward_server.memorisation import Audit
from fedward_simulation.audit.audit import Sizes
from fedward_simulation.audit.progress import AuditProgress
from fedward_simulation.audit.study import FILE, audit_study
from fedward_simulation.pool import cores
from fedward_simulation.study import Options, Study, with_privacy

REPOSITORY = HERE.parent
EPSILONS: tuple[float | None, ...] = (8.0, None, 1.0, 3.0)  # the most telling ones first
EMPTY = " "


@dataclass(frozen=True)
class Case:
    """One study on one set of images."""

    plan: str
    data: str
    partition: str
    sites: int | None


CASES = (
    Case("lungs-private", "lungs", "folders", None),
    Case("pneumonia-transfer", "pneumonia", "dirichlet:0.5", 5),
)


def shortened(plan: Plan, rounds: int) -> Plan:
    """The plan with so many rounds at most, in its first stage; others keep one."""
    content = plan.model_dump(mode="python")
    if plan.stages:
        for place, stage in enumerate(content["stages"]):
            stage["rounds"] = min(stage["rounds"], rounds if place == 0 else 1)
    else:
        content["training"]["rounds"] = min(plan.rounds, rounds)
    return plan_from(content)


def plan_of(case: Case, epsilon: float | None, rounds: int) -> Plan:
    """What is audited: noise is calibrated anew for the rounds that are run."""
    plan = load_plan(REPOSITORY / "studies" / f"{case.plan}.toml")
    return with_privacy(shortened(plan, rounds), epsilon)


def folder_of(case: Case, epsilon: float | None, seed: int, out: Path) -> Path:
    """Where one audit lies."""
    name = "none" if epsilon is None else f"{epsilon:g}"
    return out / f"{case.plan}-{name}-seed{seed}"


def kept(case: Case, epsilon: float | None, seed: int, options: argparse.Namespace) -> Audit | None:
    """What an earlier call found, if it was of the same plan and sizes."""
    path = folder_of(case, epsilon, seed, options.out) / FILE
    if not path.exists():
        return None
    found = Audit.model_validate_json(path.read_text("utf-8"))
    same = found.plan_sha256 == plan_hash(plan_of(case, epsilon, options.rounds))
    sizes = (found.shadows, found.canaries) == (options.shadows, options.canaries)
    return found if same and sizes else None


def measure(case: Case, epsilon: float | None, seed: int, options: argparse.Namespace) -> Audit:
    """Audit one study at one ε with one seed."""
    folder = folder_of(case, epsilon, seed, options.out)
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(
        plan_of(case, epsilon, options.rounds),
        Options(
            data=options.data / case.data,
            out=folder,
            partition=case.partition,
            sites=case.sites,
            seed=seed,
            plan_folder=REPOSITORY / "studies",
            images_are_patients=True,  # some of these sets name no patients: their ε is per image
        ),
    )
    with AuditProgress(Console(stderr=True)) as progress:
        sizes = Sizes(options.shadows, options.canaries, options.steps)
        return audit_study(study, sizes, progress, fresh=False)


def mean(found: Sequence[Audit], pick: Callable[[Audit], float | None], form: str = ".3f") -> str:
    """Mean over the seeds of a figure, and its spread; empty where nothing was measured."""
    values = [value for one in found if (value := pick(one)) is not None]
    if not values:
        return EMPTY
    text = format(statistics.mean(values), form)
    return f"{text} ± {statistics.stdev(values):{form}}" if len(values) > 1 else text


def attack(name: str) -> Callable[[Audit], float | None]:
    """The AUC of an attack."""
    return lambda audit: next((m.auc for m in audit.memberships if m.attack == name), None)


def rate(audit: Audit) -> float | None:
    """LiRA's true positives at 1 % false ones, on models of random halves."""
    for one in audit.memberships:
        if one.attack == "LiRA, random halves" and "0.01" in one.true_positives:
            return 100 * one.true_positives["0.01"][0]
    return None


def bound(name: str) -> Callable[[Audit], float | None]:
    """The largest lower bound of an attack over the sites."""
    return lambda audit: max((b.epsilon for b in audit.bounds if b.attack == name), default=None)


def inverted(audit: Audit) -> float | None:
    """Correlation of what was drawn out of an update of this plan."""
    private = any(one.promised is not None for one in audit.bounds)
    return next((one.correlation for one in audit.inversions if one.private == private), None)


def row(case: Case, epsilon: float | None, found: Sequence[Audit]) -> str:
    """A line of the table."""
    cells = [
        case.plan,
        "none" if epsilon is None else f"{epsilon:g}",
        str(len(found)),
        mean(found, attack("loss, delivered model")),
        mean(found, attack("LiRA, delivered model")),
        mean(found, attack("LiRA, random halves")),
        mean(found, rate, ".1f"),
        mean(found, bound("members of a random half"), ".2f"),
        mean(found, bound("canaries, delivered model"), ".2f"),
        mean(found, bound("canaries, all updates"), ".2f"),
        mean(found, bound("canaries, single steps"), ".2f"),
        mean(found, inverted),
    ]
    return f"| {' | '.join(cells)} |"


def write_page(
    done: dict[tuple[Case, float | None], list[Audit]], options: argparse.Namespace
) -> None:
    """Write the page; notes after the marker are kept."""
    path, marker = HERE / "privacy.md", "<!-- notes -->"
    notes = path.read_text("utf-8").partition(marker)[2] if path.exists() else "\n"
    lines = [
        "# What the shipped private plans remember",
        "",
        "Written by `python benchmarks/privacy.py`. Attacks on models and updates of the shipped "
        "private plans, by `fedward-simulate audit`. **Reduced**: each study runs at most "
        f"{options.rounds} rounds (its noise calibrated for these, so that ε is what stands in the "
        f"row), with {options.shadows} shadow federations, {options.canaries} canaries at each "
        f"site and {options.steps} steps of gradient inversion; a real audit takes more of all. "
        "Mean ± standard deviation over the seeds. An empty cell was not measured.",
        "",
        "AUC: membership inference, 0.5 is guessing. TPR: true positives of LiRA at 1 % false "
        "ones. ε ≥: lower bounds at 95 %, the largest over the sites; 0 says that the attack "
        "found nothing. Single steps are tried only where updates are private. Inversion: "
        "correlation of a patient's image with what was drawn out of an update of that patient "
        "alone.",
        "",
        f"Machine: {platform.machine()}, {cores()} cores, Python {platform.python_version()}.",
        "",
        "| plan | ε | seeds | AUC, loss, delivered | AUC, LiRA, delivered | AUC, LiRA, halves "
        "| TPR at 1 %, % | ε ≥, members | ε ≥, canaries, model | ε ≥, canaries, updates "
        "| ε ≥, single steps | inversion |",
        "|" + "---|" * 12,
    ]
    order = sorted(EPSILONS, key=lambda one: -(one or 1e9))
    lines += [row(case, one, done.get((case, one), [])) for case in CASES for one in order]
    path.write_text("\n".join(lines) + f"\n\n{marker}{notes}", "utf-8")


def main() -> None:
    """Run what is asked for and write the page after each audit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "privacy")
    parser.add_argument("--only", action="append", choices=[case.plan for case in CASES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--shadows", type=int, default=8)
    parser.add_argument("--canaries", type=int, default=40)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit("the images are not here; name their folder with --data")
    identity.quiet()
    done: dict[tuple[Case, float | None], list[Audit]] = {}
    write_page(done, options)
    # Seeds outside: an interrupted call leaves something of every study.
    for seed in range(options.seeds):
        for epsilon in EPSILONS:
            for case in CASES:
                found = kept(case, epsilon, seed, options)
                if found is None and (not options.only or case.plan in options.only):
                    found = measure(case, epsilon, seed, options)
                if found is not None:
                    done.setdefault((case, epsilon), []).append(found)
                    write_page(done, options)


if __name__ == "__main__":
    main()
