"""What a table says of images that are predicted, for a model that reads it beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan.schema import TableInput
from fedward_client.data.channels import Channels, there
from fedward_client.data.files import table_keys
from fedward_client.data.label_tables import Entry, read_table
from fedward_client.data.options import LabelOptions
from fedward_client.data.readers.dicom.headers import KEYS as DICOM_KEYS
from fedward_client.data.readers.dicom.reader import alike, entry_of
from fedward_client.data.readers.images import KEYS
from fedward_client.data.table_rows import Row, rows_of
from fedward_client.predict.inputs import DicomSource, Found, NiftiSource, PictureSource, base_of


def rows_beside(
    table: TableInput, found: Found, path: Path, options: LabelOptions
) -> dict[str, Row | str]:
    """The row of each input by its name, or the reason why it cannot be predicted.

    Parameters
    ----------
    table : TableInput
        The columns of the model's plan.
    found : Found
        The inputs.
    path : Path
        What was asked about.
    options : LabelOptions
        Where the table lies and how it is read; without a file ``labels.csv`` or ``labels.xlsx``
        beside the images. Its key column is that of a table of labels; it needs no labels.

    Raises
    ------
    DataError
        There is no table, or it lacks a key or a column of the plan.
    """
    root = path if path.is_dir() else path.parent
    place = options.table(root)
    if place is None:
        raise DataError(
            "this model reads a table beside the image",
            value="no table",
            fix="Give one with --table, with a column for the image or a DICOM identifier and "
            f"{', '.join(column.name for column in table.column)}",
            where="--table",
        )
    entries = dict(_entries(found, place, path, options))
    names = [name for name, entry in entries.items() if entry is not None]
    rows = rows_of(table, [entry.columns for entry in entries.values() if entry is not None])
    return dict.fromkeys(entries, rule_codes.VALUE_MISSING) | dict(zip(names, rows, strict=True))


def channels_beside(
    channels: Channels, found: Found, path: Path, options: LabelOptions
) -> dict[str, Channels]:
    """The channels that each input has, by its name: all of a dataset, but for what a table says.

    Parameters
    ----------
    channels : mapping
        Of the dataset.
    found, path, options
        As for :func:`rows_beside`; ``patients.csv`` beside the images serves as well.

    Raises
    ------
    DataError
        No table has a column that tells which images lack a channel.
    """
    root = path if path.is_dir() else path.parent
    own = root / "patients.csv"
    place = options.table(root) or (own if own.is_file() else None)
    entries = dict.fromkeys((one.name for one in found.sources), None)
    told = entries if place is None else entries | dict(_entries(found, place, path, options))
    rows = [{} if entry is None else entry.columns for entry in told.values()]
    return dict(zip(told, there(channels, rows), strict=True))


def _entries(
    found: Found, place: Path, path: Path, options: LabelOptions
) -> Iterator[tuple[str, Entry | None]]:
    root, base = path if path.is_dir() else path.parent, base_of(path)
    files = {
        one.name: one.path for one in found.sources if isinstance(one, (PictureSource, NiftiSource))
    }
    if files:
        read = read_table(place, KEYS, None, options, patients=False)
        keys = table_keys(list(files.values()), (root, base))
        yield from ((name, read.find(keys[file])) for name, file in files.items())
    scans = [one for one in found.sources if isinstance(one, DicomSource)]
    if scans:
        read = read_table(place, DICOM_KEYS, None, options, patients=False)
        headers = [header for one in scans for header in one.stack.headers]
        keys = table_keys([header.path for header in headers], (root, base))
        number = alike(headers, read)
        for one in scans:
            told = (entry_of(h, keys[h.path], read, number) for h in one.stack.headers)
            yield one.name, next((entry for entry in told if entry is not None), None)
