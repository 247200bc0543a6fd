"""Reader for folders of pictures (PNG, JPEG, TIFF, BMP).

* classification: ``CLASS/*.png`` (also ``train/CLASS/*.png`` and so on), or a table of labels with
  a column ``image`` or ``file``, a column ``label`` or one 0/1 column per class, optionally
  ``patient`` and ``split``;
* segmentation: ``images/`` and ``masks/`` with the same stems, or masks beside the images.
* detection: a table of boxes (:mod:`fedward_client.data.box_tables`), text files as YOLO has them,
  or images and masks. An image without boxes has none.

``patients.csv`` (``image``, ``patient``) names the patients, or a folder on each image's path that
the site tells; without any such column or folder each image counts as one
(:mod:`fedward_client.data.patient_columns` has the usual names of the column).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, ImageOps
from PIL import Image as Pillow

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import Task
from fedward_client.data import labels
from fedward_client.data.box_tables import BoxSource
from fedward_client.data.channels import Cases, Channels
from fedward_client.data.files import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    file_identity,
    folder_of,
    folders,
    stem,
    table_keys,
    walk,
)
from fedward_client.data.label_tables import SPLIT_NAMES, Entry, Table, read_table
from fedward_client.data.mask_suffix import (
    common_suffix,
    image_suffix,
    in_words,
    with_word,
    without,
)
from fedward_client.data.masks import label_map
from fedward_client.data.one_folder import one_folder
from fedward_client.data.options import (
    TABLES,
    BoxOptions,
    LabelOptions,
    MaskOptions,
    PatientOptions,
    low,
)
from fedward_client.data.quiet import quiet
from fedward_client.data.sample import BoxRows, Dataset, Image, LeftOut, Sample, SplitName

# Whose the images of a folder are: a table's word, under the site's rules for odd ones.

KEYS: Final = ("image", "file")
_IMAGE: Final = "\\image\\"  # before an image that stands for its patient


@dataclass(frozen=True)
class People:
    """What is known of the patients of a folder.

    Attributes
    ----------
    table : Table or None
        ``patients.csv``; without it, a column of patients beside the labels or a folder for each
        patient, each image counts as a patient.
    options : PatientOptions
        What missing and shared ids mean; a rule for studies or series is one for images here.
    named : str
        The column of the table of labels that names patients too; "" where none does.
    column : str
        The column of patients that the site names; "" where it names none.
    images : str
        The folder of images, below which folders are counted; "" where there is none.
    """

    table: Table | None = None
    options: PatientOptions = field(default_factory=PatientOptions)
    named: str = ""
    column: str = ""
    images: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What tells the patients, in words."""
        if self.options.folder:
            way = f"below {self.images}/" if self.images else "of its path"
            return (f"the patient of an image is folder {self.options.folder} {way}",)
        if column := self.named or (self.table.patients if self.table else ""):
            return (f'the patient of an image is in the column "{column}"',)
        return ()

    def beside(self, labels: Table) -> People:
        """The same beside a table of labels, in whose column of patients no cell may be empty.

        Raises
        ------
        DataError
            No table has the column that the site names.
        """
        self.check(labels)
        named = any(entry.patient for entry in labels.entries.values())
        return replace(self, named=labels.patients if named else "")

    def check(self, *labels: Table) -> None:
        """Hold the tables against the column that the site names.

        Raises
        ------
        DataError
            None of them has it.
        """
        tables = [*labels, *([self.table] if self.table else [])]
        if self.column and low(self.column) not in [table.patients for table in tables]:
            raise DataError(
                "a table must have the column of patients that the site names",
                value=self.column,
                fix="Correct labels.patient_column",
                where="labels.patient_column",
            )

    def knows(self, patient: str) -> bool:
        """Whether :meth:`of` gave a patient's id, and not the image in place of a patient."""
        tells = self.table or self.named or self.options.folder
        return bool(tells) and not patient.startswith(_IMAGE)

    def find(self, keys: tuple[str, ...]) -> Entry | None:
        """What ``patients.csv`` says of an image."""
        return self.table.find(keys) if self.table else None

    def of(self, keys: tuple[str, ...], own: str = "") -> str:
        """The patient of an image: the folder that the site tells, else the label table's word,
        ``patients.csv``, the file.

        Parameters
        ----------
        keys : tuple of str
            What tables may call the image; its own name first.
        own : str
            The label table's word.

        Raises
        ------
        DataError
            "no patient id" or "shared patient id": by the rule the image is left out.
        """
        if self.options.folder:
            own = self._folder(keys[0])
        elif not (own or self.table or self.named):
            return keys[0]
        else:
            own = own or self._listed(keys)
        word = unicodedata.normalize("NFC", own).strip()
        nobody = self.options.nobody(word)
        rule = {"": "keep", "missing": self.options.missing, "shared": self.options.shared}[nobody]
        if rule == "keep":
            return word
        if rule in ("study", "series"):
            return _IMAGE + keys[0]
        raise rule_codes.unusable(
            rule_codes.NO_PATIENT if nobody == "missing" else rule_codes.SHARED_PATIENT
        )

    def _folder(self, name: str) -> str:
        folders = PurePosixPath(name).parts[:-1]
        if self.images and folders[:1] == (self.images,):
            folders = folders[1:]
        return "".join(folders[self.options.folder - 1 : self.options.folder])

    def _listed(self, keys: tuple[str, ...]) -> str:
        entry = self.find(keys)
        return "" if entry is None or entry.reason else entry.patient


def people_of(
    root: Path, options: PatientOptions | None = None, labels: LabelOptions | None = None
) -> People:
    """The patients of a folder, with its ``patients.csv`` where there is one.

    Raises
    ------
    DataError
        The table cannot be read.
    """
    path = root / "patients.csv"
    named = LabelOptions(patient_column=labels.patient_column if labels else "")
    table = read_table(path, KEYS, None, named) if path.is_file() else None
    images = folder_of(root, IMAGE_FOLDERS)
    return People(
        table,
        options or PatientOptions(),
        column=named.patient_column,
        images=images.name if images else "",
    )


# PNG, JPEG, TIFF and BMP files: images and masks.

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
MASK_SUFFIXES: Final = SUFFIXES | {".gif"}  # which loses nothing
_DEEP: Final = ("I", "F")  # 16 bits and more: I;16, I;16B, I, F
_DEEP_GREY: Final = "LA;16B"
_DEEP_COLOURS: Final = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}  # raw modes of Pillow
_PHOTOMETRIC: Final = 262  # of TIFF
_WHITE_IS_ZERO: Final = 0
_TURNED: Final = "white is zero"
_ON_ITS_SIDE: Final = 5  # orientations of EXIF from which on rows and columns are exchanged
_WHITE: Final = np.float32((1 << 16) - 1)


def is_picture(path: Path) -> bool:
    """Whether the suffix is that of a picture."""
    return path.suffix.lower() in SUFFIXES


def is_mask(path: Path) -> bool:
    """Whether the suffix is that of a picture that holds a mask."""
    return path.suffix.lower() in MASK_SUFFIXES


@dataclass(frozen=True)
class Picture:
    """Reads a picture; 8-bit ones propose the window 0 to 255."""

    path: Path

    def __call__(self) -> Image:
        values = _open(self.path, _colours)
        if values.ndim == 3 and (grey := _open(self.path, _grey_bytes)).size:
            values = grey[..., 0] * np.float32(256) + grey[..., 1]
        if values.ndim == 3 and (low := _open(self.path, _low_bytes)).size:
            values = values * np.float32(256) + low
        window = (0.0, 255.0) if values.dtype == np.uint8 else None
        planes = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
        pixels = np.ascontiguousarray(planes, np.float32)
        return Image(pixels, (1.0, 1.0), window, measured=False)

    def identity(self) -> str:
        """A digest of place, size and time of change."""
        return file_identity(self.path)


@dataclass(frozen=True)
class PictureMask:
    """Reads a label map: grey levels, or the indices of a palette.

    Attributes
    ----------
    path : Path
        The mask.
    image : Path or None
        The image (picture or DICOM) whose size it is resized to, by the nearest pixel, where both
        have the same proportions; None: a mask of another size is left as it is.
    """

    path: Path
    image: Path | None = None

    def __call__(self) -> NDArray[np.uint8]:
        values = label_map(_open(self.path, _levels))
        if self.image is None or values.shape == (shape := _shape_of(self.image)):
            return values
        sides = np.array([values.shape, shape])
        # Whole pixels round the proportions, by half of one.
        if 2 * abs(sides[0, 0] * sides[1, 1] - sides[0, 1] * sides[1, 0]) > sides.max():
            raise rule_codes.unusable(rule_codes.MASK_SHAPE)
        turned = Pillow.fromarray(values).resize(shape[::-1], Pillow.Resampling.NEAREST)
        return np.asarray(turned)

    def identity(self) -> str:
        """A digest of place, size and time of change; with the image, where it matters."""
        beside = () if self.image is None else (file_identity(self.image),)
        return file_identity(self.path, *beside)


def _shape_of(path: Path) -> tuple[int, int]:
    """Rows and columns of a picture or a DICOM file, from its header alone."""
    if not is_picture(path):
        from fedward_client.data.readers.dicom.headers import rows_and_columns

        return rows_and_columns(path)
    with quiet():
        try:
            with Pillow.open(path) as file:
                turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= _ON_ITS_SIDE
                return file.size if turned else file.size[::-1]
        except Exception as error:
            raise rule_codes.unusable(rule_codes.reason_of(error)) from None


def _open(path: Path, read: Callable[[Pillow.Image, bool], NDArray[Any]]) -> NDArray[Any]:
    with quiet():
        try:
            with Pillow.open(path) as file:
                if getattr(file, "n_frames", 1) != 1:
                    raise rule_codes.unusable(rule_codes.WRONG_SHAPE)
                lossy = file.format == "JPEG"
                if read in _DEEPER and not _DEEPER[read](file):
                    return np.empty(0)
                file.info[_TURNED] = _is_turned(file)  # the copy below has no tags
                return read(ImageOps.exif_transpose(file), lossy)
        except Exception as error:
            # Pillow raises nearly anything on a broken file, and its texts quote the path.
            raise rule_codes.unusable(rule_codes.reason_of(error)) from None


def _take_low_bytes(file: Pillow.Image) -> bool:
    """Have a PNG of 16 bits a colour, of which Pillow keeps the high bytes, give the low ones."""
    tile = getattr(file, "tile", [])
    if file.format != "PNG" or len(tile) != 1 or tile[0].args not in _DEEP_COLOURS:
        return False
    file.tile = [tile[0]._replace(args=_DEEP_COLOURS[tile[0].args])]  # type: ignore[attr-defined]
    return True


def _low_bytes(image: Pillow.Image, lossy: bool) -> NDArray[Any]:
    return _colours(image, lossy)


def _take_grey_bytes(file: Pillow.Image) -> bool:
    """Have a PNG of 16 bits of grey with alpha, of which Pillow keeps the high bytes, give all.

    Pillow reads it as colours with alpha; so its four bytes a pixel come as they are.
    """
    tile = getattr(file, "tile", [])
    if file.format != "PNG" or len(tile) != 1 or tile[0].args != _DEEP_GREY:
        return False
    file.tile = [tile[0]._replace(args="RGBA")]  # type: ignore[attr-defined]
    return True


def _grey_bytes(image: Pillow.Image, lossy: bool) -> NDArray[Any]:
    return np.asarray(image)


_DEEPER: Final = {_low_bytes: _take_low_bytes, _grey_bytes: _take_grey_bytes}


def _colours(image: Pillow.Image, lossy: bool) -> NDArray[Any]:
    if image.mode.startswith(_DEEP):
        values = np.asarray(image).astype(np.float32)
        return _WHITE - values if image.info.get(_TURNED) else values
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("LA" if "A" in image.mode.upper() else "L").getchannel(0))
    if image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA":
        image = image.convert("RGBA")
    return np.asarray(_without_alpha(image).convert("RGB"))


def _is_turned(image: Pillow.Image) -> bool:
    """Whether white is 0 in a TIFF of 16 bits; Pillow turns those of 8 bits itself."""
    tags = getattr(image, "tag_v2", {})
    return image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _without_alpha(image: Pillow.Image) -> Pillow.Image:
    # Dropped, not blended: what lies under a transparent pixel is still the image.
    if image.mode in ("RGBA", "RGBX"):
        return Pillow.merge("RGB", image.split()[:3])
    return image


def _levels(image: Pillow.Image, lossy: bool) -> NDArray[Any]:
    if lossy or image.mode == "1":
        # Lossy files blur the edge of a mask: only black and white can be told apart.
        return (np.asarray(image.convert("L")) >= 128).astype(np.uint8) * np.uint8(255)
    if image.mode in ("P", "L") or image.mode.startswith(_DEEP):
        return np.asarray(image)
    bands = np.asarray(image.convert("RGB") if image.mode != "LA" else image.getchannel("L"))
    if bands.ndim == 3 and not (bands == bands[..., :1]).all():
        raise rule_codes.unusable(rule_codes.MASK_CLASS)
    return bands if bands.ndim == 2 else bands[..., 0]


Item = tuple[Path, Sample | str]


def read(
    root: Path,
    task: Task,
    options: LabelOptions | None = None,
    patients: PatientOptions | None = None,
    masks: MaskOptions | None = None,
    channels: Channels | None = None,
    boxes: BoxOptions | None = None,
) -> Dataset:
    """Read a picture folder.

    Parameters
    ----------
    root : Path
        The folder.
    task : Task
        What its labels or masks are for.
    options : LabelOptions, optional
        Where the table of labels lies, and what its words mean.
    patients : PatientOptions, optional
        What missing and shared patient ids of a table mean.
    masks : MaskOptions, optional
        What their names end in, and whether those of another size are resized.
    channels : mapping, optional
        Named channels, some of which may have files of their own.
    boxes : BoxOptions, optional
        Where boxes are.

    Raises
    ------
    DataError
        The folder has none of the known layouts, or a table cannot be read.
    """
    options = options or LabelOptions()
    people = people_of(root, patients, options)
    boxes = boxes or BoxOptions()
    if task.has_boxes:
        people.check()
        return _boxed(root, people, task, boxes, channels)
    if task.has_masks:
        people.check()
        masks = masks or MaskOptions()
        resize = masks.resize
        return pairs(
            root,
            (SUFFIXES, MASK_SUFFIXES),
            lambda image, mask: (Picture(image), PictureMask(mask, image if resize else None)),
            people,
            channels,
            masks.suffix,
        )
    if options.table(root) is not None:
        return labelled(root, root, is_picture, Picture, people, task, options, channels)
    people.check()
    return _classes(root, people, task, options)


def collect(root: Path, items: Iterator[Item]) -> Dataset:
    """Samples apart from what was left out."""
    samples: list[Sample] = []
    left_out: list[LeftOut] = []
    for path, item in items:
        if isinstance(item, Sample):
            samples.append(item)
        else:
            left_out.append(LeftOut(item, path.relative_to(root).as_posix()))
    return Dataset(tuple(samples), tuple(left_out))


def labelled(
    root: Path,
    base: Path,
    wanted: Callable[[Path], bool],
    loader: Callable[[Path], Callable[[], Image]],
    people: People,
    task: Task,
    options: LabelOptions,
    channels: Channels | None = None,
) -> Dataset:
    """Images under `base` with the labels of a table (of `root`, unless the site names one)."""
    table = read_table(options.table(root) or root / TABLES[0], KEYS, task, options)
    people = people.beside(table)
    cases = Cases.of([f for f in walk(base, without=("masks",)) if wanted(f)], base, channels)
    files = list(cases.files)
    keys = cases.keys(table_keys(files, (root, base)))
    used: set[str] = set()

    def items() -> Iterator[Item]:
        for file in files:
            entry = table.find(keys[file])
            used.add(entry.key if entry else "")
            made = _labelled(file, keys[file], entry, loader, people)
            yield file, cases.with_files(file, made, loader)

    taken = collect(root, items())
    taken = replace(taken, left_out=taken.left_out + cases.left_out(root))
    idle = tuple(LeftOut(rule_codes.NO_IMAGE, key) for key in table.entries if key not in used)
    return Dataset(taken.samples, taken.left_out + idle, people.notes)


def _labelled(
    file: Path,
    keys: tuple[str, ...],
    entry: Entry | None,
    loader: Callable[[Path], Callable[[], Image]],
    people: People,
) -> Sample | str:
    if entry is None or entry.label is None:
        return entry.reason if entry and entry.reason else rule_codes.NO_LABEL
    try:
        patient = people.of(keys, entry.patient)
    except DataError as error:
        return rule_codes.reason_of(error)
    return Sample(
        patient,
        loader(file),
        entry.label,
        split=entry.split,
        columns=entry.columns,
        patient_known=people.knows(patient),
    )


def pairs(
    root: Path,
    formats: tuple[Collection[str], Collection[str]],
    build: Callable[[Path, Path], tuple[Callable[[], Image], Callable[[], NDArray[np.uint8]]]],
    people: People,
    channels: Channels | None = None,
    suffix: str = "",
    mask_folders: Sequence[str] = MASK_FOLDERS,
) -> Dataset:
    """Images with the mask of the same place and stem, or of the stem and `suffix`.

    Where no mask has the stem of an image, masks may share an ending: ``IM1_mask`` is of ``IM1``.
    They lie in a folder of their own, or beside their images.

    Parameters
    ----------
    root : Path
        The dataset.
    formats : tuple
        What names of images end in, and those of masks, in small letters.
    build : callable
        From an image's file and its mask's to what reads them.
    people : People
        Whose the images are.
    channels : mapping, optional
        Named channels, some of which may have files of their own.
    suffix : str
        What the names of masks end in, as the site says.
    mask_folders : sequence of str
        Where masks may lie, the first that is there.

    Raises
    ------
    DataError
        There are no masks, or they cannot be told from images.
    """
    base = folder_of(root, IMAGE_FOLDERS) or root
    told = suffix
    if (folder := folder_of(root, mask_folders)) is not None:
        if base == root:
            raise DataError(
                f"images whose masks are in {folder.name}/ must be in a folder images/",
                fix="Move them there, or the masks beside them with an ending (P1_mask beside P1)",
                where=rule_codes.NO_MASKS,
            )
        images, masks = _ending(walk(base), formats[0]), _ending(walk(folder), formats[1])
    else:
        found = one_folder(root, {*formats[0], *formats[1]}, suffix, channels)
        images, masks = _ending(found.images, formats[0]), [*found.masks]
        folder, suffix = base, found.suffix
    cases = Cases.of(images, base, channels)
    files = list(cases.files)
    places = {f: cases.places.get(f, _place(f, base)) for f in files}
    kept = [mask for mask in masks if stem(mask).endswith(suffix)]
    marks = {mask: _place(mask, folder) for mask in kept}
    if not suffix and (ending := image_suffix(places.values(), marks.values())):
        places = {file: without(place, ending) for file, place in places.items()}
        cases = replace(cases, places=places)
    keys = cases.keys(table_keys(files, (base.parent, base) if base != root else (base,)))
    names = Counter(places.values())
    suffix = suffix or common_suffix(names, marks.values())
    by_name: dict[Path, list[Path]] = {}
    for mask, place in marks.items():
        by_name.setdefault(without(place, suffix), []).append(mask)

    def items() -> Iterator[Item]:
        yield from ((mask, rule_codes.NOT_SELECTED) for mask in sorted({*masks} - {*kept}))
        for file in files:
            of = by_name.get(places[file], [])
            if not of:
                yield file, rule_codes.NO_MASK
            elif len(of) > 1 or names[places[file]] > 1:
                yield file, rule_codes.DUPLICATE
            else:
                made = _marked(keys[file], people, *build(file, of[0]))

                def load(one: Path, mask: Path = of[0]) -> Callable[[], Image]:
                    return build(one, mask)[0]

                yield file, cases.with_files(file, made, load)
        yield from ((file, rule_codes.NOT_SELECTED) for file in cases.others)
        for name in sorted(set(by_name) - set(names)):
            yield by_name[name][0], rule_codes.NO_IMAGE

    notes = (in_words(suffix, len(kept)),) if suffix != told else ()
    return replace(collect(root, items()), notes=(*notes, *people.notes))


def _ending(files: Iterable[Path], formats: Collection[str]) -> list[Path]:
    return [file for file in files if file.name.lower().endswith(tuple(formats))]


def _place(file: Path, root: Path) -> Path:
    return file.relative_to(root).with_name(stem(file))


def _marked(
    keys: tuple[str, ...],
    people: People,
    load: Callable[[], Image],
    mask: Callable[[], NDArray[np.uint8]] | None = None,
    boxes: Callable[[], BoxRows | None] = lambda: None,
) -> Sample | str:
    """An image whose target is a mask or boxes, or the reason why it is left out."""
    try:
        patient, rows = people.of(keys), boxes()
    except DataError as error:
        return rule_codes.reason_of(error)
    entry = people.find(keys)
    split, columns = (entry.split, entry.columns) if entry else (None, {})
    known = people.knows(patient)
    return Sample(
        patient, load, mask=mask, boxes=rows, split=split, columns=columns, patient_known=known
    )


def _boxed(
    root: Path, people: People, task: Task, options: BoxOptions, channels: Channels | None
) -> Dataset:
    base = folder_of(root, IMAGE_FOLDERS) or root
    pictures = [file for file in walk(base, without=MASK_FOLDERS) if is_picture(file)]
    cases = Cases.of(pictures, base, channels)
    files = list(cases.files)
    keys = cases.keys(table_keys(files, (root, base)))
    source = BoxSource.of(root, base, task, options)

    def items() -> Iterator[Item]:
        for file in files:
            rows = partial(source.rows, file, keys[file], partial(_shape_of, file))
            made = _marked(keys[file], people, Picture(file), boxes=rows)
            yield file, cases.with_files(file, made, Picture)

    taken = collect(root, items())
    left_out = (*taken.left_out, *cases.left_out(root), *source.idle(keys.values()))
    return Dataset(taken.samples, left_out)


def _classes(root: Path, people: People, task: Task, options: LabelOptions) -> Dataset:
    places = {f: _place(f, root) for f in walk(root) if is_picture(f)}
    masks = with_word(places.values(), places.values())
    files = [file for file, place in places.items() if place not in masks]
    keys = table_keys(files, (root,))
    names = {folder.name.lower() for folder in folders(root)}
    divided = bool(names) and names <= set(SPLIT_NAMES)

    def items() -> Iterator[Item]:
        for file, place in places.items():
            if place in masks:
                yield file, rule_codes.NOT_SELECTED
                continue
            parts = file.relative_to(root).parts[:-1]
            split: SplitName | None = SPLIT_NAMES[parts[0].lower()] if divided and parts else None
            made = _of_class(file, keys[file], parts[divided:], split, people, task, options)
            yield file, made

    note = f"{len(masks)} files are masks by their names (P1_mask beside P1), and no images"
    return replace(collect(root, items()), notes=(*[note] * bool(masks), *people.notes))


def _of_class(
    file: Path,
    keys: tuple[str, ...],
    parts: tuple[str, ...],
    split: SplitName | None,
    people: People,
    task: Task,
    options: LabelOptions,
) -> Sample | str:
    try:
        index = options.class_of_folder(parts[0] if parts else "", task)
        patient = people.of(keys)
    except DataError as error:
        return rule_codes.reason_of(error)
    label = labels.flags({index}, task) if task.multi_label else (index,)
    known = people.knows(patient)
    return Sample(patient, Picture(file), label, split=split, patient_known=known)
