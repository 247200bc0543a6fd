"""What updates of fewer bytes cost; writes ``benchmarks/frugal.md``.

Run ``python benchmarks/frugal.py --data FOLDER`` where FOLDER holds ``lungs``. The plan is
``studies/lungs.toml`` with each setting of ``[compression]`` in turn; ``--rounds`` and ``--side``
shorten it, and the page says so. Every setting runs with the first seed; validation patients
choose the one with the fewest bytes among those that lose less than a quarter of a point there, and
it runs with the other seeds too, as the plan without compression does. A finished run is kept while
its plan stays the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and its simulation.py would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

from fedward.console import interruptible
from fedward.flower import identity
from fedward.plan import Plan, load_plan, plan_from, plan_hash
from fedward_server.report import read_metrics, write_metrics
from fedward_server.results import StudyResults
from fedward_simulation.study import Options, Study

REPOSITORY = HERE.parent
NONE = "none"
SETTINGS: dict[str, dict[str, Any] | None] = {
    NONE: None,
    "int8": {"method": "int8"},
    "int4": {"method": "int4"},
    "top-k 5 %": {"method": "top-k", "share": 0.05},
    "top-k 1 %": {"method": "top-k", "share": 0.01},
    "int3, download int5": {"method": "int3", "download": "int5"},
    "top-k 1 %, no error feedback": {"method": "top-k", "share": 0.01, "error_feedback": False},
    "top-k 2 %, download int6": {"method": "top-k", "share": 0.02, "download": "int6"},
    "int4, download int6": {"method": "int4", "download": "int6"},
}
MOST_LOST = 0.0025  # on validation patients


def plan_of(setting: str, rounds: int, side: int) -> Plan:
    """The shipped plan with so many rounds, images of so many pixels, and a setting."""
    content = load_plan(REPOSITORY / "studies" / "lungs.toml").model_dump(mode="python")
    content["training"]["rounds"] = rounds
    content["preprocessing"]["size"] = (side, side)
    content["metrics"] |= {"evaluate_every": rounds, "report": ("dice",)}
    content["compression"] = SETTINGS[setting]
    return plan_from(content)


def run_one(setting: str, seed: int, options: argparse.Namespace) -> StudyResults:
    """One study; what was finished under the same plan is taken as it is."""
    plan = plan_of(setting, options.rounds, options.side)
    folder = options.out / f"{plan_hash(plan)[:12]}-seed{seed}"
    path = folder / "metrics.json"
    if path.exists():
        return read_metrics(path)[0]
    cache = options.out / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cache").exists():
        (folder / "cache").symlink_to(cache, target_is_directory=True)
    started = time.perf_counter()
    study = Study(
        plan,
        Options(data=options.data / "lungs", out=folder, partition="folders", seed=seed),
        note=lambda text: None,
    )
    results = study.run()
    write_metrics([results], path)
    study.checkpoints.clear()
    took = time.perf_counter() - started
    print(f"{setting}, seed {seed}: {validated(results):.4f}, {took:.0f} s", flush=True)
    return results


def validated(run: StudyResults) -> float:
    """The figure on all validation patients after the last round."""
    return float(run.arms[0].rounds[-1].validation[run.primary] or 0.0)


def tested(run: StudyResults) -> float:
    """The figure on all test patients."""
    test = run.arms[0].test
    value = None if test is None else test.pooled[run.primary]
    if value is None:
        raise SystemExit(f"{run.study} has no figure; run it again")
    return value


def sent(run: StudyResults) -> tuple[float, float]:
    """Bytes of tensors of one site in one round, up and down."""
    rounds = run.arms[0].rounds
    replies = sum(len(one.sites) for one in rounds)
    down, up = (sum(getattr(one, key) for one in rounds) for key in ("bytes_down", "bytes_up"))
    return up / replies, down / replies


def chosen(first: dict[str, StudyResults]) -> str:
    """The setting of the fewest bytes among those that lose little on validation patients."""
    least = validated(first[NONE]) - MOST_LOST
    good = [name for name, run in first.items() if name != NONE and validated(run) >= least]
    return min(good, key=lambda name: sum(sent(first[name]))) if good else NONE


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def page_of(
    runs: dict[str, list[StudyResults]], best: str, options: argparse.Namespace, notes: str
) -> str:
    """The page."""
    head = [
        "# Updates of fewer bytes",
        "",
        f"Written by `python benchmarks/frugal.py --rounds {options.rounds} --side "
        f"{options.side}`. `studies/lungs.toml` with {options.rounds} rounds on images of "
        f"{options.side} × {options.side} pixels, 7 sites as in the data. *Validation*: Dice on "
        "all validation patients after the last round, first seed, which chose the setting. "
        "*Test*: Dice on all test patients, mean ± standard deviation over the seeds. *Up*, "
        "*down*: bytes of tensors that a site sends and receives in a round of training. *Fewer*: "
        "times, up, and up and down together.",
        "",
        "| compression | validation | test | seeds | up | down | fewer up | fewer in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    up, down = sent(runs[NONE][0])
    rows = []
    for name, done in runs.items():
        own_up, own_down = sent(done[0])
        ratios = f"{up / own_up:.1f} | {(up + down) / (own_up + own_down):.1f}"
        test = spread([tested(run) for run in done])
        rows.append(
            f"| {name}{' (chosen)' if name == best else ''} | {validated(done[0]):.4f} | {test} | "
            f"{len(done)} | {own_up:,.0f} | {own_down:,.0f} | {ratios} |"
        )
    lost = [
        100 * (tested(plain) - tested(frugal))
        for plain, frugal in zip(runs[NONE], runs[best], strict=True)
    ]
    told = f"{best} costs {statistics.mean(lost):.2f} points of test Dice (mean of {len(lost)})"
    return "\n".join([*head, *rows, "", f"{told}.", "", f"<!-- notes -->{notes}"])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "frugal")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=[*SETTINGS], help="`none` first")
    parser.add_argument("--rounds", type=int, default=250)
    parser.add_argument("--side", type=int, default=128)
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit("the images are not here; name their folder with --data")
    identity.quiet()
    runs: dict[str, list[StudyResults]] = {}
    with interruptible():
        for setting in options.only or SETTINGS:
            runs[setting] = [run_one(setting, 0, options)]
            write(runs, options)
        best = chosen({setting: done[0] for setting, done in runs.items()})
        for setting in dict.fromkeys((NONE, best)):
            for seed in range(1, options.seeds):
                runs[setting].append(run_one(setting, seed, options))
        write(runs, options)


def write(runs: dict[str, list[StudyResults]], options: argparse.Namespace) -> None:
    """Write the page of what is there."""
    page = HERE / "frugal.md"
    best = chosen({setting: done[0] for setting, done in runs.items()})
    _, _, notes = (page.read_text("utf-8") if page.exists() else "").partition("<!-- notes -->")
    page.write_text(page_of(runs, best, options, notes or "\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
