"""HTML contact sheet of a dataset after preprocessing, for use inside the hospital."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from fedward import rule_codes
from fedward.errors import DataError, OutputError
from fedward.files import write_private
from fedward.plan.schema import Preprocessing, Task
from fedward_client.cohort.probe import spread
from fedward_client.data.pictures import COLOURS, PLANES, as_bytes, png, tinted, upright
from fedward_client.data.quiet import quiet
from fedward_client.data.sample import Sample, unnamed
from fedward_client.data.transforms import Prepared, prepare_image

_SIZES: Final = {2: (256, 256), 3: (96, 96, 96)}


@dataclass(frozen=True)
class Tile:
    """One sample on the sheet: its pictures (PNG, base64), one for each plane, and its words."""

    pictures: tuple[tuple[str, str], ...]
    caption: str


def default_preprocessing(task: Task) -> Preprocessing:
    """How images are shown when no plan says it: fitted, from their darkest to their brightest."""
    return Preprocessing(
        size=_SIZES[task.dimensions], resize="fit", intensity="unit", gantry_tilt="correct"
    )


def write_preview(
    out: Path,
    root: Path,
    title: str,
    samples: Sequence[Sample],
    task: Task,
    prep: Preprocessing | None = None,
    most: int = 24,
) -> tuple[int, Counter[str]]:
    """Write the page.

    Parameters
    ----------
    out : Path
        The page, HTML in one file, readable by its owner only.
    root : Path
        The dataset; nothing is ever written into it.
    title : str
        The dataset's name.
    samples : sequence of Sample
        From which `most` are taken, evenly over the classes.
    task : Task
        Class names.
    prep : Preprocessing, optional
        A plan's; without it the images are fitted and shown in their own range.
    most : int
        Samples to show.

    Returns
    -------
    tuple
        How many are shown, and why the others that were tried could not be.

    Raises
    ------
    DataError
        No image could be shown.
    OutputError
        The page would lie in the dataset, or cannot be written.
    """
    check_place(out, root)
    prep = prep or default_preprocessing(task)
    left_out: Counter[str] = Counter()
    tiles = list(_tiles(spread(samples, most), task, prep, left_out))
    if not tiles:
        raise DataError(
            "a preview must have images that can be shown",
            value=", ".join(f"{reason}: {n}" for reason, n in sorted(left_out.items())) or "none",
            fix="See the report for what was left out and why",
        )
    page = _page(title, tiles, task, prep, whose(samples), left_out)
    write_private(out, page.encode())
    return len(tiles), left_out


def whose(samples: Sequence[Sample]) -> str:
    """How many samples of how many patients, or that they name none."""
    if unnamed(samples):
        return f"{len(samples)} samples, which name no patients"
    return f"{len(samples)} samples of {len({one.patient for one in samples})} patients"


def check_place(out: Path, root: Path) -> None:
    """Refuse to write into a dataset.

    Raises
    ------
    OutputError
        The page would lie there, or its folder does not exist.
    """
    if not out.parent.is_dir():
        raise OutputError("the folder of the page must exist", fix="Make it", where="--out")
    if out.is_dir():
        raise OutputError("the page must be a file", fix="Add a file name", where="--out")
    place, source = out.parent.resolve() / out.name, root.resolve()
    if place == source or place.is_relative_to(source) or out.resolve() == source:
        raise OutputError(
            "the page must not lie inside the dataset", fix="Write it elsewhere", where="--out"
        )


def _tiles(
    samples: Sequence[Sample], task: Task, prep: Preprocessing, left_out: Counter[str]
) -> Iterator[Tile]:
    with quiet():
        for sample in samples:
            try:
                mask = sample.mask() if sample.mask is not None else None
                shown = prepare_image(sample.load(), mask, task, prep, sample.boxes)
            except Exception as error:
                # One bad file must not stop the sheet, whatever its decoder raises.
                left_out[rule_codes.reason_of(error)] += 1
                continue
            yield Tile(_pictures(shown), _caption(sample, shown, task))


def _caption(sample: Sample, shown: Prepared, task: Task) -> str:
    if shown.boxes is not None:
        names = [task.classes[int(k) - 1] for k in np.unique(shown.boxes[:, -1]) if k > 0]
    elif task.has_masks:
        labels = [] if shown.mask is None else np.unique(shown.mask).tolist()
        names = [task.classes[k - 1] for k in labels if k > 0]
    elif task.multi_label:
        flags = sample.label or ()
        names = [name for name, flag in zip(task.classes, flags, strict=True) if flag]
    else:
        names = [task.classes[k] for k in sample.label or ()]
    return ", ".join(names) or "none of the classes"


def _pictures(shown: Prepared) -> tuple[tuple[str, str], ...]:
    grey = as_bytes(shown.pixels)
    if grey.ndim == 3:
        picture = tinted(grey, shown.mask)
        return (("", png(picture if shown.boxes is None else _framed(picture, shown.boxes))),)
    found = []
    for axis, plane in enumerate(PLANES):
        middle = grey.shape[axis + 1] // 2
        mask = None if shown.mask is None else upright(shown.mask.take(middle, axis))
        found.append((plane, png(tinted(upright(grey.take(middle, axis + 1)), mask))))
    return tuple(found)


def _framed(picture: NDArray[np.uint8], boxes: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A picture with a frame of one pixel for each box, in the colour of its class."""
    framed = picture.copy()
    for *ends, label in boxes[boxes[:, -1] > 0]:
        low, high = np.floor(ends[:2]).astype(int), np.ceil(ends[2:]).astype(int)
        inner = framed[low[0] : high[0], low[1] : high[1]]
        for edge in (inner[0], inner[-1], inner[:, 0], inner[:, -1]):
            edge[...] = COLOURS[(int(label) - 1) % len(COLOURS)]
    return framed


def _page(
    title: str, tiles: list[Tile], task: Task, prep: Preprocessing, of: str, left_out: Counter[str]
) -> str:
    environment = Environment(
        loader=PackageLoader("fedward_client.cohort"), autoescape=True, undefined=StrictUndefined
    )
    legend = []
    if not task.has_labels:
        legend = [
            (name, "#{:02x}{:02x}{:02x}".format(*COLOURS[k % len(COLOURS)]))
            for k, name in enumerate(task.classes)
        ]
    return environment.get_template("preview.html.jinja").render(
        title=title,
        tiles=tiles,
        legend=legend,
        of=of,
        left_out=sorted(left_out.items()),
        size=" × ".join(map(str, prep.size)),
    )
