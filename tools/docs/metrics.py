"""The reference of ``metrics.json``: ``python -m tools.docs.metrics > docs/metrics.md``."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

from pydantic import BaseModel

from fedward.protocol import SiteFacts
from fedward.tasks.registry import METRICS, TASKS
from fedward_server import memorisation, results
from tools.docs.schema_tables import anchor, fields_table, summary

_PARTS: tuple[type[BaseModel], ...] = (
    results.StudyResults,
    results.Arm,
    results.Round,
    results.SiteRound,
    results.Failure,
    results.TestFigures,
    results.Paired,
    results.Answers,
    results.OperatingPoint,
    results.SitePrivacy,
    memorisation.Audit,
    memorisation.Membership,
    memorisation.LowerBound,
    memorisation.Inverted,
    SiteFacts,
)

_MEANINGS: dict[type[BaseModel], dict[str, str]] = {
    results.StudyResults: {
        "schema_version": "version of this format",
        "study": "the plan's short name",
        "title": "the plan's title",
        "plan_sha256": "SHA-256 of the plan's canonical form",
        "seed": "seed of the run",
        "engine": "what ran the study: `local`, `ray`, or a deployment",
        "device": "what trained: `cpu`, or the GPU's model",
        "partition": "how the data was divided into sites",
    },
    results.Arm: {
        "kind": "a shared model, one hospital on its own, or all data in one place",
        "delta": "the plan's target δ",
    },
    results.Round: {"sites": "by name of the site"},
    results.Failure: {
        "site": "whose update did not count",
        "reason": "the rule that it broke; never a path, identifier, name or date",
    },
    results.Paired: {"metric": "the figure"},
    results.SitePrivacy: {
        "delta": "δ at which ε was spent",
        "noise_multiplier": "standard deviation of the noise over the clipping norm",
        "sampling_rate": "chance of a patient to be in a step",
        "steps": "private steps in all rounds",
    },
    memorisation.Audit: {
        "study": "the plan's short name",
        "plan_sha256": "SHA-256 of the plan's canonical form",
        "seed": "seed of the study and of the audit",
    },
    SiteFacts: {
        "version": "version of the record",
        "site": "name of the site",
        "patients": "patients with an image that was taken",
        "images": "images that were taken",
        "train_patients": "patients to train on",
        "validation_patients": "patients for validation",
        "test_patients": "patients for the test",
        "train_images": "images to train on",
        "validation_images": "images for validation",
        "test_images": "images for the test",
        "class_counts": "images of each class, in the plan's order",
        "left_out_reasons": "why files or rows were left out",
        "left_out_counts": "how many, reason by reason",
        "synthetic": "whether the images say of themselves that they are synthetic",
        "images_are_patients": "whether the images name no patients, so that each counts as one",
        "release": "version of Fedward that the site runs",
        "plan_schema": "newest version of the plan schema that this release knows",
        "dataset": "name of the site's dataset; empty unless the site's policy tells it",
    },
}

_HEAD = """\
# `metrics.json`

Everything that a run measured, in one JSON file beside the report: UTF-8, keys sorted, figures as
numbers. A figure that cannot be computed (the AUC of a test set with one class, a loss that
diverged) is `null`; there is no NaN. The file is replaced as a whole, so that a reader never sees a
part of it.

A run of one study writes a [StudyResults](#study-results) object. A run of several writes
`{"studies": [...]}` with one such object for each.

A table of figures maps the name of a [metric](#metrics) to its value.

This page is generated from the schema (`python -m tools.docs.metrics > docs/metrics.md`) and a
test holds it.
"""


def _metrics() -> Iterator[str]:
    yield "| name | in reports | tasks | better | values |"
    yield "|---|---|---|---|---|"
    for name, metric in METRICS.items():
        tasks = " and ".join(kind for kind, spec in TASKS.items() if name in spec.metric_names)
        low, high = metric.bounds
        values = f"{low:g} to {high:g}" if math.isfinite(high) else f"from {low:g}"
        yield f"| `{name}` | {metric.label} | {tasks} | {metric.better} | {values} |"


def metrics_reference() -> str:
    """The text of ``docs/metrics.md``."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _HEAD
    yield from ("## Metrics", "", '<a id="metrics"></a>', "", *_metrics(), "")
    for model in _PARTS:
        yield from (f"## {model.__name__}", "", f'<a id="{anchor(model.__name__)}"></a>', "")
        yield from (summary(model), "", *fields_table(model, _MEANINGS.get(model, {})), "")


if __name__ == "__main__":
    sys.stdout.write(metrics_reference())
