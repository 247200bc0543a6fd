"""Keyed hashes by which one person under two ids, or two under one, is found out."""

from __future__ import annotations

import pydicom

from client.data.patient_options import PatientOptions
from client.secret import Pseudonyms


def people(
    header: pydicom.Dataset, patient: tuple[str, str], hashed: Pseudonyms, options: PatientOptions
) -> dict[str, str]:
    """Hashes of name with birth date, of birth date with id, and of the id as it may be misspelt.

    Parameters
    ----------
    header : Dataset
        The file's.
    patient : tuple of str
        Issuer and id by the site's rule; ("", "") for nobody.
    hashed : Pseudonyms
        The site's.
    options : PatientOptions
        Names that are on its list of shared ids are nobody's.
    """
    name, born = (str(header.get(key) or "").strip() for key in ("PatientName", "PatientBirthDate"))
    own = str(header.get("PatientID") or "")
    known = bool(patient[1]) and not options.nobody(own)
    named = bool(_bare(name)) and not options.nobody(name.replace("^", " "))
    return {
        "person": hashed("person", _bare(name), born) if known and named and born else "",
        "born": hashed("born", *patient, born) if patient[1] and born else "",
        "alike": hashed("alike", _bare(own).lstrip("0")) if known else "",
    }


def _bare(text: str) -> str:
    """Without case, blanks and marks."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())
