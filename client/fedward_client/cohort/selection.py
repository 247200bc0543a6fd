"""Which samples of a cohort a plan selects, and the site's rules for de-identification let through.

A cohort is frozen before there is a plan, and rules may change after it: both are held against the
headers when a study begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.image_filter import accepts
from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode
from fedward_client.cohort.records import FrozenLoad, files_of
from fedward_client.data.channels import ChannelImage
from fedward_client.data.readers.dicom.kinds import ImageOptions, Kind, read_kind
from fedward_client.data.readers.dicom.reader import DicomFrame, DicomVolume
from fedward_client.data.sample import Dataset, LeftOut, Sample


class Kinds:
    """What the headers of samples say, each file read once."""

    def __init__(self) -> None:
        self._known: dict[Path, Kind] = {}

    def __call__(self, sample: Sample) -> Kind | None:
        """Of a sample's first file; None for what is not DICOM, which says nothing."""
        path = _dicom_file(sample.load)
        if path is not None and path not in self._known:
            self._known[path] = read_kind(path)
        return None if path is None else self._known[path]


def _dicom_file(load: Callable[[], Any]) -> Path | None:
    match load:
        case FrozenLoad():
            return _dicom_file(load.load)
        case ChannelImage():
            return _dicom_file(load.parts[0].load)
        case DicomFrame():
            return load.path
        case DicomVolume():
            return load.frames[0][0]
    return None


def selected(samples: Sequence[Sample], plan: Plan, kinds: Kinds) -> tuple[Sample, ...]:
    """The samples whose headers fit the plan's patterns; what is not DICOM fits any."""
    patterns = plan.images.model_dump()
    if not any(patterns.values()):
        return tuple(samples)
    found = ((sample, kinds(sample)) for sample in samples)
    return tuple(s for s, kind in found if kind is None or accepts(patterns, kind.values))


def only_selected(dataset: Dataset, plan: Plan, root: Path) -> Dataset:
    """A dataset without the samples that the plan does not select; these are left out by name."""
    kept = selected(dataset.samples, plan, Kinds())
    if len(kept) == len(dataset.samples):
        return dataset
    chosen = set(map(id, kept))
    others = (sample for sample in dataset.samples if id(sample) not in chosen)
    names = (files_of(sample, root)[0].relative_to(root).as_posix() for sample in others)
    left_out = tuple(LeftOut(rule_codes.NOT_SELECTED, name) for name in names)
    return replace(dataset, samples=kept, left_out=dataset.left_out + left_out)


def deidentified(
    samples: Sequence[Sample], options: ImageOptions, kinds: Kinds, where: str
) -> tuple[Sample, ...]:
    """The samples that the site's rules for de-identification let through.

    Raises
    ------
    DataError
        One breaks a rule, and the rule is to refuse the cohort.
    """
    if set(options.rules.values()) == {"keep"}:
        return tuple(samples)
    found = [(s, kind.identified(options) if (kind := kinds(s)) else "") for s in samples]
    if any(reason in options.refused for _, reason in found):
        raise DataError(
            RuleCode.DEIDENTIFIED,
            value=f"{sum(reason in options.refused for _, reason in found)} images",
            fix="De-identify them, take them out, or choose another rule",
            where=where,
        )
    return tuple(sample for sample, reason in found if not reason)
