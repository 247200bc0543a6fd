"""Explain image by image: maps, what they are worth, and the page that shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.errors import DataError, OutputError, PlanError
from fedward.files import write_private
from fedward.models.finished import FinishedModel
from fedward.plan.schema import Preprocessing, Task
from fedward_client.data.channels import planes_of
from fedward_client.data.pictures import as_bytes
from fedward_client.data.quiet import quiet
from fedward_client.data.restore import restore_layer
from fedward_client.data.sample import Image
from fedward_client.data.table_rows import Row
from fedward_client.data.transforms import one_torch_thread, prepare_image, to_unit
from fedward_client.explain.maps import Explained, Method, entropy, mirrored, scaled
from fedward_client.explain.pictures import overlaid, pictures
from fedward_client.explain.trust import (
    deletion_and_insertion,
    likeness,
    points_at,
    randomised,
    tells_wrong,
)
from fedward_client.explain.truth import UNKNOWN, Truth, keys_of
from fedward_client.predict.doubts import by_header, by_image
from fedward_client.predict.inputs import DicomSource, Found, Source
from fedward_client.predict.run import (
    Answer,
    Outcome,
    Predictor,
    Wish,
    about,
    figures_of,
    refused,
    unwritable,
    weigh,
    write_into,
    write_json,
)
from fedward_client.training.runtime import Runtime

STAYS: Final = "This page is of patients and stays at the hospital. Do not pass it on."
UNCERTAINTY: Final = "uncertainty"  # what is shown of a model that answers for each pixel
_CHECKED: Final = 8  # images on which randomised weights are tried
_YES: Final = 0.5  # of several labels, the probability from which one is told


@dataclass(frozen=True)
class How:
    """What is to be shown.

    Attributes
    ----------
    method : str
        Of a classifier's maps.
    shown : int or None
        Class that is explained, from 0; None: each image's likeliest.
    trust : bool
        Whether the maps are tried too.
    truths : mapping
        What is known of images, by :func:`fedward_client.explain.truth.keys_of`.
    """

    method: Method = "grad-cam"
    shown: int | None = None
    trust: bool = True
    truths: Mapping[str, Truth] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One image, explained.

    Attributes
    ----------
    number : int
        Which of its file's images, from 0.
    figures : dict
        As ``explain.json`` has them.
    pictures : tuple
        What the page shows (see :func:`fedward_client.explain.pictures.pictures`).
    """

    number: int
    figures: dict[str, Any]
    pictures: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Laid:
    """The map of one image, on its own grid.

    Attributes
    ----------
    values : NDArray
        ``(*S)`` uint8, 0 to 255.
    picture : NDArray or None
        Of a single image, what it looks like with the map over it, ``(H, W, 3)`` uint8.
    """

    values: NDArray[np.uint8]
    picture: NDArray[np.uint8] | None


@dataclass
class Told(Outcome):
    """What became of the inputs; `cases` are what the page shows of those that were explained."""

    cases: list[tuple[dict[str, Any], Case]] = field(default_factory=list)
    trust: dict[str, Any] = field(default_factory=dict)


class Explainer(Predictor):
    """A model, ready to be asked and explained.

    Parameters
    ----------
    model : FinishedModel
        From a study.
    runtime : Runtime
        The machine.
    how : How
        What is to be shown.

    Raises
    ------
    PlanError
        Nothing of the model's task can be shown, or the method does not do its network.
    """

    def __init__(self, model: FinishedModel, runtime: Runtime, how: How) -> None:
        super().__init__(model, runtime)
        self._how = how
        task = self.plan.task
        if task.has_boxes:
            raise PlanError(
                "maps are made for classifications and segmentations",
                value=task.kind,
                fix="Use fedward-client predict, which draws no map",
                where="task.kind",
            )
        self._maps = None if task.spec.dense else self._explained(self.network)
        self._strangers: dict[str, Explained] = {}
        self._alike: dict[str, list[float]] = {"head": [], "all": []}

    def explain(
        self, number: int, image: Image, prep: Preprocessing, row: Row | None, truth: Truth
    ) -> tuple[Answer, Case, Laid]:
        """Answer for one decoded image, its file's `number`, and show why.

        Raises
        ------
        DataError
            It cannot be prepared, or the model gives no finite number on it.
        """
        answer = self(image, prep, row)
        mask = None if truth.mask is None else truth.mask()
        task = self.plan.task
        with one_torch_thread():
            marked = task if task.spec.dense else _finding(task)
            prepared = prepare_image(image, mask, marked, prep)
        inputs = torch.from_numpy(prepared.pixels[None])
        if self._maps is None:
            figures, found = self._unsure(answer, image, inputs, mask, prep)
            shown = pictures(prepared.pixels, found, self._as_prepared(answer, image, prep))
        else:
            beside = None if row is None else torch.from_numpy(row[None]).to(self.device)
            inside = None if prepared.mask is None else prepared.mask > 0
            figures, found = self._why(
                self._maps, answer, inputs.to(self.device), beside, truth, inside
            )
            shown = pictures(prepared.pixels, found, None)
        on_image = _on_image(found, image, prep)
        picture = None
        if task.dimensions == 2:
            grey = as_bytes(to_unit(image, prep)[0])
            picture = overlaid(grey[: 3 if len(grey) == 3 else 1], on_image)
        laid = Laid(np.asarray(np.rint(on_image * 255), np.uint8), picture)
        return answer, Case(number, figures, shown), laid

    def _why(
        self,
        maps: Explained,
        answer: Answer,
        inputs: torch.Tensor,
        row: torch.Tensor | None,
        truth: Truth,
        inside: NDArray[np.bool_] | None,
    ) -> tuple[dict[str, Any], NDArray[np.float32]]:
        task, likely = self.plan.task, answer.probabilities
        number = int(likely.argmax()) if self._how.shown is None else self._how.shown
        raw = maps(inputs, number, row)
        if not np.isfinite(raw).all():
            raise DataError("the map has no finite numbers", fix="Choose another --method")
        figures: dict[str, Any] = {
            "prediction": _names(task, _decided(task, likely)),
            "explained": task.classes[number],
            "probability": float(likely[number]),
            "uncertainty": _unsure_of(task, likely),
        }
        if truth.label is not None:
            figures |= {"label": _names(task, _indices(task, truth.label))}
            figures["error"] = _error(task, likely, truth.label)
        if self._how.trust:
            areas = deletion_and_insertion(
                lambda images: maps.probabilities(images, row)[:, number], inputs, raw
            )
            figures["deletion"], figures["insertion"] = areas
            if inside is not None and inside.any():
                figures["points_at"], figures["inside"] = points_at(raw, inside)
            self._compare(raw, inputs, number, row)
        return figures, scaled(raw)

    def _unsure(
        self,
        answer: Answer,
        image: Image,
        inputs: torch.Tensor,
        mask: NDArray[np.uint8] | None,
        prep: Preprocessing,
    ) -> tuple[dict[str, Any], NDArray[np.float32]]:
        task = self.plan.task
        found, marked = mirrored(self.probabilities, inputs)
        figures: dict[str, Any] = {
            "prediction": [name for name, n in zip(task.classes, answer.voxels, strict=True) if n],
            "uncertainty": float(found[marked].mean()) if marked.any() else 0.0,
        }
        if mask is not None and answer.labels is not None:
            right = np.asarray(mask != 0, np.uint8) if len(task.classes) == 1 else mask
            dice = _dice(answer.labels, right, len(task.classes))
            present = np.unique(right[right > 0])
            figures["label"] = [task.classes[int(k) - 1] for k in present]
            figures["dice"] = dict(zip(task.classes, dice, strict=True))
            known = [value for value in dice if value is not None]
            figures["error"] = 1 - mean(known) if known else 0.0
            if self._how.trust:
                wrong = answer.labels != right
                figures["tells_wrong"] = tells_wrong(_on_image(found, image, prep), wrong)
        return figures, found

    def _as_prepared(
        self, answer: Answer, image: Image, prep: Preprocessing
    ) -> NDArray[np.uint8] | None:
        """What the model marked, as it sees the image."""
        with one_torch_thread():
            return prepare_image(image, answer.labels, self.plan.task, prep).mask

    def _explained(self, network: torch.nn.Module) -> Explained:
        return Explained(self.plan, network, self._how.method)

    def _compare(
        self,
        raw: NDArray[np.float32],
        inputs: torch.Tensor,
        number: int,
        row: torch.Tensor | None,
    ) -> None:
        """Hold a map against those of networks that learnt nothing."""
        for name, known in self._alike.items():
            if len(known) >= _CHECKED:
                continue
            if name not in self._strangers:
                other = randomised(self.plan, self.network, head_alone=name == "head")
                self._strangers[name] = self._explained(other.to(self.device))
            told = likeness(raw, self._strangers[name](inputs, number, row))
            if told is not None and math.isfinite(told):
                known.append(told)

    def sanity(self) -> dict[str, Any]:
        """The median likeness of maps to those of randomised networks, and of how many images."""
        return {
            name: {"likeness": median(known), "images": len(known)}
            for name, known in self._alike.items()
            if known
        }


def _finding(task: Task) -> Task:
    return task.model_copy(update={"kind": "segmentation", "classes": ("finding",)})


def _on_image(found: NDArray[np.float32], image: Image, prep: Preprocessing) -> NDArray[Any]:
    shape = image.pixels.shape[1:]
    if image.region is None:
        return restore_layer(found, shape, image.spacing, prep).clip(0, 1)
    whole = np.zeros(shape, np.float32)
    inner = whole[image.region]
    inner[...] = restore_layer(found, inner.shape, image.spacing, prep).clip(0, 1)
    return whole


def _decided(task: Task, likely: NDArray[np.float64]) -> list[int]:
    if task.multi_label:
        return [int(k) for k in np.flatnonzero(likely >= _YES)]
    return [int(likely.argmax())]


def _indices(task: Task, label: tuple[int, ...]) -> list[int]:
    return [k for k, flag in enumerate(label) if flag] if task.multi_label else list(label)


def _names(task: Task, numbers: Sequence[int]) -> list[str]:
    return [task.classes[k] for k in numbers]


def _unsure_of(task: Task, likely: NDArray[np.float64]) -> float:
    """Entropy of the answer, 0 to 1; of several labels the least sure one's."""
    if task.multi_label:
        return float(entropy(np.stack([likely, 1 - likely])).max())
    return float(entropy(likely))


def _error(task: Task, likely: NDArray[np.float64], label: tuple[int, ...]) -> float:
    """How far the answer is from the label, 0 to 1; of several labels the worst one's."""
    if task.multi_label:
        return float(np.abs(likely - np.asarray(label)).max())
    return float(1 - likely[label[0]])


def _dice(guess: NDArray[np.uint8], right: NDArray[np.uint8], classes: int) -> list[float | None]:
    found: list[float | None] = []
    for k in range(1, classes + 1):
        one, other = guess == k, right == k
        size = int(np.count_nonzero(one)) + int(np.count_nonzero(other))
        found.append(2 * int(np.count_nonzero(one & other)) / size if size else None)
    return found


def explain(
    wish: Wish,
    found: Found,
    runtime: Runtime,
    how: How,
    tell: Callable[[int, int, str], None] = lambda done, of, name: None,
) -> Told:
    """Explain every input, and write maps, ``explain.json`` and the page.

    Whatever ends the work, page and figures hold what was done.

    Parameters
    ----------
    wish : Wish
        Model, folder and choices.
    found : Found
        The inputs.
    runtime : Runtime
        The machine.
    how : How
        What is to be shown.
    tell : callable
        Hears how many are done, of how many, and which is next.

    Raises
    ------
    OutputError
        The folder cannot be written.
    PlanError
        Nothing of the model's task can be shown, or the method does not do its network.
    """
    from fedward_client.explain.page import page_of

    explainer = Explainer(wish.model, runtime, how)
    try:
        wish.out.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(error.strerror) from None
    told = Told()
    try:
        for number, source in enumerate(found.sources):
            tell(number, len(found.sources), source.name)
            record, cases = _explained(wish, explainer, source, how)
            told.records.append(record)
            told.cases += [(record, case) for case in cases]
    finally:
        told.records += [refused(one.name, one.reason) for one in found.left_out]
        told.trust = summary([case.figures for _, case in told.cases], explainer.sanity())
        content = {
            "stays": "of patients; stays at the hospital",
            **about(wish.model),
            "map": shown_by(wish.model, how),
            "trust": told.trust,
            "inputs": told.records,
        }
        write_json(wish.out / "explain.json", content)
        write_private(wish.out / "explain.html", page_of(wish.model, how, told).encode())
    return told


def _explained(
    wish: Wish, explainer: Explainer, source: Source, how: How
) -> tuple[dict[str, Any], list[Case]]:
    """One input from its files to its maps on the disk; a bad one is refused by name."""
    try:
        with quiet():
            return _results(wish, explainer, source, how)
    except DataError as error:
        reason = error.rule
    except OutputError:
        raise
    except Exception as error:  # whatever a decoder raises on a broken file
        reason = rule_codes.reason_of(error)
    return refused(source.name, reason, source.patient), []


def _results(
    wish: Wish, explainer: Explainer, source: Source, how: How
) -> tuple[dict[str, Any], list[Case]]:
    plan, prep = wish.model.plan, wish.model.plan.preprocessing
    marks: dict[str, None] = {}
    weigh(by_header(source, plan), wish.force, marks)
    if wish.force:
        prep = prep.model_copy(update={"gantry_tilt": "correct"})
    answers: list[Answer] = []
    cases: list[Case] = []
    laid: list[Laid] = []
    row, keys = wish.row(source), keys_of(source)
    for number, (key, image) in enumerate(zip(keys, source.images(), strict=True)):
        if plan.preprocessing.channel and source.name in wish.channels:
            image = planes_of(image, wish.channels[source.name])
        weigh(by_image(image, plan), wish.force, marks)
        answer, case, over = explainer.explain(
            number, image, prep, row, how.truths.get(key, UNKNOWN)
        )
        answers.append(answer)
        cases.append(case)
        laid.append(over)
    content = source.mask([one.values for one in laid])
    files = {"map": write_into(wish.out, "maps", source.stem + source.mask_suffix, content)}
    if isinstance(source, DicomSource) and wish.dicom:
        from fedward_client.predict.objects import Shown, make_objects

        shown = Shown(
            shown_by(wish.model, how),
            tuple(case.figures.get("explained") for case in cases),
            tuple(one.values for one in laid),
            tuple(one.picture for one in laid if one.picture is not None),
        )
        made, wrong = make_objects(wish.model, source, answers, tuple(marks), shown)
        marks |= dict.fromkeys(wrong)
        for one in made:
            name = f"{source.stem}.{one.kind}.dcm"
            files[one.kind] = write_into(wish.out, "dicom", name, one.file)
    record = {
        "name": source.name,
        "patient": source.patient,
        "state": "marked" if marks else "predicted",
        "marks": list(marks),
        "images": [
            figures_of(plan, answer) | case.figures
            for answer, case in zip(answers, cases, strict=True)
        ],
        "files": files,
    }
    return record, cases


def summary(figures: Sequence[Mapping[str, Any]], sanity: Mapping[str, Any]) -> dict[str, Any]:
    """What the maps of all images are worth: means, each with the number of images behind it."""
    told: dict[str, Any] = {}
    for name in ("deletion", "insertion", "points_at", "inside", "tells_wrong"):
        values = [float(one[name]) for one in figures if one.get(name) is not None]
        if values:
            told[name] = {"mean": mean(values), "images": len(values)}
    known = [one for one in figures if "error" in one]
    errors, unsure = (np.array([one[name] for one in known]) for name in ("error", "uncertainty"))
    if len(known) > 2 and (alike := likeness(errors, unsure)) is not None:
        told["error_with_uncertainty"] = {"rank_correlation": alike, "images": len(known)}
    if sanity:
        told["randomised"] = dict(sanity)
    return told


def shown_by(model: FinishedModel, how: How) -> str:
    """What the maps of a model are, in a word."""
    return UNCERTAINTY if model.plan.task.spec.dense else how.method
