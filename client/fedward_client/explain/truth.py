"""What is known of images that are explained: their labels, their masks, where findings are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.readers.dicom.reader import DicomFrame, DicomVolume
from fedward_client.data.readers.nifti import NiftiImage
from fedward_client.predict.inputs import DicomSource, NiftiSource, Source

Mask = Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True)
class Truth:
    """Of one image; None where it is not known.

    Attributes
    ----------
    label : tuple of int or None
        As in :class:`fedward_client.data.sample.Sample`.
    mask : callable or None
        Of a segmentation, its label map on the decoded image; of a classification, where a finding
        is, whatever its class.
    """

    label: tuple[int, ...] | None = None
    mask: Mask | None = None


UNKNOWN = Truth()


def truths(spec: DatasetSpec, task: Task) -> Mapping[str, Truth]:
    """What a dataset tells of its images, by :func:`keys_of`; nothing where it tells nothing.

    Parameters
    ----------
    spec : DatasetSpec
        The dataset.
    task : Task
        The model's. For a classification masks are read too, of a single class.
    """
    anything = task.model_copy(update={"modality": ("any",)})
    found: dict[str, Truth] = {}
    for sample in _samples(spec, anything):
        found[sample.load.identity()] = Truth(sample.label, sample.mask)
    if task.has_labels:
        where = {"kind": "segmentation", "classes": ("finding",), "multi_label": False}
        for sample in _samples(spec, anything.model_copy(update=where)):
            key = sample.load.identity()
            found[key] = replace(found.get(key, UNKNOWN), mask=sample.mask)
    return found


def _samples(spec: DatasetSpec, task: Task) -> tuple[Any, ...]:
    try:
        return read_dataset(spec, task, empty=True).samples
    except DataError:  # no labels, or no masks: then nothing is known of the images
        return ()


def keys_of(source: Source) -> list[str]:
    """What a dataset knows each image of an input by: the identity of what loads it."""
    if isinstance(source, DicomSource):
        if source.volume:
            return [DicomVolume(source.stack.frames).identity()]
        return [DicomFrame(path, frame).identity() for path, frame in source.stack.frames]
    if isinstance(source, NiftiSource) and source.channels is None:
        return [NiftiImage(source.path, source.dimensions).identity()]
    return [source.identity()]
