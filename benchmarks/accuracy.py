"""What the shipped plans reach on real images; writes ``benchmarks/accuracy.md``.

Run ``python benchmarks/accuracy.py --data FOLDER`` where FOLDER holds ``pneumonia``, ``covid-ct``,
``lungs`` and ``hippocampus``. Each study runs with three seeds (model, partition, sampling and
noise; division into training, validation and test where the data bring none). A finished run is
kept and not repeated while its plan stays the same, and one that was broken off goes on;
``--only NAME`` runs one study and leaves the others' lines as they are, ``--fresh`` forgets what is
there.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and its simulation.py would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

from fedward.console import interruptible
from fedward.flower import identity
from fedward.plan import load_plan, plan_hash
from fedward_server.report import read_metrics, write_metrics
from fedward_server.results import Arm, StudyResults
from fedward_simulation.pool import cores
from fedward_simulation.study import Options, Study

REPOSITORY = HERE.parent


@dataclass(frozen=True, eq=False)
class Case:
    """One study on one set of images.

    Attributes
    ----------
    goal : float or None
        Points (of 100) that federation may stay below pooled training.
    plain : float or None
        What a plain FedAvg script reached before there was a Fedward.
    private : dict
        ε to what a plain private script reached.
    """

    plan: str
    data: str
    partition: str
    sites: int
    goal: float | None
    plain: float | None
    private: dict[float, float]
    epsilons: tuple[float, ...] = ()


CASES = (
    Case("pneumonia", "pneumonia", "dirichlet:0.5", 5, 0.5, 0.957, {}),
    Case("covid-ct", "covid-ct", "folders", 3, None, 0.703, {}),
    Case("lungs", "lungs", "folders", 7, 2.0, 0.911, {}),
    Case("hippocampus", "hippocampus", "iid", 4, 1.0, 0.822, {}),
    Case(
        "pneumonia-transfer",
        "pneumonia",
        "dirichlet:0.5",
        5,
        None,
        0.961,
        {8: 0.957, 3: 0.946, 1: 0.937},
        (8.0, 3.0, 1.0),
    ),
    Case(
        "covid-ct-transfer",
        "covid-ct",
        "folders",
        3,
        None,
        0.807,
        {8: 0.745, 3: 0.726},
        (8.0, 3.0, 1.0),
    ),
    Case(
        "lungs-private", "lungs", "folders", 7, None, 0.872, {8: 0.817, 3: 0.723}, (8.0, 3.0, 1.0)
    ),
)


def kept_case(case: Case, seed: int, out: Path) -> StudyResults | None:
    """What an earlier call left, if it is complete and its plan is still the same."""
    path = out / f"{case.plan}-seed{seed}" / "metrics.json"
    if not path.exists():
        return None
    kept = read_metrics(path)[0]
    same = kept.plan_sha256 == plan_hash(load_plan(REPOSITORY / "studies" / f"{case.plan}.toml"))
    return kept if same and kept.complete else None


def run_case(case: Case, seed: int, data: Path, out: Path, *, fresh: bool = False) -> StudyResults:
    """Run one study with one seed."""
    path = REPOSITORY / "studies" / f"{case.plan}.toml"
    plan = load_plan(path)
    folder = out / f"{case.plan}-seed{seed}"
    made = None if case.partition == "folders" else case.sites
    options = Options(
        data=data / case.data,
        out=folder,
        partition=case.partition,
        sites=made,
        baselines=not case.epsilons,
        epsilons=case.epsilons,
        seed=seed,
        plan_folder=path.parent,
        images_are_patients=True,  # some of these sets name no patients: their ε is per image
        exact=True,
        fresh=fresh,
    )
    started = time.perf_counter()
    study = Study(plan, options, note=lambda text: None)
    results = study.run()
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics([results], folder / "metrics.json")
    study.checkpoints.clear()
    print(f"{case.plan}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    return results


def own(arm: Arm, primary: str) -> float | None:
    """Mean over the sites of the figure on each site's own test patients.

    None where no site has one, such as an AUC of test patients who are all healthy.
    """
    if arm.test is None:
        raise ValueError("the arm is not finished")
    values = arm.test.per_site
    sites = [arm.site] if arm.site else sorted(values)
    found = [values[site][primary] for site in sites]
    return _mean(found)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None


def together(arm: Arm, primary: str) -> float:
    """The figure on all test patients together."""
    value = None if arm.test is None else arm.test.pooled[primary]
    if value is None:
        raise ValueError("the arm is not finished")
    return value


def spread(found: Sequence[float | None]) -> str:
    """Mean and standard deviation over the seeds; of one seed its figure alone."""
    values = [value for value in found if value is not None]
    if not values:
        return "–"
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def rows(case: Case, runs: Sequence[StudyResults]) -> list[str]:
    """Table rows of one study."""
    primary = runs[0].primary
    lines = []
    for place, arm in enumerate(runs[0].arms):
        if arm.kind == "alone":
            continue
        arms = [run.arms[place] for run in runs]
        lines.append(_row(case, arm.name, arms, primary))
    alone = [[arm for arm in run.arms if arm.kind == "alone"] for run in runs]
    if alone[0]:
        everywhere = [statistics.mean(together(a, primary) for a in arms) for arms in alone]
        at_home = [_mean([own(a, primary) for a in arms]) for arms in alone]
        seconds = [sum(a.seconds for a in arms) for arms in alone]
        lines.append(
            f"| {case.plan} | hospitals alone, mean | {spread(everywhere)} | {spread(at_home)} | – "
            f"| {statistics.mean(seconds):.0f} |"
        )
    return lines


def _row(case: Case, name: str, arms: Sequence[Arm], primary: str) -> str:
    baseline = case.private.get(arms[0].epsilon or 0.0) if arms[0].epsilon else case.plain
    shown = f"{baseline:.3f}" if baseline and arms[0].kind == "federated" else "–"
    return (
        f"| {case.plan} | {name} | {spread([together(a, primary) for a in arms])} "
        f"| {spread([own(a, primary) for a in arms])} | {shown} "
        f"| {statistics.mean(a.seconds for a in arms):.0f} |"
    )


def verdict(case: Case, runs: Sequence[StudyResults]) -> str:
    """In words: the distance to pooled training, to the goal, and the price of privacy."""
    primary, parts = runs[0].primary, []
    plain = [
        next(a for a in run.arms if a.kind == "federated" and a.epsilon is None) for run in runs
    ]
    mean = statistics.mean(together(a, primary) for a in plain)
    if pooled := [run.arm("pooled") for run in runs if run.arm("pooled")]:
        gap = 100 * (statistics.mean(together(a, primary) for a in pooled if a) - mean)
        goal = (
            f"; goal {case.goal} → {'met' if gap <= case.goal else 'missed'}" if case.goal else ""
        )
        parts.append(f"{gap:.1f} points below pooled{goal}")
    for epsilon in sorted({a.epsilon for run in runs for a in run.arms if a.epsilon}, reverse=True):
        arms = [next(a for a in run.arms if a.epsilon == epsilon) for run in runs]
        cost = 100 * (mean - statistics.mean(together(a, primary) for a in arms))
        parts.append(f"ε = {epsilon:g} costs {cost:.1f} points")
    return f"- **{case.plan}** ({runs[0].primary}, seeds: {len(runs)}): " + "; ".join(parts) + "."


def settings(case: Case, runs: Sequence[StudyResults]) -> str:
    """What was run, in a line."""
    return (
        f"- `studies/{case.plan}.toml`, plan SHA-256 `{runs[0].plan_sha256[:16]}…`, partition "
        f"`{case.partition}`, {case.sites} sites, {runs[0].parameters:,} parameters, seeds "
        f"{', '.join(str(run.seed) for run in runs)}"
    )


def earlier(page: str, start: str) -> list[str]:
    """Lines of an earlier page that begin so; its runs may be gone."""
    return [line for line in page.splitlines() if line.startswith(start)]


def write_page(done: dict[Case, list[StudyResults]], path: Path) -> None:
    """Write the page; lines about other studies, and notes after the marker, are kept."""
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may write of another study
        file.seek(0)
        text = _page(done, file.read())
        file.truncate(0)
        file.write(text)


def _page(done: dict[Case, list[StudyResults]], before: str) -> str:
    marker = "<!-- notes -->"
    page, _, notes = before.partition(marker)
    lines = [
        "# Accuracy of the shipped plans",
        "",
        "Written by `python benchmarks/accuracy.py`. Mean ± standard deviation over the seeds; AUC "
        "for classification, Dice for segmentation. *Together*: all test patients of all sites. "
        "*Own*: mean over the sites of each site's own test patients (for hospitals alone: its own "
        "model). *Plain script*: the best that plain FedAvg or FedProx code, or plain private code "
        "at that ε, reached on the same images. Seconds are wall time of the arm.",
        "",
        f"Machine: {platform.machine()}, {cores()} cores, Python {platform.python_version()}.",
        "",
        "| plan | arm | together | own | plain script | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        lines += rows(case, done[case]) if case in done else earlier(page, f"| {case.plan} |")
    lines += ["", "## In words", ""]
    for case in CASES:
        start = f"- **{case.plan}** "
        lines += [verdict(case, done[case])] if case in done else earlier(page, start)
    lines += ["", "## Settings", ""]
    for case in CASES:
        start = f"- `studies/{case.plan}.toml`"
        lines += [settings(case, done[case])] if case in done else earlier(page, start)
    return "\n".join(lines) + f"\n\n{marker}{notes or chr(10)}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "accuracy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=[case.plan for case in CASES])
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit("the images are not here; name their folder with --data")
    identity.quiet()
    with interruptible():
        run(options)


def run(options: argparse.Namespace) -> None:
    """Run what is asked for and write the page after each study."""
    done: dict[Case, list[StudyResults]] = {}
    page = HERE / "accuracy.md"
    text = page.read_text("utf-8") if page.exists() else ""
    there = {case.plan for case in CASES if earlier(text, f"| {case.plan} |")}
    # Seeds outside: an interrupted call leaves something of every study.
    for seed in range(options.seeds):
        for case in CASES:
            wanted = not options.only or case.plan in options.only
            if not wanted and case.plan in there:
                continue  # its lines stay, also where some of its runs are gone
            found = None if options.fresh and wanted else kept_case(case, seed, options.out)
            if found is None and wanted:
                found = run_case(case, seed, options.data, options.out, fresh=options.fresh)
            if found is not None:
                done.setdefault(case, []).append(found)
                write_page(done, page)


if __name__ == "__main__":
    main()
