from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest

from fedward.plan import plan_from, plan_hash
from fedward.plan.schema import Task
from fedward.protocol import SiteFacts
from fedward.tasks.classification import ClassificationCounts
from fedward_server.answers import answers_of
from fedward_server.report.page import render
from fedward_server.results import (
    Answers,
    Arm,
    Failure,
    Figures,
    Intervals,
    Round,
    SitePrivacy,
    SiteRound,
    StudyResults,
    TestFigures,
)

PLAN = """
version = 1
[study]
name = "pneumonia-demo"
title = "Pneumonia on chest X-rays, four hospitals"
intended_use = "Research: compares federated with pooled training. Not for diagnosis."
[task]
kind = "classification"
classes = ["normal", "pneumonia"]
[preprocessing]
size = [64, 64]
[model]
name = "cnn"
[training]
rounds = 12
learning_rate = 2e-3
local_epochs = 1
loss = "cross_entropy"
[privacy]
mechanism = "dp-sgd"
epsilon = 8
delta = 1e-4
clipping_norm = 1.0
[participation]
sites = 4
[metrics]
report = ["auc", "accuracy", "sensitivity", "specificity", "ece"]
primary = "auc"
"""
SITES = ("North", "Harbour", "St. Anne", "Hill")
PATIENTS = (1204, 812, 455, 268)
AT_HOME = {"North": 0.938, "Harbour": 0.911, "St. Anne": 0.874, "Hill": 0.823}
ABROAD = {"North": 0.902, "Harbour": 0.881, "St. Anne": 0.839, "Hill": 0.781}
SHARED = {"federated": 0.951, "ε = 8": 0.937, "ε = 3": 0.921, "ε = 1": 0.884, "pooled": 0.9554}
# Half-widths of the intervals, together and at a hospital.
POOLED, HOME = 0.01, 0.03
SHIFT = {"North": 0.006, "Harbour": -0.004, "St. Anne": -0.013, "Hill": 0.011}


def _figures(auc: float) -> Figures:
    return {
        "auc": auc,
        "accuracy": auc - 0.06,
        "sensitivity": auc - 0.03,
        "specificity": auc - 0.11,
        "ece": 0.2 - auc / 6,
    }


def _limits(figures: Figures, half: float) -> Intervals:
    return {name: (value - half, value + half) for name, value in figures.items() if value}


def classifier_answers(n: int) -> Answers:
    """Answers of a binary classifier on so many images, worked out by the real parts."""
    random = np.random.default_rng(n)
    truth = random.integers(0, 2, n)
    p = 1 / (1 + np.exp(-random.normal(2.0 * truth - 1, 1.0)))
    counts = ClassificationCounts.from_scores(np.stack([1 - p, p], axis=1), truth)
    task = Task(kind="classification", classes=("normal", "pneumonia"))
    found = answers_of(task, counts, 1.0)
    assert found is not None
    return found


def _facts(place: int) -> SiteFacts:
    patients = PATIENTS[place]
    test, validation = patients // 5, patients // 10
    train = patients - test - validation
    return SiteFacts(
        site=SITES[place],
        patients=patients,
        images=patients + 40,
        train_patients=train,
        validation_patients=validation,
        test_patients=test,
        train_images=train + 40,
        validation_images=validation,
        test_images=test,
        class_counts=(patients // 3, patients + 40 - patients // 3),
        left_out_reasons=("wrong modality", "no label") if place == 1 else (),
        left_out_counts=(7, 3) if place == 1 else (),
        synthetic=True,
    )


def _round(number: int, top: float, sites: tuple[str, ...], traffic: int) -> Round:
    value = top - 0.35 * math.exp(-number / 2.5) + 0.004 * math.sin(number * 2.3)
    loss = 0.18 + (1 - top) * 2 + 0.6 * math.exp(-number / 3)
    return Round(
        round=number,
        stage="all",
        seconds=4.2 + 0.3 * math.cos(number),
        bytes_down=traffic * len(sites),
        bytes_up=traffic * len(sites),
        train_loss=loss,
        validation=_figures(value),
        sites={
            site: SiteRound(
                patients=PATIENTS[SITES.index(site)],
                images=PATIENTS[SITES.index(site)] + 40,
                steps=26,
                loss=loss,
                seconds=3.9,
                epsilon=None,
            )
            for site in sites
        },
    )


def _arm(name: str, auc: float, **more: object) -> Arm:
    federated = more.get("kind", "federated") == "federated"
    sites = SITES if federated else SITES[:1]
    rounds = [_round(number, auc, sites, 96_520 if federated else 0) for number in range(1, 13)]
    tested = {site: count // 5 for site, count in zip(SITES, PATIENTS, strict=True)}
    per_site = {site: _figures(auc + SHIFT[site]) for site in SITES}
    test = TestFigures(
        per_site=per_site,
        pooled=_figures(auc),
        images=tested,
        patients=tested,
        contributors={name: sorted(SITES) for name in _figures(auc)},
        intervals=_limits(_figures(auc), POOLED),
        site_intervals={site: _limits(figures, HOME) for site, figures in per_site.items()},
    )
    values = {"kind": "federated", "rounds": rounds, "test": test, "seconds": 52.4, **more}
    return Arm.model_validate({"name": name, **values})


def _alone(site: str) -> Arm:
    arm = _arm(f"alone: {site}", ABROAD[site], kind="alone", site=site, seconds=13.1)
    if arm.test:
        arm.test.per_site = {
            other: _figures(AT_HOME[site] if other == site else ABROAD[site] - 0.01 + SHIFT[other])
            for other in SITES
        }
        arm.test.site_intervals = {s: _limits(f, HOME) for s, f in arm.test.per_site.items()}
    return arm


def _private(target: float) -> Arm:
    arm = _arm(f"federated, ε = {target:g}", SHARED[f"ε = {target:g}"], epsilon=target, delta=1e-4)
    arm.privacy = {
        site: SitePrivacy(
            epsilon=target - 0.008,
            delta=1e-4,
            noise_multiplier=0.6 + 1.4 / target + 20 / patients,
            sampling_rate=32 / (patients * 0.7),
            steps=12 * math.ceil(patients * 0.7 / 32),
        )
        for site, patients in zip(SITES, PATIENTS, strict=True)
    }
    return arm


def classification_study() -> StudyResults:
    """Four sites; alone, federated, three private ones, pooled; two failures."""
    plan = plan_from(tomllib.loads(PLAN))
    federated = _arm("federated", SHARED["federated"])
    private = [_private(8), _private(3), _private(1)]
    for number, site, reason in (
        (4, "Hill", "the site did not answer before the deadline"),
        (5, "Hill", "the site did not answer before the deadline"),
        (9, "Harbour", "an update must be finite"),
    ):
        round_ = private[0].rounds[number - 1]
        del round_.sites[site]
        round_.failures.append(Failure(site=site, reason=reason))
    return StudyResults(
        study=plan.study.name,
        title=plan.study.title,
        complete=True,
        synthetic=True,
        plan=plan.model_dump(mode="json"),
        plan_sha256=plan_hash(plan),
        seed=7,
        engine="local",
        device="cpu",
        partition="folders",
        primary="auc",
        parameters=24_130,
        sites=[_facts(place) for place in range(4)],
        arms=[
            *(_alone(site) for site in SITES),
            federated,
            *private,
            _arm("pooled", SHARED["pooled"], kind="pooled", seconds=49.9),
        ],
        start_up_seconds=2.1,
        seconds=312.7,
        versions={"fedward": "0.1.0", "flwr": "1.41.0", "torch": "2.8.0"},
    )


SEGMENTATION = (
    PLAN.replace("pneumonia-demo", "lungs-demo")
    .replace("Pneumonia on chest X-rays, four hospitals", "Lungs and heart, seen from the front")
    .replace('kind = "classification"', 'kind = "segmentation"')
    .replace('["normal", "pneumonia"]', '["lung", "heart"]')
    .replace('"cnn"', '"unet"')
    .replace("cross_entropy", "dice_ce")
    .replace('["auc", "accuracy", "sensitivity", "specificity", "ece"]', '["dice", "iou", "hd95"]')
    .replace('primary = "auc"', 'primary = "dice"')
    .replace("rounds = 12\nlearning_rate = 2e-3\n", "")
    .replace(
        'mechanism = "dp-sgd"\nepsilon = 8\ndelta = 1e-4\nclipping_norm = 1.0',
        'mechanism = "none"',
    )
    + """
[[stages]]
name = "head"
rounds = 4
learning_rate = 3e-3
train = ["model.2.*"]
[[stages]]
name = "all"
rounds = 8
learning_rate = 1e-3
"""
)


def _overlap(dice: float) -> Figures:
    return {"dice": dice, "iou": dice / (2 - dice), "hd95": 40 * (1 - dice)}


def segmentation_study() -> StudyResults:
    """Two classes, two stages, public start weights; no privacy, no failure."""
    plan, base = plan_from(tomllib.loads(SEGMENTATION)), classification_study()
    arms = [arm for arm in base.arms if arm.epsilon is None]
    for arm in arms:
        if arm.test:
            arm.test.per_site = {s: _overlap(f["auc"] or 0) for s, f in arm.test.per_site.items()}
            dice = arm.test.pooled["auc"] or 0
            arm.test.pooled = _overlap(dice)
            arm.test.contributors = {name: sorted(SITES) for name in arm.test.pooled}
            arm.test.intervals = _limits(arm.test.pooled, POOLED)
            arm.test.site_intervals = {s: _limits(f, HOME) for s, f in arm.test.per_site.items()}
            arm.test.per_class = {
                "dice": {"lung": dice + 0.02, "heart": dice - 0.02},
                "hd95": {"lung": 40 * (0.98 - dice), "heart": 40 * (1.02 - dice)},
            }
            arm.test.class_intervals = {
                m: _limits(f, POOLED) for m, f in arm.test.per_class.items()
            }
        for round_ in arm.rounds:
            round_.validation = _overlap(round_.validation["auc"] or 0)
            round_.stage = "head" if round_.round <= 4 else "all"
    return base.model_copy(
        update={
            "study": plan.study.name,
            "title": plan.study.title,
            "plan": plan.model_dump(mode="json"),
            "plan_sha256": plan_hash(plan),
            "primary": "dice",
            "synthetic": False,
            "arms": arms,
            "weights_report": {"matched": 118, "reshaped_head": 2, "missing": 0, "unused": 4},
        }
    )


class Page(HTMLParser):
    """What a test asks of a page: tables by caption, tags with attributes, text."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.marks: dict[str, list[tuple[str, int]]] = {}
        self.intervals: dict[str, dict[str, list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._rows: list[list[str]] = []
        self._best: list[tuple[str, int]] = []
        self._open: list[str] = []
        self._caption: str | None = None
        self._cell: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "table":
            self._rows, self._best, self._caption = [], [], ""
            self._limits: dict[str, list[str]] = {}
        elif tag == "tr":
            self._rows.append([])
        elif tag in {"td", "th"}:
            self._cell = ""
            if "best" in (values.get("class") or "").split():
                self._best.append((self._rows[-1][0], len(self._rows[-1])))
        elif tag == "span":
            self._open.append(values.get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th"} and self._cell is not None:
            self._rows[-1].append(self._cell.strip())
            self._cell = None
        elif tag == "table" and self._caption is not None:
            self.tables[self._caption] = self._rows
            self.marks[self._caption] = self._best
            self.intervals[self._caption] = self._limits
            self._caption = None
        elif tag == "span" and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        inner = self._open[-1] if self._open else ""
        if self._cell is not None and inner == "interval":
            self._limits.setdefault(self._rows[-1][0], []).append(data)
        elif self._cell is not None and inner != "hidden":
            self._cell += data
        elif inner == "label" and self._caption is not None and not self._rows:
            self._caption += data.strip()

    def rows(self, caption: str) -> dict[str, list[str]]:
        """The rows of a table by their heads."""
        return {row[0]: row[1:] for row in self.tables[caption][1:]}


def read(html: str) -> Page:
    """A page, read."""
    page = Page()
    page.feed(html)
    page.close()
    return page


@pytest.fixture
def classification() -> StudyResults:
    return classification_study()


@pytest.fixture
def answering(classification: StudyResults) -> StudyResults:
    """The study, with the curves of its federated arm without privacy."""
    test = next(arm.test for arm in classification.arms if arm.name == "federated" and arm.test)
    test.answers = classifier_answers(sum(test.images.values()))
    test.site_answers = {site: classifier_answers(n) for site, n in test.images.items()}
    return classification


@pytest.fixture
def segmentation() -> StudyResults:
    return segmentation_study()


@pytest.fixture
def read_page() -> Callable[[str], Page]:
    return read


@pytest.fixture(scope="session")
def html() -> str:
    """The page of the classification study."""
    return render([classification_study()])


@pytest.fixture(scope="session")
def page(html: str) -> Page:
    return read(html)
