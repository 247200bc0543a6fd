"""From samples to a :class:`PreparedSite`: decode, preprocess, divide by patient, keep on disk."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from client.data import cache as store
from client.data import reasons
from client.data.quiet import quiet
from client.data.split import split_by_patient
from client.data.transform import Prepared, prepare_image
from client.data.types import SPLITS, PreparedSite, Sample
from fedward.errors import DataError
from fedward.plan.schema import Plan, Preprocessing, Task

_VERSION: Final = 2  # raise it when the arithmetic changes, so that old entries are not used
_ARRAYS: Final = ("images", "targets", "patients", "spacing", "part")


def prepare(
    name: str,
    samples: Sequence[Sample],
    plan: Plan,
    cache: Path | None = None,
    workers: int = 1,
) -> PreparedSite:
    """Decode and preprocess a site's samples and divide them by patient.

    Parameters
    ----------
    name : str
        The site.
    samples : sequence of Sample
        Its images.
    plan : Plan
        ``task``, ``preprocessing`` and ``split`` are used; augmentation is not done here.
    cache : Path, optional
        Folder for prepared arrays; what is there already for the same samples and settings is
        memory-mapped instead of being made again.
    workers : int
        Threads that decode (the codecs release Python's lock for most of their work).

    Raises
    ------
    DataError
        No image could be used, or too few patients are left to divide.
    OutputError
        The cache cannot be written.

    Notes
    -----
    An image that cannot be used is counted in ``left_out``. Arrays from the cache are read-only.
    """
    _known(samples)
    key = _key(samples, plan) if cache is not None else None
    if cache is None or key is None:
        arrays, meta = _build(samples, plan, workers, store.MemoryRows(), store.MemoryRows())
        return _site(name, arrays, meta)
    found = store.load(cache / key, _ARRAYS)
    if found is None:
        _fill(cache, key, samples, plan, workers)
        found = store.load(cache / key, _ARRAYS)
    if found is None:
        raise DataError("a prepared dataset must stay in its cache", fix="Start again")
    return _site(name, found.arrays, found.meta)


def _known(samples: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("a site must have images", value="none", fix="Check its dataset")


def _build(
    samples: Sequence[Sample], plan: Plan, workers: int, images: store.Rows, masks: store.Rows
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    kept: list[Sample] = []
    spacing: list[tuple[float, ...]] = []
    left_out: Counter[str] = Counter()
    for sample, item in zip(samples, _prepared(samples, plan, workers), strict=True):
        if isinstance(item, str):
            left_out[item] += 1
            continue
        kept.append(sample)
        spacing.append(item.spacing)
        images.append(item.pixels)
        if item.mask is not None:
            masks.append(item.mask)
    if not kept:
        raise _none_left(left_out)
    arrays = {
        "images": images.finish(),
        "targets": masks.finish() if plan.task.kind == "segmentation" else _targets(kept, plan),
        "patients": _numbers([sample.patient for sample in kept]),
        "spacing": np.array(spacing, np.float32),
        "part": _parts(kept, plan),
    }
    synthetic = any(s.columns.get("synthetic", "").lower() in ("yes", "true", "1") for s in kept)
    return arrays, {"left_out": dict(left_out), "synthetic": synthetic}


def _prepared(samples: Sequence[Sample], plan: Plan, workers: int) -> Iterator[Prepared | str]:
    one = partial(_one, task=plan.task, prep=plan.preprocessing)
    with quiet(), _one_torch_thread():
        if workers <= 1:
            yield from map(one, samples)
            return
        # In portions: all at once would decode faster than they are taken, and fill the memory.
        size = 8 * workers
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(samples), size):
                yield from pool.map(one, samples[start : start + size])


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    # Images are small: handing a part of each to other threads cost 25 times the work itself on
    # two busy cores. `workers` is the way to use more of them.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _one(sample: Sample, task: Task, prep: Preprocessing) -> Prepared | str:
    try:
        if task.kind == "segmentation" and sample.mask is None:
            return reasons.NO_MASK
        if task.kind == "classification" and sample.label is None:
            return reasons.NO_LABEL
        image = sample.load()
        mask = sample.mask() if sample.mask is not None else None
        return prepare_image(image, mask, task, prep)
    except Exception as error:
        # One bad file must not stop a site, whatever its decoder raises.
        return reasons.reason_of(error)


def _targets(kept: Sequence[Sample], plan: Plan) -> NDArray[Any]:
    labels = np.array([sample.label for sample in kept])
    return labels.astype(np.float32) if plan.task.multi_label else labels[:, 0].astype(np.int64)


def _numbers(patients: Sequence[str]) -> NDArray[np.int64]:
    number = {patient: k for k, patient in enumerate(dict.fromkeys(patients))}
    return np.array([number[patient] for patient in patients], np.int64)


def _parts(kept: Sequence[Sample], plan: Plan) -> NDArray[np.int8]:
    # Multi-label: whether there is any finding; each combination by itself would be too rare.
    strata = (
        [max(s.label) if plan.task.multi_label else s.label[0] for s in kept if s.label]
        if plan.task.kind == "classification"
        else None
    )
    patients, given = [s.patient for s in kept], [s.split for s in kept]
    part = np.zeros(len(kept), np.int8)
    for name, indices in split_by_patient(patients, given, plan.split, strata).items():
        part[indices] = SPLITS.index(name)
    return part


def _none_left(left_out: Counter[str]) -> DataError:
    return DataError(
        "a site must have images that can be used",
        value=", ".join(f"{reason}: {n}" for reason, n in sorted(left_out.items())),
        fix="See the reasons on the data page",
    )


def _site(name: str, arrays: Any, meta: Any) -> PreparedSite:
    part = np.asarray(arrays["part"])
    return PreparedSite(
        name=name,
        images=arrays["images"],
        targets=arrays["targets"],
        patients=np.asarray(arrays["patients"]),
        split={s: np.flatnonzero(part == k).astype(np.int64) for k, s in enumerate(SPLITS)},
        spacing=np.asarray(arrays["spacing"]),
        left_out=meta["left_out"],
        synthetic=meta["synthetic"],
    )


def _fill(cache: Path, key: str, samples: Sequence[Sample], plan: Plan, workers: int) -> None:
    segmentation = plan.task.kind == "segmentation"
    with store.building(cache) as temporary, ExitStack() as stack:
        images = stack.enter_context(closing(store.FileRows(temporary / "images.npy")))
        masks: store.Rows = store.MemoryRows()
        if segmentation:
            masks = stack.enter_context(closing(store.FileRows(temporary / "targets.npy")))
        arrays, meta = _build(samples, plan, workers, images, masks)
        small = {k: a for k, a in arrays.items() if not isinstance(a, np.memmap)}
        store.publish(temporary, cache / key, small, meta)


def _key(samples: Sequence[Sample], plan: Plan) -> str | None:
    """SHA-256 of all that the result depends on; None when a sample cannot tell what it is."""
    settings = {
        "version": _VERSION,
        "preprocessing": plan.preprocessing.model_dump(mode="json", exclude={"augmentation"}),
        "task": plan.task.model_dump(mode="json"),
        "split": plan.split.model_dump(mode="json"),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for sample in samples:
        identities = [_identity(part) for part in (sample.load, sample.mask) if part is not None]
        if None in identities:
            return None
        synthetic = sample.columns.get("synthetic", "")
        facts = (sample.patient, sample.label, sample.site, sample.split, synthetic, *identities)
        digest.update(repr(facts).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _identity(part: object) -> str | None:
    identity = getattr(part, "identity", None)
    if identity is None:
        return None
    try:
        return str(identity())
    except OSError:
        return "missing"
