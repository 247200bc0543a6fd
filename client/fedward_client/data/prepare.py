"""Prepare samples for training: decode, preprocess, divide by patient, cache."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Plan
from fedward.rule_codes import RuleCode
from fedward_client.data import cache as store
from fedward_client.data.readers.npz import ArrayImage
from fedward_client.data.sample import SPLITS, PreparedSite, Sample, unnamed
from fedward_client.data.split import split_by_patient
from fedward_client.data.table_rows import Row, rows_of
from fedward_client.data.transforms import (
    Job,
    Outcome,
    Prepared,
    one_torch_thread,
    prepare_sample,
)
from fedward_client.data.volumes import Volumes, apart
from fedward_client.worker_pool import WorkerPool

_VERSION: Final = 9  # raise it when the arithmetic changes, so that old entries are not used
_FOR_SLICE: Final = 0.5  # seconds that a volume may take for each of its slices
_ARRAYS: Final = ("images", "targets", "patients", "spacing", "part")
_TABLE: Final = "table"
_OF_VOLUMES: Final = (*sorted(store.FLAT), *_ARRAYS[2:], "shapes", "own", "sides", "marked")


@dataclass(frozen=True)
class Means:
    """What a preparation may use beside this process.

    Attributes
    ----------
    threads : int
        That decode in this process (the codecs release Python's lock for most of their work);
        without `crew` only.
    crew : Crew, optional
        Processes that decode instead: what hangs or dies costs its sample and nothing else.
    cache_bytes : int, optional
        That the cache may take; entries used longest ago make room.
    verify : callable, optional
        Called when all is decoded and before it is kept; raises when a file was changed meanwhile.
    """

    threads: int = 1
    crew: WorkerPool[Job, Outcome] | None = None
    cache_bytes: int | None = None
    verify: Callable[[], None] | None = None


_ALONE: Final = Means()


def prepare(
    name: str,
    samples: Sequence[Sample],
    plan: Plan,
    cache: Path | None = None,
    means: Means = _ALONE,
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
    means : Means, optional
        Threads, processes, and bounds.

    Raises
    ------
    DataError
        No image could be used, too few patients are left to divide, or the table of labels lacks a
        column of the plan's.
    OutputError
        The cache cannot be written, or has no room.

    Notes
    -----
    An image that cannot be used is counted in ``left_out``. Arrays from the cache are read-only.
    """
    _known(samples)
    key = _key(samples, plan) if cache is not None else None
    if cache is None or key is None:
        in_memory = store.MemoryRows if plan.preprocessing.patch is None else store.FlatMemory
        arrays, meta = _build(samples, plan, means, lambda _: in_memory())
        return _site(name, arrays, meta, samples)
    found = store.load(cache / key, _arrays(plan)) or _fill(cache / key, samples, plan, means)
    if found is None:
        raise DataError(RuleCode.CACHE_KEPT, fix="Start again")
    return _site(name, found.arrays, found.meta, samples)


def _arrays(plan: Plan) -> tuple[str, ...]:
    names = _ARRAYS if plan.preprocessing.patch is None else _OF_VOLUMES
    return names if plan.table is None else (*names, _TABLE)


def _rows(samples: Sequence[Sample], plan: Plan) -> Sequence[Row | str]:
    """What the plan's table says of each sample, or why it is left out; empty without a table."""
    if plan.table is None:
        return [np.zeros(0, np.float32)] * len(samples)
    return rows_of(plan.table, [sample.columns for sample in samples])


def _known(samples: Sequence[Sample]) -> None:
    if not samples:
        raise DataError(RuleCode.IMAGES, value="none", fix="Check its dataset")


def _build(
    samples: Sequence[Sample], plan: Plan, means: Means, make: Callable[[str], store.Rows]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    rows: dict[str, store.Rows] = {}
    kept: list[Sample] = []
    small: list[dict[str, NDArray[Any]]] = []
    left_out: Counter[str] = Counter()
    cut = 0
    beside: list[Row] = []
    pairs: list[tuple[Sample, Row]] = []
    for sample, row in zip(samples, _rows(samples, plan), strict=True):
        if isinstance(row, str):
            left_out[row] += 1
        else:
            pairs.append((sample, row))
    prepared = _prepared([sample for sample, _ in pairs], plan, means)
    for (sample, row), item in zip(pairs, prepared, strict=True):
        if isinstance(item, str):
            left_out[item] += 1
            continue
        kept.append(sample)
        beside.append(row)
        cut += item.lost == 1
        small.append(_small(item))
        for name, row in _large(item):
            if name not in rows:
                rows[name] = make(name)
            rows[name].append(row)
    if not kept:
        raise _none_left(left_out)
    arrays = {
        **({"targets": _targets(kept, plan)} if plan.task.has_labels else {}),
        **{name: own.finish() for name, own in rows.items()},
        **{name: np.stack([one[name] for one in small]) for name in small[0]},
        **({} if plan.table is None else {_TABLE: np.stack(beside)}),
        "patients": _numbers([sample.patient for sample in kept]),
        "part": _parts(kept, plan),
    }
    synthetic = any(s.columns.get("synthetic", "").lower() in ("yes", "true", "1") for s in kept)
    return arrays, {"left_out": dict(left_out), "synthetic": synthetic, "cut": cut}


def _large(item: Prepared) -> Iterator[tuple[str, NDArray[Any]]]:
    """What is written image by image: the pixels and the masks."""
    if item.whole is not None and item.mask is not None:
        yield from (("voxels", item.pixels), ("labels", item.mask), ("truth", item.whole.truth))
        return
    yield "images", item.pixels
    for target in (item.mask, item.boxes):
        if target is not None:
            yield "targets", target


def _small(item: Prepared) -> dict[str, NDArray[Any]]:
    """What stays in memory until all images are prepared."""
    facts: dict[str, NDArray[Any]] = {"spacing": np.array(item.spacing, np.float32)}
    if item.whole is not None:
        facts["shapes"] = np.array(item.pixels.shape, np.int64)
        facts["own"] = np.array(item.whole.truth.shape, np.int64)
        facts["sides"] = np.array(item.whole.sides, np.int64)
        facts["marked"] = item.whole.marked
    return facts


def _prepared(samples: Sequence[Sample], plan: Plan, means: Means) -> Iterator[Outcome]:
    jobs = (Job(sample, plan.task, plan.preprocessing) for sample in samples)
    if not samples:
        return
    if means.crew is not None and not _in_memory(samples[0]):
        for outcome in means.crew.in_order(jobs, _patience):
            yield rule_codes.DECODER_FAILED if outcome is None else outcome
        return
    with one_torch_thread():
        if means.threads <= 1:
            yield from map(prepare_sample, jobs)
            return
        # In portions: all at once would decode faster than they are taken, and fill the memory.
        with ThreadPoolExecutor(means.threads) as pool:
            while portion := list(islice(jobs, 8 * means.threads)):
                yield from pool.map(prepare_sample, portion)


def _in_memory(sample: Sample) -> bool:
    """Whether there is nothing to decode, and a process would only be sent a copy."""
    return isinstance(getattr(sample.load, "load", sample.load), ArrayImage)


def _patience(job: Job) -> float:
    """Seconds beside those for one file: a volume is read from many."""
    load = getattr(job.sample.load, "load", job.sample.load)
    return _FOR_SLICE * len(getattr(load, "frames", ()))


def _targets(kept: Sequence[Sample], plan: Plan) -> NDArray[Any]:
    labels = np.array([sample.label for sample in kept])
    return labels.astype(np.float32) if plan.task.multi_label else labels[:, 0].astype(np.int64)


def _numbers(patients: Sequence[str]) -> NDArray[np.int64]:
    number = {patient: k for k, patient in enumerate(dict.fromkeys(patients))}
    return np.array([number[patient] for patient in patients], np.int64)


def _parts(kept: Sequence[Sample], plan: Plan) -> NDArray[np.int8]:
    strata = plan.task.spec.strata(plan.task, [s.label for s in kept if s.label])
    patients, given = [s.patient for s in kept], [s.split for s in kept]
    part = np.zeros(len(kept), np.int8)
    for name, indices in split_by_patient(patients, given, plan.split, strata).items():
        part[indices] = SPLITS.index(name)
    return part


def _none_left(left_out: Counter[str]) -> DataError:
    return DataError(
        RuleCode.IMAGES_USABLE,
        values={"reasons": tuple(sorted(left_out))},
        value=", ".join(f"{reason}: {n}" for reason, n in sorted(left_out.items())),
        fix="See the reasons on the data page",
    )


def _site(name: str, arrays: Any, meta: Any, samples: Sequence[Sample]) -> PreparedSite:
    part, volumes = np.asarray(arrays["part"]), None
    if "voxels" in arrays:
        shapes = np.asarray(arrays["shapes"])
        images = apart(arrays["voxels"], shapes)
        targets = apart(arrays["labels"], shapes[:, 1:])
        truth = apart(arrays["truth"], np.asarray(arrays["own"]))
        volumes = Volumes(truth, np.asarray(arrays["sides"]), arrays["marked"])
    else:
        images, targets = arrays["images"], arrays["targets"]
    return PreparedSite(
        name=name,
        images=images,
        targets=targets,
        patients=np.asarray(arrays["patients"]),
        split={s: np.flatnonzero(part == k).astype(np.int64) for k, s in enumerate(SPLITS)},
        spacing=np.asarray(arrays["spacing"]),
        left_out=meta["left_out"],
        synthetic=meta["synthetic"],
        cut=meta["cut"],
        images_are_patients=unnamed(samples) > 0,
        volumes=volumes,
        table=np.asarray(arrays[_TABLE]) if _TABLE in arrays else None,
    )


def _fill(place: Path, samples: Sequence[Sample], plan: Plan, means: Means) -> store.Stored | None:
    # The sizes of whole volumes are known when they are prepared; until then they take no room.
    flat = plan.preprocessing.patch is not None
    size = 0 if flat else prepared_bytes(plan, len(samples))

    def room_for(more: int) -> None:
        with store.alone(place.parent):
            store.make_room(place.parent, more, means.cache_bytes)

    with store.building(place, size, means.cache_bytes) as temporary, ExitStack() as stack:
        if found := store.load(place, _arrays(plan)):  # another process made it meanwhile
            return found

        def rows(name: str) -> store.FileRows:
            path = temporary / f"{name}.npy"
            made = store.FlatRows(path, room_for) if flat else store.FileRows(path, len(samples))
            return stack.enter_context(closing(made))

        arrays, meta = _build(samples, plan, means, rows)
        if means.verify is not None:
            means.verify()
        small = {k: a for k, a in arrays.items() if not isinstance(a, np.memmap)}
        return store.publish(temporary, place, small, meta, _arrays(plan))


def doubts(site: PreparedSite, plan: Plan) -> Iterator[str]:
    """What the plan's sizes do to a site's images that its authors hardly meant."""
    if site.cut:
        yield f"{site.cut} images lost all that is marked in them, as the plan cuts it off"
    size, volumes = plan.preprocessing.size, site.volumes
    if volumes is not None and bool((volumes.sides <= np.array(size)).all()):
        sides = " x ".join(map(str, size))
        yield f"all {len(site.images)} images fit into one patch of {sides}, which cuts nothing out"


def prepared_bytes(plan: Plan, images: int) -> int:
    """Bytes of prepared images (float32) and their labels or masks, each of the plan's size."""
    pixels = int(np.prod(plan.preprocessing.size))
    target = plan.task.spec.target_bytes(plan.task, pixels)
    return images * (4 * plan.preprocessing.channels * pixels + target)


def _key(samples: Sequence[Sample], plan: Plan) -> str | None:
    """SHA-256 of all that the result depends on; None when a sample cannot tell what it is."""
    settings = {
        "version": _VERSION,
        "preprocessing": plan.preprocessing.model_dump(
            mode="json", exclude={"augmentation", "patch"}
        ),
        "task": plan.task.model_dump(mode="json"),
        "split": plan.split.model_dump(mode="json"),
    }
    if plan.preprocessing.patch is not None:
        settings["patch"] = True  # how patches are drawn changes no prepared image
    if plan.table is not None:
        settings["table"] = plan.table.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for sample, row in zip(samples, _rows(samples, plan), strict=True):
        identities = [_identity(part) for part in (sample.load, sample.mask) if part is not None]
        if None in identities:
            return None
        synthetic = sample.columns.get("synthetic", "")
        facts: tuple[object, ...] = (
            sample.patient,
            sample.label,
            sample.site,
            sample.split,
            synthetic,
            *identities,
        )
        facts += () if sample.boxes is None else (sample.boxes,)
        digest.update(repr(facts).encode("utf-8", "surrogateescape"))
        digest.update(row.encode() if isinstance(row, str) else row.tobytes())
    return digest.hexdigest()


def _identity(part: object) -> str | None:
    identity = getattr(part, "identity", None)
    if identity is None:
        return None
    try:
        return str(identity())
    except OSError:
        return "missing"
