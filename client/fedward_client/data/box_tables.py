"""Boxes from a table (CSV or XLSX), a COCO file, or text files as YOLO has them.

A table has a row for each box: the image, its class, and its corners or a corner with width and
height, in pixels from the upper left corner of the image as it is shown. A row without class and
numbers says that its image has no box.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.data.boxes import checked
from fedward_client.data.label_tables import read_rows
from fedward_client.data.options import BOX_TABLES, BoxOptions, LabelOptions, low
from fedward_client.data.sample import BoxRows, LeftOut

_KEYS: Final = ("image", "file", "filename", "file_name", "image_id", "path", "sopinstanceuid")
_CLASSES: Final = ("class", "label", "category", "name", "class_name")
_CORNERS: Final = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x0", "y0", "x1", "y1"),
    ("x1", "y1", "x2", "y2"),
)
_SIDES: Final = (("x", "y", "width", "height"), ("x", "y", "w", "h"))

Shape = tuple[int, ...]
Row = tuple[str, str, tuple[float, ...] | None]  # image, class, corners; None: is not numbers


@dataclass(frozen=True)
class BoxSource:
    """The boxes of a dataset's images.

    Attributes
    ----------
    root, base : Path
        The dataset, and the folder in it in which the images lie.
    task : Task
        Whose classes boxes are of.
    options : BoxOptions
        Where they are told, but not by masks.
    listed : mapping or None
        What a table says, by its names for images; None: there are text files.
    """

    root: Path
    base: Path
    task: Task
    options: BoxOptions
    listed: Mapping[str, BoxRows | str] | None

    @classmethod
    def of(cls, root: Path, base: Path, task: Task, options: BoxOptions) -> BoxSource:
        """Read the table, if there is one; raises DataError as :func:`read_boxes`."""
        listed = None if options.source == "yolo" else read_boxes(root, task, options)
        return cls(root, base, task, options, listed)

    def rows(self, file: Path, keys: Iterable[str], shape: Callable[[], Shape]) -> BoxRows:
        """The boxes of an image, held against its size.

        Parameters
        ----------
        file : Path
            The image.
        keys : iterable of str
            What a table may call it.
        shape : callable
            Gives its rows and columns.

        Raises
        ------
        DataError
            The reason why the image is left out.
        """
        found: BoxRows = ()
        if self.listed is None:
            place = file.relative_to(self.base)
            found = yolo_boxes(self.root, place, self.task, self.options, shape())
        for key in keys:
            own = (self.listed or {}).get(key, ())
            if isinstance(own, str):
                raise rule_codes.unusable(own)
            found += own
        if found:
            checked(found, shape())
        return found

    def idle(self, keys: Iterable[Iterable[str]]) -> tuple[LeftOut, ...]:
        """Names in the table that no image has, of images known by these names."""
        names = {*(self.listed or ())}.difference(*keys)
        return tuple(LeftOut(rule_codes.NO_IMAGE, name) for name in sorted(names))


def read_boxes(root: Path, task: Task, options: BoxOptions) -> dict[str, BoxRows | str]:
    """Boxes of each image by the table's name for it, or the reason why it is left out.

    Raises
    ------
    DataError
        There is no table, it cannot be read, or it lacks a column.
    """
    path = options.table(root)
    if path is None or not path.is_file():
        raise DataError(
            f"boxes must stand in {' or '.join(BOX_TABLES)}",
            fix="Add the table, or name it in boxes.file; for boxes of masks or text files set "
            "boxes.source",
            where=rule_codes.NO_TABLE,
        )
    rows = _of_coco(path) if path.suffix.lower() == ".json" else _of_table(path)
    found: dict[str, BoxRows | str] = {}
    for key, word, corners in rows:
        known = found.setdefault(key, ())
        if isinstance(known, str) or (not word and corners is not None and not corners):
            continue
        found[key] = _with(known, word, corners, task, options)
    return found


def _with(
    known: BoxRows, word: str, corners: tuple[float, ...] | None, task: Task, options: BoxOptions
) -> BoxRows | str:
    if not corners:
        return rule_codes.BOX_NUMBERS
    try:
        place = options.class_of(word, task)
    except DataError as error:
        return rule_codes.reason_of(error)
    if place is None:
        return known
    x0, y0, x1, y1 = corners
    return (*known, (y0, x0, y1, x1, place + 1.0))


def _of_table(path: Path) -> Iterator[Row]:
    header, rows = read_rows(path, LabelOptions())
    names = [low(name) for name in header]
    key = _one_of(path, names, _KEYS, "the image")
    word = _one_of(path, names, _CLASSES, "the class")
    ends = next((one for one in (*_CORNERS, *_SIDES) if all(name in names for name in one)), None)
    if ends is None:
        raise DataError(
            "a table of boxes must have columns of corners",
            value=", ".join(_CORNERS[0]),
            where=path.name,
            fix="Rename its columns so; x, y, width and height will do too",
        )
    places = [names.index(name) for name in ends]
    for cells in rows:
        padded = [*cells, *[""] * (len(header) - len(cells))]
        own = [padded[place].strip() for place in places]
        yield padded[key].strip(), padded[word].strip(), _numbers(own, sides=ends in _SIDES)


def _one_of(path: Path, names: Sequence[str], wanted: Sequence[str], what: str) -> int:
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise DataError(
            f"a table of boxes must have a column of {what}",
            value=wanted[0],
            where=path.name,
            fix="Rename its column so",
        )
    return names.index(found)


def _numbers(cells: Sequence[Any], *, sides: bool) -> tuple[float, ...] | None:
    """Corners; () where all cells are empty, None where one is no number."""
    if not any(str(cell) for cell in cells):
        return ()
    try:
        a, b, c, d = (float(cell) for cell in cells)
    except (TypeError, ValueError):
        return None
    return (a, b, a + c, b + d) if sides else (a, b, c, d)


def _of_coco(path: Path) -> Iterator[Row]:
    """COCO's format (cocodataset.org): boxes of crowds do not count."""
    try:
        told = json.loads(path.read_bytes())
        names = {one["id"]: str(one["name"]) for one in told["categories"]}
        images = {one["id"]: str(one["file_name"]) for one in told["images"]}
        rows: list[Row] = [(name, "", ()) for name in images.values()]
        for one in told["annotations"]:
            if not one.get("iscrowd"):
                word = names.get(one["category_id"], "")
                rows.append((images[one["image_id"]], word, _numbers(one["bbox"], sides=True)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # The error's own text may quote a name.
        raise DataError(
            "must be a readable COCO file", where=path.name, fix="Export it again"
        ) from None
    return iter(rows)


def yolo_boxes(root: Path, image: Path, task: Task, options: BoxOptions, shape: Shape) -> BoxRows:
    """Boxes of one image from its text file; none where there is no file.

    Parameters
    ----------
    root : Path
        The dataset, with ``labels/`` in it.
    image : Path
        Where the image lies, within ``images/``.
    shape : tuple of int
        Its rows and columns.

    Raises
    ------
    DataError
        The dataset has no ``labels/``; or "unknown class" or "box is not numbers".
    """
    if not (root / "labels").is_dir():
        raise DataError(
            "boxes in text files must lie in labels/",
            fix="Add the folder, or set boxes.source",
            where=rule_codes.NO_TABLE,
        )
    text = ""
    with suppress(FileNotFoundError):
        text = (root / "labels" / image).with_suffix(".txt").read_text("utf-8", "replace")
    found = []
    for line in filter(str.strip, text.splitlines()):
        word, *cells = line.split()
        ends = _numbers(cells, sides=True) if len(cells) == 4 else None
        if not ends:
            raise rule_codes.unusable(rule_codes.BOX_NUMBERS)
        if (place := options.class_of(word, task)) is not None:
            x0, y0, x1, y1 = ends  # of a box whose middle, not whose corner, was told
            dx, dy = (x1 - x0) / 2, (y1 - y0) / 2
            low, high = (y0 - dy, x0 - dx), (y1 - dy, x1 - dx)
            corners = (
                end * side for pair in (low, high) for end, side in zip(pair, shape, strict=True)
            )
            found.append((*corners, place + 1.0))
    return tuple(found)
