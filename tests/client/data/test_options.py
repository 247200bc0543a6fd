"""Whose an image is, by id and rule."""

from __future__ import annotations

import unicodedata

import pytest

from fedward.errors import DataError
from fedward_client.data.options import PatientOptions

WORDS = {"studyinstanceuid": "1.2", "seriesinstanceuid": "1.2.3", "issuerofpatientid": " east "}


def test_blanks_and_ways_to_write_an_accent_do_not_count_and_case_does():
    options = PatientOptions()
    one = options.patient({"patientid": "MÜL 1"})
    assert options.patient({"patientid": f" {unicodedata.normalize('NFD', 'MÜL 1')} "}) == one
    assert options.patient({"patientid": "mül 1"}) != one
    assert options.patient({**WORDS, "patientid": "7"}) == ("east", "7")


def test_a_study_that_stands_for_a_patient_is_no_other_patient():
    options = PatientOptions(frozenset({"anon"}), missing="series", shared="study")
    found = {options.patient({**WORDS, "patientid": name}) for name in ("ANON", "", "1.2", "1.2.3")}
    assert len(found) == 4
    assert options.patient({**WORDS, "patientid": "anon "}) in found


@pytest.mark.parametrize("rule", ["leave-out", "refuse", "study"])
def test_without_a_patient_there_is_a_reason(rule):
    options = PatientOptions(frozenset({"anon"}), missing=rule, shared=rule)
    for patient, reason in (("", "no patient id"), ("Anon", "shared patient id")):
        with pytest.raises(DataError, match=reason):
            options.patient({"patientid": patient})  # it has no study either
    assert options.refused == (
        {"no patient id", "shared patient id"} if rule == "refuse" else frozenset()
    )
