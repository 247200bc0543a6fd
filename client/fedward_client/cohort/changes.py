"""What changed between two frozen cohorts of a dataset, in counts of patients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedward.errors import DataError
from fedward_client.cohort.freeze import CohortFile, Item, load
from fedward_client.cohort.open import Restorer, cohort_path
from fedward_client.config import SiteConfig
from fedward_client.secret import Pseudonyms

_Images = Mapping[str, tuple[object, ...]]  # an image's content to what it is labelled with


def since_last(cohort: CohortFile, config: SiteConfig, secret: bytes) -> dict[str, Any] | None:
    """What a new cohort has that the one frozen last had not, and the other way round.

    Parameters
    ----------
    cohort : CohortFile
        Not saved yet.
    config : SiteConfig
        The site.
    secret : bytes
        The site's.

    Returns
    -------
    dict or None
        ``since``, the cohort that it is compared with, and the numbers of patients ``added``,
        ``gone`` and ``relabelled``: with an image that both have and whose label or mask is
        another. None without an earlier cohort that can be read.
    """
    try:
        before = load(cohort_path(config.site.state, cohort.dataset))
    except DataError:
        return None
    was, now = (_patients(one, secret) for one in (before, cohort))
    both = was.keys() & now.keys()
    return {
        "since": before.name,
        "added": len(now.keys() - was.keys()),
        "gone": len(was.keys() - now.keys()),
        "relabelled": sum(_relabelled(was[patient], now[patient]) for patient in both),
    }


def _relabelled(was: _Images, now: _Images) -> bool:
    return any(was[image] != now[image] for image in was.keys() & now.keys())


def _patients(cohort: CohortFile, secret: bytes) -> dict[str, dict[str, tuple[object, ...]]]:
    digests = {key: record.sha256 for key, record in cohort.files.items()}
    hashed = Pseudonyms(secret)
    restorer = Restorer({}, digests, cohort.series, cohort.task.dimensions, hashed)
    found: dict[str, dict[str, tuple[object, ...]]] = {}
    for item in cohort.items:
        images = found.setdefault(item.patient, {})
        images[restorer.content(item.image)] = _target(item, cohort, restorer)
    return found


def _target(item: Item, cohort: CohortFile, restorer: Restorer) -> tuple[object, ...]:
    """A sample's classes by name, since a place in the list of classes may mean another later."""
    classes = cohort.task.classes
    if item.mask is not None:
        return classes, restorer.content(item.mask)
    if item.boxes is not None:
        return tuple((classes[int(row[-1]) - 1], *row[:-1]) for row in item.boxes)
    if item.label is None:
        return ()
    if cohort.task.multi_label:
        return tuple(name for name, flag in zip(classes, item.label, strict=True) if flag)
    return tuple(classes[k] for k in item.label)
