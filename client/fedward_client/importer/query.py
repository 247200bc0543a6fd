"""The query of a dataset, and which series and objects of the PACS fit it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedward.errors import DataError, PacsError
from fedward.plan.image_filter import accepts
from fedward_client.config import DatasetSection
from fedward_client.importer.settings import FetchSection
from fedward_client.importer.source import Answer, Level, Source, is_uid, lost

_KEYS: Final = ("StudyInstanceUID", "AccessionNumber", "PatientID")
_STUDY: Final = (*_KEYS, "StudyDate", "StudyDescription")
_SERIES: Final = ("SeriesInstanceUID", "Modality", "SeriesDescription", "BodyPartExamined")
_OBJECT: Final = ("SOPInstanceUID", "SOPClassUID")
_PARTS: Final = 100_000  # series of a study, and objects of a series, at most


@dataclass(frozen=True)
class Series:
    """A series that fits.

    Attributes
    ----------
    study, uid : str
        UIDs.
    patient, modality : str
        As the PACS tells them.
    objects : mapping
        SOPInstanceUIDs to SOP classes, "" where the PACS does not tell it.
    """

    study: str
    uid: str
    patient: str
    modality: str
    objects: Mapping[str, str]


@dataclass
class Found:
    """What the PACS has.

    Attributes
    ----------
    series : list of Series
        All that fit.
    studies, patients : set of str
        Of them.
    misfits : int
        Answers that did not fit what was asked: the PACS ignores a key.
    """

    series: list[Series] = field(default_factory=list)
    studies: set[str] = field(default_factory=set)
    patients: set[str] = field(default_factory=set)
    misfits: int = 0

    @property
    def objects(self) -> int:
        """How many objects."""
        return sum(len(one.objects) for one in self.series)


@dataclass
class Query:
    """Finds what a dataset wants.

    Attributes
    ----------
    dataset : DatasetSection
        With a section `fetch`.
    fetch : FetchSection
        The same.
    source : Source
        The PACS.
    listen : callable
        Hears how many studies, series and objects were found.
    """

    dataset: DatasetSection
    fetch: FetchSection
    source: Source
    listen: Callable[[Found], None]

    def run(self) -> Found:
        """Ask for studies, then for their series, then for their objects.

        Raises
        ------
        PacsError
            It finds too many, or the PACS fails.
        DataError
            The worklist cannot be used.
        """
        found = Found()
        for study, patient in self._studies(found).items():
            for uid, modality in self._series(study, found):
                objects = self._objects(study, uid)
                if objects:
                    found.series.append(Series(study, uid, patient, modality, objects))
                    found.studies.add(study)
                    found.patients.add(patient)
            self.listen(found)
        return found

    @property
    def _modalities(self) -> tuple[str, ...]:
        own = self.fetch.modality or self.dataset.modality
        return () if "any" in own else own

    def _studies(self, found: Found) -> dict[str, str]:
        """UIDs of studies to their patients."""
        studies: dict[str, str] = {}
        for match in self._matches():
            for answer in self._ask("STUDY", match, _STUDY, self.fetch.limit):
                if not self._fits(answer, match):
                    found.misfits += 1
                    continue
                studies[answer["StudyInstanceUID"]] = answer["PatientID"].strip()
                if len(studies) > self.fetch.limit:
                    raise _too_many(self.fetch.limit)
        return studies

    def _matches(self) -> Iterator[dict[str, str]]:
        """What each question asks for."""
        since, until = (f"{d:%Y%m%d}" if d else "" for d in (self.fetch.since, self.fetch.until))
        dates = {"StudyDate": f"{since}-{until}"} if since or until else {}
        rows: list[dict[str, str]] = [{}]
        if self.fetch.worklist is not None:
            column, values = read_worklist(self.fetch.worklist)
            rows = [{column: value} for value in values]
        for row in rows:
            for modality in self._modalities or ("",):
                yield dates | row | ({"ModalitiesInStudy": modality} if modality else {})

    def _fits(self, answer: Answer, match: Mapping[str, str]) -> bool:
        same = all(answer[key].strip() == match[key] for key in _KEYS if key in match)
        day = answer["StudyDate"].strip()
        since, until = (f"{d:%Y%m%d}" if d else "" for d in (self.fetch.since, self.fetch.until))
        # Not every PACS tells a date; a range then is its word.
        dated = not day or (since <= day and (not until or day <= until))
        described = accepts(
            {"description": self.fetch.study_description},
            {"description": _values(answer, "StudyDescription")},
        )
        return same and dated and described and is_uid(answer["StudyInstanceUID"])

    def _series(self, study: str, found: Found) -> Iterator[tuple[str, str]]:
        patterns = {
            "series": self.fetch.series_description,
            "part": self.fetch.body_part,
        }
        for answer in self._ask("SERIES", {"StudyInstanceUID": study}, _SERIES, _PARTS):
            uid, modality = answer["SeriesInstanceUID"], answer["Modality"].strip()
            if not is_uid(uid):
                found.misfits += 1
                continue
            values = {
                "series": _values(answer, "SeriesDescription"),
                "part": _values(answer, "BodyPartExamined"),
            }
            if (not self._modalities or modality in self._modalities) and accepts(patterns, values):
                yield uid, modality

    def _objects(self, study: str, series: str) -> dict[str, str]:
        match = {"StudyInstanceUID": study, "SeriesInstanceUID": series}
        answers = self._ask("IMAGE", match, _OBJECT, _PARTS)
        return {
            one["SOPInstanceUID"]: one["SOPClassUID"] if is_uid(one["SOPClassUID"]) else ""
            for one in answers
            if is_uid(one["SOPInstanceUID"])
        }

    def _ask(
        self, level: Level, match: Mapping[str, str], want: Sequence[str], most: int
    ) -> list[Answer]:
        """All answers, read before the next question."""
        answers: list[Answer] = []
        with self.source.find(level, match, want) as told:
            for one in told:
                answers.append(one)
                if len(answers) > most:
                    raise _too_many(most) if level == "STUDY" else lost("answers without end")
        return answers


def _values(answer: Answer, name: str) -> list[str]:
    return [value for value in answer[name].split("\\") if value.strip()]


def _too_many(limit: int) -> PacsError:
    return PacsError(
        f"a query must find at most {limit} studies",
        value=f"more than {limit}",
        fix="Narrow it: dates, a modality, a worklist; or raise fetch.limit",
        where="fetch.limit",
    )


def read_worklist(path: Path) -> tuple[str, list[str]]:
    """Column and values of a worklist, without repetition.

    Parameters
    ----------
    path : Path
        CSV (comma, semicolon or tab; UTF-8 or Windows-1252) with a header.

    Raises
    ------
    DataError
        It cannot be read, or has none of the columns, or a value that no query can hold.
    """
    try:
        raw = path.read_bytes()
    except OSError:
        raise DataError(
            "the worklist must be a readable CSV file", fix="Check its path", where="fetch.worklist"
        ) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", "replace")
    lines = text.splitlines()
    delimiter = max(",;\t", key=(lines or [""])[0].count)
    rows = list(csv.reader(lines, delimiter=delimiter))
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    column = next((key for key in _KEYS if key.lower() in header), None)
    if column is None:
        raise DataError(
            f"the worklist needs a column {' or '.join(_KEYS)}",
            fix="Name its column so",
            where="fetch.worklist",
        )
    place = header.index(column.lower())
    values = [row[place].strip() for row in rows[1:] if len(row) > place and row[place].strip()]
    if wrong := sum(len(one) > 64 or bool(set(one) & set("\\*?")) for one in values):
        raise DataError(
            "an entry of the worklist has at most 64 characters, and no wildcard",
            value=f"{wrong} entries",
            fix="Correct them",
            where="fetch.worklist",
        )
    return column, list(dict.fromkeys(values))
