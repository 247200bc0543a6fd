"""Whose an image is when its patient id is missing or stands for nobody, as a site says it."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from client.data import reasons

Rule = Literal["leave-out", "refuse", "study", "series"]
SharedRule = Literal["leave-out", "refuse", "study", "series", "keep"]
_OF: Final = {"study": "studyinstanceuid", "series": "seriesinstanceuid"}


@dataclass(frozen=True)
class PatientOptions:
    """What missing and shared patient ids mean.

    Attributes
    ----------
    shared_ids : frozenset of str
        Ids without case that stand for nobody in particular.
    missing, shared : str
        What becomes of images without an id, and of those with a shared one: "leave-out" counts
        them; "refuse" does too, and no study may use the dataset; "study" and "series" take each
        study or series (in folders of pictures and NIfTI: each image) for a patient of its own;
        "keep" takes all with one id for one patient.
    """

    shared_ids: frozenset[str] = frozenset()
    missing: Rule = "leave-out"
    shared: SharedRule = "keep"

    def nobody(self, patient_id: str) -> Literal["missing", "shared", ""]:
        """Whether an id stands for nobody, and why."""
        if not patient_id.strip():
            return "missing"
        return "shared" if patient_id.strip().casefold() in self.shared_ids else ""

    def patient(self, words: Mapping[str, str]) -> tuple[str, str]:
        """Issuer and id of an image's patient, as they are hashed and compared.

        Parameters
        ----------
        words : mapping
            Attributes of the file, their names in lower case.

        Raises
        ------
        DataError
            "no patient id" or "shared patient id": by the rule the image is left out.
        """
        issuer, patient_id = (
            # One id may be written in two ways where letters have accents.
            unicodedata.normalize("NFC", words.get(name, "").strip())
            for name in ("issuerofpatientid", "patientid")
        )
        nobody = self.nobody(patient_id)
        rule = {"": "keep", "missing": self.missing, "shared": self.shared}[nobody]
        if rule == "keep":
            return issuer, patient_id
        uid = words.get(_OF[rule], "").strip() if rule in _OF else ""
        if not uid:
            raise reasons.unusable(
                reasons.NO_PATIENT if nobody == "missing" else reasons.SHARED_PATIENT
            )
        # No id has a backslash (PS3.5, 6.2), so this one is nobody else's.
        return issuer, f"\\{rule}\\{uid}"

    @property
    def parts(self) -> tuple[str, ...]:
        """All of it as text, to be hashed."""
        return (*sorted(self.shared_ids), self.missing, self.shared)

    @property
    def refused(self) -> frozenset[str]:
        """Reasons that no study may come across."""
        rules = {reasons.NO_PATIENT: self.missing, reasons.SHARED_PATIENT: self.shared}
        return frozenset(reason for reason, rule in rules.items() if rule == "refuse")
