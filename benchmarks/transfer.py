"""What privacy costs on features of a public network; writes ``benchmarks/transfer.md``.

Run ``python benchmarks/transfer.py --data FOLDER`` where FOLDER holds ``covid-ct``, ``pneumonia``,
``ham10000-sites`` and ``fundus``. Each set runs without privacy, at ε = 8 and at ε = 3, with the
learning rate that validation patients chose, and beside it logistic regression on the same frozen
features of all sites together. Where a plan stood in ``studies`` before centring, it runs as it
was. The seed draws the division into training, validation and test, the sampling and the noise. A
finished run is kept while its plan stays the same; ``--only NAME`` runs one set and leaves the
others' lines as they are.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and its simulation.py would hide the package.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fedward.console import interruptible
from fedward.flower import identity
from fedward.models import freeze, split_at_trainable, trainable_names
from fedward.plan import Plan, load_plan, plan_from, plan_hash
from fedward_client.training.source import Source
from fedward_server.report import read_metrics, write_metrics
from fedward_server.results import StudyResults
from fedward_simulation.feasible import start_model
from fedward_simulation.study import Options, Study, with_privacy

REPOSITORY = HERE.parent
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of logistic regression, C
Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One set of images, and the plan that it takes.

    Attributes
    ----------
    plan : str
        Of ``studies``.
    changes : dict
        Of the plan's sections, for a set that has no plan of its own.
    rates : dict
        Learning rate of each arm, as validation patients chose it.
    before : dict
        Of the plan's sections, as they were before centring.
    label : str
        Column of the label in ``labels.csv``; "": the data need no other layout.
    patient, site : str
        Columns of the patient and of the site; a set without sites is divided by a hash of the
        patient.
    """

    name: str
    plan: str
    data: str
    partition: str = "folders"
    sites: int | None = None
    rates: dict[str, float] = field(default_factory=dict)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    patient: str = ""
    site: str = ""


def _study(name: str, classes: tuple[str, ...], modality: str) -> dict[str, dict[str, Any]]:
    return {
        "study": {"name": name, "title": ""},
        "task": {"classes": classes, "modality": (modality,)},
    }


def _before(taps: tuple[int, ...], rounds: int) -> dict[str, Any]:
    return {
        "model": {"feature_centering": False, "taps": taps},
        "training": {"schedule": "cosine"},
        "strategy": {"averaging": 0.9},
        "privacy": {"clipping_norm": 1.0},
        "stages": {"rounds": rounds, "learning_rate": 1.0},
    }


CASES = (
    Case(
        "covid-ct-transfer",
        "covid-ct-transfer",
        "covid-ct",
        rates={"none": 1.0, "8": 1.0, "3": 0.6},
        before=_before((10, 12, 15), 150),
    ),
    Case(
        "ham10000",
        "covid-ct-transfer",
        "ham10000-sites",
        rates={"none": 0.6, "8": 0.3, "3": 0.2},
        changes=_study("ham10000-transfer", ("nv", "mel", "bkl", "bcc", "akiec"), "XC"),
        label="dx",
        patient="lesion",
        site="site",
    ),
    Case(
        "fundus",
        "covid-ct-transfer",
        "fundus",
        rates={"none": 0.6, "8": 0.2, "3": 0.2},
        changes=_study("fundus-transfer", ("normal", "glaucoma", "cataract"), "OP"),
        label="class",
        patient="patient",
    ),
    Case(
        "pneumonia-transfer",
        "pneumonia-transfer",
        "pneumonia",
        "dirichlet:0.5",
        5,
        rates={"none": 1.0, "8": 1.0, "3": 0.6},
        before=_before((7, 10, 12), 120),
    ),
)
ARMS = ("none", "8", "3")
HAM_SITES = ("rosendahl", "vidir_modern", "vidir_molemax")  # those with hundreds of lesions


def plan_of(case: Case, arm: str, *, centred: bool = True) -> Plan:
    """The case's plan for an arm, or what stood in ``studies`` before centring."""
    content = load_plan(REPOSITORY / "studies" / f"{case.plan}.toml").model_dump(mode="python")
    stage = {"learning_rate": case.rates[arm]}
    if not centred:
        stage = case.before["stages"]
    for section, values in (case.changes if centred else case.before).items():
        if section != "stages":
            content[section] |= values
    content["stages"] = [{**content["stages"][0], **stage}]
    return with_privacy(plan_from(content), None if arm == "none" else float(arm))


def laid_out(case: Case, source: Path, folder: Path) -> Path:
    """The set as folders of sites, each with a table of labels; as it is where that is so."""
    if not case.label:
        return source
    classes = set(case.changes["task"]["classes"])
    rows: dict[str, list[list[str]]] = {}
    with (source / "labels.csv").open(encoding="utf-8") as table:
        for row in csv.DictReader(table):
            site = row[case.site] if case.site else _hashed(row[case.patient])
            if row[case.label] in classes and (not case.site or site in HAM_SITES):
                rows.setdefault(site, []).append([row["image"], row[case.label], row[case.patient]])
    for site, own in rows.items():
        for entry in own:
            inside = entry[0].removeprefix(f"{site}/")
            target = folder / site / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / entry[0], target)
            entry[0] = inside
        with (folder / site / "labels.csv").open("w", encoding="utf-8") as table:
            csv.writer(table).writerows([["image", "label", "patient"], *own])
    return folder


def _hashed(patient: str) -> str:
    return f"site-{int(hashlib.sha256(patient.encode()).hexdigest(), 16) % 3 + 1}"


def run_arm(case: Case, arm: str, centred: bool, seed: int, data: Path, out: Path) -> StudyResults:
    """One study; what was finished under the same plan is taken as it is."""
    plan = plan_of(case, arm, centred=centred)
    folder = out / f"{case.name}-{arm}-{'centred' if centred else 'before'}-seed{seed}"
    path = folder / "metrics.json"
    if path.exists() and (kept := read_metrics(path)[0]).plan_sha256 == plan_hash(plan):
        return kept
    started, study = (
        time.perf_counter(),
        Study(plan, _options(case, seed, data, folder, out), note=_quiet),
    )
    results = study.run()
    results.plan_sha256 = plan_hash(plan)
    write_metrics([results], path)
    study.checkpoints.clear()
    print(
        f"{folder.name}: {_value(results):.3f}, {time.perf_counter() - started:.0f} s", flush=True
    )
    return results


def _options(case: Case, seed: int, data: Path, folder: Path, out: Path) -> Options:
    shared = out / "cache"  # the frozen layers see each image once, whatever is trained behind them
    shared.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cache").exists():
        (folder / "cache").symlink_to(shared, target_is_directory=True)
    return Options(
        data=data,
        out=folder,
        partition=case.partition,
        sites=case.sites,
        seed=seed,
        plan_folder=REPOSITORY / "studies",
        images_are_patients=True,  # some of these sets name no patients: their ε is per image
        exact=True,
    )


def _quiet(text: str) -> None:
    pass


def _value(run: StudyResults) -> float:
    (arm,) = run.arms
    value = None if arm.test is None else arm.test.pooled[run.primary]
    if value is None:
        raise SystemExit(f"{run.study} has no figure; run it again")
    return value


def regression(case: Case, seed: int, data: Path, out: Path) -> float:
    """AUC on all test patients of logistic regression on all training patients' features.

    Its strength is chosen on the validation patients.
    """
    plan = plan_of(case, "none")
    study = Study(plan, _options(case, seed, data, out / f"{case.name}-features", out), note=_quiet)
    sites = study.prepare()
    runtime, _ = study.machine(1)
    model, _ = start_model(plan, seed, REPOSITORY / "studies")
    names = trainable_names(model, plan.stages[0].train)
    freeze(model, names)
    prefix, _ = split_at_trainable(model, names)
    if prefix is None:
        raise SystemExit("the plan has no frozen layers")
    state = hashlib.sha256()
    for value in prefix.state_dict().values():
        state.update(value.numpy().tobytes())
    parts: dict[str, list[tuple[Array, Array]]] = {}
    for site in sites:
        source = Source(plan, site, runtime, prefix.eval(), state.hexdigest())
        for part in ("train", "validation", "test"):
            (x, *_), y = source.plain(site.split[part])
            parts.setdefault(part, []).append((x.numpy(), y.numpy()))
    of = {
        part: [np.concatenate(two) for two in zip(*found, strict=True)]
        for part, found in parts.items()
    }
    fitted = [LogisticRegression(C=c, max_iter=5000).fit(*of["train"]) for c in STRENGTHS]
    best = max(fitted, key=lambda one: _auc(one, *of["validation"]))
    return _auc(best, *of["test"])


def _auc(model: LogisticRegression, features: Array, labels: Array) -> float:
    sure = model.predict_proba(features)
    if sure.shape[1] == 2:
        return float(roc_auc_score(labels, sure[:, 1]))
    there = [c for c in model.classes_ if 0 < (labels == c).sum() < len(labels)]
    return float(np.mean([roc_auc_score(labels == c, sure[:, c]) for c in there]))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "–"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def page_of(done: dict[str, dict[str, list[float]]], before: str) -> str:
    """The page; rows of sets that were not run, and notes after the marker, are kept."""
    marker = "<!-- notes -->"
    _, _, notes = before.partition(marker)
    head = [
        "# Privacy on features of a public network",
        "",
        "Written by `python benchmarks/transfer.py`. AUC on all test patients of all sites, mean ± "
        "standard deviation over the seeds, which draw the division of the patients, the sampling "
        "and the noise. *Centred*: with `model.feature_centering`. *Before*: "
        "the plan that stood in `studies` before it. *Regression*: logistic regression without "
        "privacy on the same frozen features of all sites together. *Price*: points (of 100) that "
        "the centred plan loses to itself without privacy.",
        "",
        "| set | ε | centred | before | regression | price |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for case in CASES for row in _rows(case, done.get(case.name), before)]
    return "\n".join([*head, *rows]) + f"\n\n{marker}{notes or chr(10)}"


def _rows(case: Case, found: dict[str, list[float]] | None, before: str) -> Iterator[str]:
    if found is None:
        results = before.partition("<!-- notes -->")[0].splitlines()
        yield from (line for line in results if line.startswith(f"| {case.name} |"))
        return
    for arm in ARMS:
        centred = found.get(f"{arm} centred", [])
        if not centred:
            continue
        price = "–"
        if arm != "none":
            plain = found["none centred"][: len(centred)]
            price = f"{100 * (statistics.mean(plain) - statistics.mean(centred)):z.1f}"
        told = spread(found["regression"]) if arm == "none" else ""
        earlier = spread(found.get(f"{arm} before", []))
        yield f"| {case.name} | {arm} | {spread(centred)} | {earlier} | {told} | {price} |"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "transfer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES])
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit("the images are not here; name their folder with --data")
    identity.quiet()
    with interruptible(), TemporaryDirectory() as folder:
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    """Run what is asked for; the page is written after each seed of a set."""
    done: dict[str, dict[str, list[float]]] = {}
    page = HERE / "transfer.md"
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        data = laid_out(case, options.data / case.data, folder / case.name)
        found = done[case.name] = {}
        for centred in (True, False) if case.before else (True,):
            for seed in range(options.seeds):
                for arm in ARMS:
                    result = run_arm(case, arm, centred, seed, data, options.out)
                    name = f"{arm} {'centred' if centred else 'before'}"
                    found.setdefault(name, []).append(_value(result))
                if centred:
                    told = regression(case, seed, data, options.out)
                    found.setdefault("regression", []).append(told)
                text = page.read_text("utf-8") if page.exists() else ""
                page.write_text(page_of(done, text), encoding="utf-8")


if __name__ == "__main__":
    main()
