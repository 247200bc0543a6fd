"""Predict image by image: done as it goes, taken up again where it broke off."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.errors import DataError, OutputError
from fedward.files import write_private
from fedward.models.finished import FinishedModel
from fedward.plan.schema import Plan, Preprocessing
from fedward.tasks.base import Boxes
from fedward.tasks.detection import SURE
from fedward_client.data.boxes import off_grid
from fedward_client.data.channels import Channels, planes_of
from fedward_client.data.quiet import quiet
from fedward_client.data.restore import restore
from fedward_client.data.sample import Image
from fedward_client.data.table_rows import Row
from fedward_client.data.transforms import factors, grid_for, one_torch_thread, prepare_image
from fedward_client.predict.doubts import by_header, by_image
from fedward_client.predict.inputs import DicomSource, Found, Source
from fedward_client.training.device import autocast, place, place_batch
from fedward_client.training.evaluate import over_windows
from fedward_client.training.runtime import Runtime

NOT_FOR_DIAGNOSIS: Final = "Not for diagnosis."
_JOURNAL: Final = "progress.jsonl"
_NOT_FINITE: Final = "the model gives no finite number"
_CORNERS: Final = ("xmin", "ymin", "xmax", "ymax")
State = str  # "predicted", "marked" or "refused"


@dataclass(frozen=True)
class Answer:
    """What a model says of one image.

    Attributes
    ----------
    probabilities : NDArray
        ``(K,)`` float64 of the classes; of a model that answers for each pixel, or with boxes,
        empty.
    labels : NDArray or None
        The label map on the decoded grid, uint8, where the model answers for each pixel.
    voxels : tuple of int
        Pixels of each class in it.
    size : float or None
        mm² of a pixel, mm³ of a voxel; None where the file does not state it.
    boxes : tuple or None
        Of a model that finds boxes: corners, falling scores and classes (see
        :meth:`fedward.tasks.base.TaskSpec.boxes`), in pixels of the decoded image.
    """

    probabilities: NDArray[np.float64]
    labels: NDArray[np.uint8] | None = None
    voxels: tuple[int, ...] = ()
    size: float | None = None
    boxes: Boxes | None = None


class Predictor:
    """A model, ready to be asked.

    One image at a time: an answer depends on the image, the model and the kind of device alone.

    Parameters
    ----------
    model : FinishedModel
        From a study.
    runtime : Runtime
        The machine.
    """

    def __init__(self, model: FinishedModel, runtime: Runtime) -> None:
        runtime.enter()
        self.plan = model.plan
        self._runtime, self.device = runtime, runtime.torch_device
        self.network = place(model.build(), self.device)

    @torch.no_grad()
    def __call__(self, image: Image, prep: Preprocessing, row: Row | None = None) -> Answer:
        """Predict one decoded image, with its row of the table that the model reads, if any.

        Raises
        ------
        DataError
            It cannot be prepared, or the model gives no finite number on it.
        """
        task = self.plan.task
        with one_torch_thread():
            prepared = prepare_image(image, None, task, prep)
        if task.has_boxes:
            return Answer(np.empty(0), boxes=self._boxes(prepared.pixels, image, prep))
        beside = () if row is None else (torch.from_numpy(row[None]).to(self.device),)
        probabilities = self.probabilities(torch.from_numpy(prepared.pixels[None]), *beside)
        del prepared  # as large as the image, where the plan has patches
        if not np.isfinite(probabilities).all():
            raise DataError(_NOT_FINITE, fix="Do not use the model on such images")
        if not task.spec.dense:
            return Answer(probabilities)
        labels = _on_image(probabilities, image, prep)
        counts = np.bincount(labels.ravel(), minlength=task.outputs)[1:]
        size = float(np.prod(image.spacing)) if image.measured else None
        return Answer(np.empty(0), labels, tuple(int(n) for n in counts), size)

    def _boxes(self, pixels: NDArray[np.float32], image: Image, prep: Preprocessing) -> Boxes:
        """What the network finds on a prepared image, where it is in the decoded one."""
        with autocast(self.device, private=False):
            inputs = place_batch(torch.from_numpy(pixels[None]), self.device)
            output = self.network(inputs).float()
        if not output.isfinite().all():
            raise DataError(_NOT_FINITE, fix="Do not use the model on such images")
        task, shape = self.plan.task, image.pixels.shape[1:]
        start = np.zeros(task.dimensions)
        if image.region is not None:
            start = np.array([part.start or 0 for part in image.region])
            shape = image.pixels[(slice(None), *image.region)].shape[1:]
        corners, scores, classes = task.spec.boxes(task, output)[0]
        sure = scores >= SURE
        grid = grid_for(shape, image.spacing, prep)
        own = off_grid(corners[sure], factors(shape, grid), grid.shape, prep.size)
        own = own.reshape(-1, 2, task.dimensions).clip(0, shape) + start
        return own.reshape(-1, 2 * task.dimensions), scores[sure], classes[sure]

    def probabilities(self, images: torch.Tensor, *beside: torch.Tensor) -> NDArray[Any]:
        """Of one prepared image, as an evaluation computes them; NaN where the network fails."""
        task = self.plan.task
        if self.plan.preprocessing.patch is not None:
            return over_windows(self.plan, self.network, images, self._runtime)
        with autocast(self.device, private=False):
            logits = self.network(place_batch(images, self.device), *beside).float()
        if not logits.isfinite().all():
            return np.full(1, np.nan)
        return np.asarray(task.spec.probabilities(task, logits)[0].cpu().numpy())


def _on_image(probabilities: NDArray[Any], image: Image, prep: Preprocessing) -> NDArray[np.uint8]:
    shape = image.pixels.shape[1:]
    if image.region is None:
        return restore(probabilities, shape, image.spacing, prep)
    labels = np.zeros(shape, np.uint8)
    inner = labels[image.region]
    inner[...] = restore(probabilities, inner.shape, image.spacing, prep)
    return labels


@dataclass
class Outcome:
    """What became of the inputs, in their order.

    Attributes
    ----------
    records : list of dict
        As ``predictions.json`` has them under ``inputs``.
    """

    records: list[dict[str, Any]] = field(default_factory=list)

    def count(self, state: State) -> int:
        """Inputs of which that became."""
        return sum(one["state"] == state for one in self.records)


@dataclass(frozen=True)
class Wish:
    """What is to be done.

    Attributes
    ----------
    model : FinishedModel
        With which.
    path : Path
        Of what.
    out : Path
        Where results go; made if it is not there.
    force : bool
        Whether to predict what the model was not trained for, marked, instead of refusing it.
    dicom : bool
        Whether to write DICOM objects for DICOM inputs.
    rows : mapping
        Of each input by its name what the table says that the model reads, or why it says nothing
        (see :func:`fedward_client.predict.beside.rows_beside`).
    channels : mapping
        Of each input by its name the channels that it has, where they have names; without it the
        planes of a file are the model's channels in their order.
    """

    model: FinishedModel
    path: Path
    out: Path
    force: bool = False
    dicom: bool = True
    rows: Mapping[str, Row | str] = field(default_factory=dict)
    channels: Mapping[str, Channels] = field(default_factory=dict)

    def row(self, source: Source) -> Row | None:
        """What the table says of an input; None where the model reads none.

        Raises
        ------
        DataError
            It says nothing that the model can read.
        """
        if self.model.plan.table is None:
            return None
        row = self.rows.get(source.name, rule_codes.VALUE_MISSING)
        if isinstance(row, str):
            raise rule_codes.unusable(row)
        return row

    def identity(self, source: Source) -> str:
        """A digest that changes when an input or its row does."""
        row, channels = self.rows.get(source.name), self.channels.get(source.name)
        if (row is None or isinstance(row, str)) and channels is None:
            return source.identity()
        told = repr(sorted(channels.items())) if channels else ""
        own = row.tobytes() if isinstance(row, np.ndarray) else b""
        return hashlib.sha256(f"{source.identity()}{told}".encode() + own).hexdigest()


def predict(
    wish: Wish,
    found: Found,
    runtime: Runtime,
    tell: Callable[[int, int, str], None] = lambda done, of, name: None,
) -> Outcome:
    """Predict every input, and write what comes of it.

    Each input is written as soon as it is done. Whatever ends the work, the tables then hold what
    was done, and the same call goes on with the rest.

    Parameters
    ----------
    wish : Wish
        Model, folder and choices.
    found : Found
        The inputs.
    runtime : Runtime
        The machine.
    tell : callable
        Hears how many are done, of how many, and which is next.

    Raises
    ------
    OutputError
        The folder cannot be written, or holds predictions of something else.
    """
    results = Results(wish, runtime)
    outcome = Outcome()
    try:
        for number, source in enumerate(found.sources):
            tell(number, len(found.sources), source.name)
            outcome.records.append(results.of(source))
    finally:
        outcome.records += [refused(one.name, one.reason) for one in found.left_out]
        write_tables(wish, outcome.records)
    return outcome


class Results:
    """A folder of results, to which inputs are added.

    Parameters
    ----------
    wish : Wish
        Model, folder and choices; what tables say of inputs may be replaced.
    runtime : Runtime
        The machine.

    Raises
    ------
    OutputError
        The folder cannot be written, or holds predictions of something else.
    """

    def __init__(self, wish: Wish, runtime: Runtime) -> None:
        self.wish, self._runtime = wish, runtime
        self._journal = _Journal(wish)
        self._predictor: Predictor | None = None

    def known(self, source: Source) -> dict[str, Any] | None:
        """What came of an input that is done and has not changed; refused ones are not done."""
        return self._journal.known(source.name, self.wish.identity(source))

    def of(self, source: Source) -> dict[str, Any]:
        """What came of an input, which is predicted where that is not known."""
        if (record := self.known(source)) is None:
            key = self.wish.identity(source)
            self._predictor = self._predictor or Predictor(self.wish.model, self._runtime)
            record = _predicted(self.wish, self._predictor, source)
            self._journal.add(record | {"key": key})
        return record

    def records(self) -> list[dict[str, Any]]:
        """What came of all inputs that there ever were."""
        return self._journal.records()


def _predicted(wish: Wish, predictor: Predictor, source: Source) -> dict[str, Any]:
    """One input from its files to results on the disk; a bad one is refused by name."""
    try:
        with quiet():
            return _results(wish, predictor, source)
    except DataError as error:
        reason = error.rule
    except OutputError:
        raise
    except Exception as error:  # whatever a decoder raises on a broken file
        reason = rule_codes.reason_of(error)
    return refused(source.name, reason, source.patient)


def refused(name: str, reason: str, patient: str = "") -> dict[str, Any]:
    """The record of an input that was refused."""
    return {"name": name, "patient": patient, "state": "refused", "reason": reason, "images": []}


def _results(wish: Wish, predictor: Predictor, source: Source) -> dict[str, Any]:
    plan = wish.model.plan
    marks: dict[str, None] = {}
    weigh(by_header(source, plan), wish.force, marks)
    prep = plan.preprocessing
    if wish.force:
        prep = prep.model_copy(update={"gantry_tilt": "correct"})
    answers, row = [], wish.row(source)
    for image in source.images():
        if plan.preprocessing.channel and source.name in wish.channels:
            image = planes_of(image, wish.channels[source.name])
        weigh(by_image(image, plan), wish.force, marks)
        answers.append(predictor(image, prep, row))
        del image  # a volume: its pixels make room for what comes of it
    files: dict[str, str] = {}
    if plan.task.spec.dense:
        content = source.mask([one.labels for one in answers if one.labels is not None])
        files["mask"] = write_into(wish.out, "masks", source.stem + source.mask_suffix, content)
    more: dict[str, str] = {}
    if isinstance(source, DicomSource):
        more["study_instance_uid"] = source.header.keys.get("studyinstanceuid", "")
        if wish.dicom:
            from fedward_client.predict.objects import make_objects

            made, wrong = make_objects(wish.model, source, answers, tuple(marks))
            marks |= dict.fromkeys(wrong)
            for one in made:
                name = f"{source.stem}.{one.kind}.dcm"
                files[one.kind] = write_into(wish.out, "dicom", name, one.file)
    return {
        "name": source.name,
        "patient": source.patient,
        "state": "marked" if marks else "predicted",
        "marks": list(marks),
        "images": [figures_of(plan, one) for one in answers],
        "files": files,
        **more,
    }


def weigh(doubts: Iterator[tuple[str, bool]], force: bool, marks: dict[str, None]) -> None:
    """Keep doubts as marks, or refuse the input for one.

    Raises
    ------
    DataError
        The model was not trained for it, and nobody said `force`.
    """
    for doubt, serious in doubts:
        if serious and not force:
            raise DataError(doubt, fix="See that this is the right model, or give --force")
        marks[doubt] = None


def figures_of(plan: Plan, answer: Answer) -> dict[str, Any]:
    """An answer in numbers, by class."""
    classes = plan.task.classes
    if answer.boxes is not None:
        found = [
            {"class": classes[k], "score": float(score)}
            | dict(zip(_CORNERS, map(float, corners[[1, 0, 3, 2]]), strict=True))
            for corners, score, k in zip(*answer.boxes, strict=True)
        ]
        each = np.bincount(answer.boxes[2], minlength=len(classes)).tolist()
        return {"found": dict(zip(classes, each, strict=True)), "boxes": found}
    if answer.labels is None:
        return {"probabilities": dict(zip(classes, answer.probabilities.tolist(), strict=True))}
    made: dict[str, Any] = {"voxels": dict(zip(classes, answer.voxels, strict=True))}
    if answer.size is not None:
        unit = measure(plan)[0]
        values = (n * answer.size * measure(plan)[1] for n in answer.voxels)
        made[unit] = dict(zip(classes, values, strict=True))
    return made


def measure(plan: Plan) -> tuple[str, float]:
    """The unit of what a mask covers, and how much of it a mm³ or a mm² is."""
    return ("ml", 1e-3) if plan.task.dimensions == 3 else ("mm2", 1.0)


def write_into(out: Path, folder: str, name: str, content: bytes) -> str:
    """Write a result into a folder of `out`; its name relative to `out`."""
    place_ = out / folder
    try:
        place_.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise unwritable(error.strerror) from None
    write_private(place_ / name, content)
    return f"{folder}/{name}"


def unwritable(value: object) -> OutputError:
    """The error of a folder that cannot be written."""
    return OutputError(
        "the folder of the predictions must be writable",
        value=value,
        fix="Choose another, or free some space",
        where="--out",
    )


class _Journal:
    """What is done, a line for each input, behind a line that says with what.

    Parameters
    ----------
    wish : Wish
        Model, input and choices: those of an earlier call must be the same.
    """

    def __init__(self, wish: Wish) -> None:
        self._path = wish.out / _JOURNAL
        self._out = wish.out
        head = {
            "model_sha256": wish.model.sha256,
            "input": str(wish.path.resolve()),
            "force": wish.force,
            "dicom": wish.dicom,
            "fedward": version("fedward"),
        }
        self._records: dict[str, dict[str, Any]] = {}
        try:
            wish.out.mkdir(mode=0o700, parents=True, exist_ok=True)
            before, *lines = self._lines() or [head]
            if before != head:
                other = ", ".join(name for name in head if before.get(name) != head[name])
                raise OutputError(
                    "a folder of predictions is of one model, input and release",
                    value=f"another {other}",
                    fix="Choose another folder",
                    where="--out",
                )
            self._records = {one["name"]: one for one in lines}
            # Whole again, without the part of a line that a crash may have left.
            text = "".join(json.dumps(one) + "\n" for one in (head, *lines))
            write_private(self._path, text.encode())
        except OSError as error:
            raise unwritable(error.strerror) from None

    def known(self, name: str, key: str) -> dict[str, Any] | None:
        """The record of an input that is done and has not changed; refused ones are tried again."""
        record = self._records.get(name)
        if record is None or record["key"] != key or record["state"] == "refused":
            return None
        if not all((self._out / file).is_file() for file in record["files"].values()):
            return None
        return {k: v for k, v in record.items() if k != "key"}

    def add(self, record: Mapping[str, Any]) -> None:
        """Remember that an input is done."""
        self._records[record["name"]] = dict(record)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise unwritable(error.strerror) from None

    def records(self) -> list[dict[str, Any]]:
        """All of them, without their keys."""
        known = sorted(self._records.items())
        return [{k: v for k, v in one.items() if k != "key"} for _, one in known]

    def _lines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        with suppress(FileNotFoundError, ValueError), self._path.open(encoding="utf-8") as file:
            found += (json.loads(line) for line in file)
        return found


def write_tables(wish: Wish, records: Sequence[Mapping[str, Any]]) -> None:
    """Write ``predictions.csv`` and ``predictions.json``, and ``boxes.csv`` of a detection."""
    write_private(wish.out / "predictions.csv", _table(wish.model.plan, records).encode())
    if wish.model.plan.task.has_boxes:
        write_private(wish.out / "boxes.csv", _box_table(records).encode())
    write_json(wish.out / "predictions.json", {**about(wish.model), "inputs": records})


def about(model: FinishedModel) -> dict[str, Any]:
    """What results say of the model that they are of."""
    return {
        "use": NOT_FOR_DIAGNOSIS,
        "intended_use": model.plan.study.intended_use,
        "model": {
            "study": model.study,
            "which": model.which,
            "sha256": model.sha256,
            "plan_sha256": model.plan_sha256,
            "synthetic": model.synthetic,
        },
        "fedward": version("fedward"),
        "task": model.plan.task.kind,
        "classes": list(model.plan.task.classes),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write results for their owner alone; names of files may be no Unicode."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_private(path, text.encode("utf-8", "surrogateescape"))


def _table(plan: Plan, records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each image; a refused input has one without numbers."""
    figures: tuple[str, ...] = ("found",) if plan.task.has_boxes else ("probabilities",)
    if plan.task.spec.dense:
        figures = ("voxels", measure(plan)[0])
    cells = [(figure, name) for figure in figures for name in plan.task.classes]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["input", "frame", "patient", "state", *map(" ".join, cells), "remarks", "files"])
    for one in records:
        remarks = one.get("reason") or "; ".join(one.get("marks", ()))
        files = " ".join(one.get("files", {}).values())
        images = one["images"] or [{}]
        for frame, image in enumerate(images, start=1):
            numbers = [_number(image.get(figure, {}).get(name)) for figure, name in cells]
            which = frame if len(images) > 1 else ""
            rows.writerow(
                [one["name"], which, one["patient"], one["state"], *numbers, remarks, files]
            )
    return file.getvalue()


def _box_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each box, as a dataset's ``boxes.csv`` has them, with its score."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["image", "frame", "class", *_CORNERS, "score"])
    for one in records:
        for frame, image in enumerate(one["images"], start=1):
            which = frame if len(one["images"]) > 1 else ""
            for box in image["boxes"]:
                numbers = [f"{box[name]:.2f}" for name in _CORNERS]
                rows.writerow([one["name"], which, box["class"], *numbers, f"{box['score']:.4f}"])
    return file.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"
