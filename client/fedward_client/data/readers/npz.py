"""Reader for MedMNIST-style ``.npz`` archives.

Keys: ``{part}_images`` and ``{part}_labels`` or ``{part}_masks``, part being train, val or test;
or ``images``, ``labels``, ``masks`` alone. ``{part}_patients`` names the patients; without it each
image counts as a patient. A true ``synthetic`` says that the images are made up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward.rule_codes import RuleCode
from fedward_client.data import labels
from fedward_client.data.label_tables import SPLIT_NAMES
from fedward_client.data.masks import label_map
from fedward_client.data.sample import Dataset, Image, LeftOut, Sample


@dataclass(frozen=True, eq=False)
class ArrayImage:
    """An image that is in memory already; ``stored`` is ``(H, W[, D])``, or with channels last."""

    stored: NDArray[Any]
    dimensions: int

    def __call__(self) -> Image:
        pixels = self.stored[None] if self.stored.ndim == self.dimensions else self._first()
        window = (0.0, 255.0) if self.stored.dtype == np.uint8 else None
        values = np.ascontiguousarray(pixels, np.float32)
        return Image(values, (1.0,) * self.dimensions, window, measured=False)

    def _first(self) -> NDArray[Any]:
        return np.moveaxis(self.stored, -1, 0)

    def identity(self) -> str:
        """A digest of the values."""
        return _digest(self.stored)


@dataclass(frozen=True, eq=False)
class ArrayMask:
    """A label map that is in memory already."""

    stored: NDArray[Any]

    def __call__(self) -> NDArray[np.uint8]:
        return label_map(self.stored)

    def identity(self) -> str:
        """A digest of the values."""
        return _digest(self.stored)


def _digest(array: NDArray[Any]) -> str:
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def read(root: Path, task: Task) -> Dataset:
    """Read an archive (the file, or a folder with one).

    Raises
    ------
    DataError
        The archive cannot be read, or its arrays do not fit each other or the task.
    """
    arrays = _arrays(_file(root))
    synthetic = bool(np.any(arrays.get("synthetic", np.zeros(1))))
    samples: list[Sample] = []
    left_out: list[LeftOut] = []
    for prefix in ("", "train_", "val_", "test_"):
        if f"{prefix}images" in arrays:
            for name, item in _part(arrays, prefix, task, synthetic):
                if isinstance(item, Sample):
                    samples.append(item)
                else:
                    left_out.append(LeftOut(item, name))
    return Dataset(tuple(samples), tuple(left_out))


def is_npz(path: Path) -> bool:
    """Whether the suffix is that of an archive of arrays."""
    return path.suffix.lower() == ".npz"


def _file(root: Path) -> Path:
    if root.is_file():
        return root
    found = sorted(root.glob("*.npz"))
    if len(found) != 1:
        raise DataError(
            "an npz dataset is one .npz file",
            value=f"{len(found)} files",
            fix="Name the file itself, or leave one in the folder",
        )
    return found[0]


def _arrays(file: Path) -> Mapping[str, NDArray[Any]]:
    wanted = ("images", "labels", "masks", "patients", "synthetic")
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as archive:
            arrays = {k: archive[k] for k in archive.files if k.split("_")[-1] in wanted}
    except Exception:
        # zipfile, zlib and numpy each have errors of their own, with the path in the text.
        raise DataError(
            RuleCode.ARCHIVE,
            fix="Write it again with numpy.savez",
        ) from None
    if not any(key.endswith("images") for key in arrays):
        raise DataError(
            "an npz dataset must have images or train_images",
            fix="Name its arrays as MedMNIST does",
        )
    return arrays


def _part(
    arrays: Mapping[str, NDArray[Any]], prefix: str, task: Task, synthetic: bool
) -> Iterator[tuple[str, Sample | str]]:
    images = arrays[f"{prefix}images"]
    kind = task.spec.target
    targets, patients = arrays.get(f"{prefix}{kind}"), arrays.get(f"{prefix}patients")
    _check(images, {kind: targets, "patients": patients}, prefix, task)
    split = SPLIT_NAMES.get(prefix.rstrip("_"))
    columns, known = {"synthetic": "yes"} if synthetic else {}, patients is not None
    for i, image in enumerate(images):
        name = f"{prefix}{i}"
        patient = name if patients is None else str(patients[i].item())
        load = ArrayImage(image, task.dimensions)
        if targets is None:
            yield name, rule_codes.NO_MASK if kind == "masks" else rule_codes.NO_LABEL
        elif kind == "masks":
            mask = ArrayMask(targets[i])
            yield (
                name,
                Sample(patient, load, mask=mask, split=split, columns=columns, patient_known=known),
            )
        else:
            try:
                label = _label(np.atleast_1d(targets[i]), task)
                yield (
                    name,
                    Sample(patient, load, label, split=split, columns=columns, patient_known=known),
                )
            except DataError as error:
                yield name, rule_codes.reason_of(error)


def _check(
    images: NDArray[Any], beside: Mapping[str, NDArray[Any] | None], prefix: str, task: Task
) -> None:
    d = task.dimensions
    if images.ndim != d + 1 and not (images.ndim == d + 2 and images.shape[-1] in (1, 3)):
        raise DataError(
            f"images of a {d}D task are (N, {'H, W' if d == 2 else 'H, W, D'}), or with 1 or 3 "
            "channels last",
            where=f"{prefix}images",
            value=f"{images.ndim} axes",
            fix="Reshape the array or change task.dimensions",
        )
    for name, array in beside.items():
        if array is not None and (array.ndim == 0 or len(array) != len(images)):
            raise DataError(
                f"{name} must have one entry per image",
                where=f"{prefix}{name}",
                value=f"{len(np.atleast_1d(array))} for {len(images)}",
                fix="Write the archive again",
            )


def _label(row: NDArray[Any], task: Task) -> tuple[int, ...]:
    if row.size == 1 and not (task.multi_label and len(task.classes) == 1):
        value = row.reshape(-1)[0]
        whole = row.dtype.kind in "iubf" and float(value).is_integer()
        return labels.label_of_value(str(int(value)) if whole else str(value), task)
    if row.dtype.kind not in "iubf":
        raise rule_codes.unusable(rule_codes.UNKNOWN_CLASS)
    values = [float(v) for v in row.reshape(-1)]
    if not all(v in (0.0, 1.0) for v in values):
        raise rule_codes.unusable(rule_codes.UNKNOWN_CLASS)
    return labels.label_of_flags([int(v) for v in values], task)
