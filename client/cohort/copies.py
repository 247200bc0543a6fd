"""The same pixels in several files: within a patient, between patients, between parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from client.cohort.sources import files_of
from client.data.types import Sample
from client.index.extract import Extractor
from client.index.store import Index

OF_IMAGES: Final = "reason = '' AND marked = '' AND pixels != ''"


def copies(index: Index) -> int:
    """Files whose pixels another file has already."""
    row = index.connection.execute(
        f"SELECT coalesce(sum(n - 1), 0) FROM (SELECT count(*) AS n FROM files WHERE {OF_IMAGES} "
        "GROUP BY pixels HAVING n > 1)"
    ).fetchone()
    return int(row[0])


def shared(samples: Sequence[Sample], index: Index, extract: Extractor) -> int:
    """Images that two patients have, or two parts of the division that the data brings."""
    # Files that no sample uses yet may be used tomorrow; only DICOM files name their patient.
    rows = index.connection.execute(
        f"SELECT pixels FROM files WHERE {OF_IMAGES} GROUP BY pixels "
        "HAVING count(DISTINCT patient) > 1"
    )
    found = {str(row[0]) for row in rows}
    patients: dict[str, set[str]] = defaultdict(set)
    parts: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        for pixels in _pixels(sample, index, extract):
            patients[pixels].add(sample.patient)
            parts[pixels] |= {sample.split} if sample.split else set()
    found |= {pixels for by in (patients, parts) for pixels, of in by.items() if len(of) > 1}
    return len(found)


def _pixels(sample: Sample, index: Index, extract: Extractor) -> set[str]:
    """The hashes of a sample's decoded pixels, without those of its mask."""
    found = set()
    for path in files_of(replace(sample, mask=None), extract.root):
        row = index.connection.execute(
            "SELECT pixels FROM files WHERE path = ?", (extract.name(path),)
        ).fetchone()
        found |= {str(row[0])} if row and row[0] else set()
    return found
