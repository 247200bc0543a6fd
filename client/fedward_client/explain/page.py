"""The page of explanations: one HTML file, whole in itself, that opens from the disk."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedward.models.finished import FinishedModel
from fedward.printable import printable
from fedward_client.explain.run import STAYS, UNCERTAINTY, How, Told, shown_by

if TYPE_CHECKING:
    from fedward_client.explain.run import Case

_COLUMNS: Final = {
    "probability": "Probability",
    "error": "Error",
    "uncertainty": "Uncertainty",
    "deletion": "Deletion",
    "insertion": "Insertion",
}
# What each figure over all images means, and which way is good.
_MEANS: Final = {
    "deletion": (
        "Deletion AUC",
        "the probability while the map's pixels, strongest first, give way to the mean: "
        "low is good",
    ),
    "insertion": (
        "Insertion AUC",
        "the probability while these pixels come back into a blurred image: high is good",
    ),
    "points_at": (
        "Pointing game",
        "the share of images whose strongest pixel lies in the marked finding: high is good",
    ),
    "inside": (
        "Energy inside",
        "the share of the map that lies in the marked finding: high is good",
    ),
    "tells_wrong": (
        "Uncertainty tells wrong pixels (AUC)",
        "the chance that a wrong pixel is less sure than a right one: 0.5 is chance, 1 is best",
    ),
}
_RANDOMISED: Final = {
    "head": "the last layer has random weights",
    "all": "all weights are random",
}


@dataclass(frozen=True)
class Row:
    """One image on the page.

    Attributes
    ----------
    name, frame : str
        The file, and which of its images.
    pictures : tuple
        See :func:`fedward_client.explain.pictures.pictures`.
    prediction, label : str
        In words; "" where no label is known.
    cells : list of tuple
        Of each column its value, "" where there is none, and how it is shown.
    remarks : str
        Why the prediction is doubtful, or why there is none.
    """

    name: str
    frame: str
    pictures: tuple[tuple[str, str, str], ...]
    prediction: str
    label: str
    cells: list[tuple[str, str]]
    remarks: str


def page_of(model: FinishedModel, how: How, told: Told) -> str:
    """The page's HTML."""
    columns = [name for name in _COLUMNS if any(name in case.figures for _, case in told.cases)]
    rows = [_row(record, case, columns) for record, case in told.cases]
    refused = [one for one in told.records if one["state"] == "refused"]
    environment = Environment(
        loader=PackageLoader("fedward_client.explain"), autoescape=True, undefined=StrictUndefined
    )
    script = _file("explain.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("explain.html.jinja").render(
        stays=STAYS,
        style=Markup(_file("explain.css")),
        script=Markup(script),
        digest=digest,
        model=model,
        map=shown_by(model, how),
        uncertainty=UNCERTAINTY,
        columns={name: _COLUMNS[name] for name in columns},
        rows=rows,
        refused=refused,
        trust=list(_trust(told.trust)),
    )
    return printable(page)


def _file(name: str) -> str:
    return (resources.files("fedward_client.explain") / "templates" / name).read_text("utf-8")


def _row(record: Mapping[str, Any], case: Case, columns: list[str]) -> Row:
    figures = case.figures
    return Row(
        name=record["name"],
        frame=str(case.number + 1) if len(record["images"]) > 1 else "",
        pictures=case.pictures,
        prediction=", ".join(figures["prediction"]) or "none of the classes",
        label=(", ".join(figures["label"]) or "none of the classes") if "label" in figures else "",
        cells=[
            (repr(figures[name]), f"{figures[name]:.3f}") if name in figures else ("", "–")
            for name in columns
        ],
        remarks="; ".join(record["marks"]),
    )


def _trust(trust: Mapping[str, Any]) -> list[tuple[str, str, int, str]]:
    """Name, value, images and meaning of each figure over all images."""
    found = [
        (name, f"{trust[key]['mean']:.3f}", trust[key]["images"], meaning)
        for key, (name, meaning) in _MEANS.items()
        if key in trust
    ]
    if "error_with_uncertainty" in trust:
        one = trust["error_with_uncertainty"]
        meaning = "rank correlation of both over labelled images: high is good"
        value = f"{one['rank_correlation']:.3f}"
        found.append(("Error with uncertainty", value, one["images"], meaning))
    for key, words in _RANDOMISED.items():
        if key in trust.get("randomised", {}):
            one = trust["randomised"][key]
            meaning = (
                f"rank correlation with the map when {words}: near 0 is good; near 1 the map shows "
                "the image, not what the model learnt"
            )
            name = f"Sanity check ({key})"
            found.append((name, f"{one['likeness']:.3f}", one["images"], meaning))
    return found
