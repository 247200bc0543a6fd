"""Tables of labels as hospitals keep them: sheets, columns, words, rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest

from fedward.errors import DataError
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.label_tables import read_table
from fedward_client.data.options import LabelOptions

KEYS = ("accessionnumber", "patientid", "file")


@pytest.fixture
def read(make_plan: Any) -> Any:
    def call(path: Path, multi_label: bool = False, **options: Any) -> dict[str, Any]:
        plan = make_plan(
            classes=["normal", "effusion", "nodule"], task={"multi_label": multi_label}
        )
        table = read_table(path, KEYS, plan.task, LabelOptions(**options))
        return {key: entry.label or entry.reason for key, entry in table.entries.items()}

    return call


def csv(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text, "utf-8")
    return path


def test_words_key_and_column_of_the_site(tmp_path, read):
    path = csv(tmp_path, "Nr;Befund;PatientID\n1;ohne Befund;P\n2;Erguss;P\n3;?;P\n4;Erguß;P\n")
    found = read(
        path,
        key="Nr",
        means="accessionnumber",
        column="befund",
        words={"Ohne befund": "normal", "erguss": "effusion"},
        unlabelled=("?",),
    )
    # Case folds, so that ß is ss.
    assert found == {"1": (0,), "2": (1,), "3": "no label", "4": (1,)}
    assert read_table(path, KEYS, None, LabelOptions(key="nr", means="accessionnumber")).column == (
        "accessionnumber"
    )


def test_a_sheet_and_a_header_below_a_title(tmp_path, read):
    book = openpyxl.Workbook()
    book.active.append(["notes"])
    sheet = book.create_sheet("Findings 2024")
    sheet.append(["Radiology, st mary"])
    sheet.append([])
    sheet.append(["AccessionNumber", "Label"])
    sheet.append([101, "nodule"])
    sheet.append(["00102", "Normal"])
    book.save(tmp_path / "labels.xlsx")
    found = read(tmp_path / "labels.xlsx", sheet="findings 2024", header=3)
    assert found == {"101": (2,), "00102": (0,)}
    with pytest.raises(DataError, match="sheet") as caught:
        read(tmp_path / "labels.xlsx", sheet="Findings", header=3)
    assert caught.value.fix == "Correct labels.sheet"
    with pytest.raises(DataError, match="needs a column"):
        read(tmp_path / "labels.xlsx", sheet="findings 2024")


def test_a_column_for_each_class(tmp_path, read):
    path = csv(
        tmp_path, "PatientID,Normal,Pleural effusion,Nodule\na,,x,\nb,no,no,no\nc,,u,x\nd,maybe,,\n"
    )
    found = read(
        path,
        multi_label=True,
        columns={"pleural EFFUSION": "effusion"},
        yes=("X",),
        no=("",),
        unlabelled=("u",),
    )
    assert found == {"a": (0, 1, 0), "b": (0, 0, 0), "c": "no label", "d": "unknown class"}


ROWS = "PatientID,label\na,effusion\na,nodule\na,nodule\nb,No finding\nc,effusion\nc,\n"


def test_rows_disagree_unless_they_add_up(tmp_path, read):
    path = csv(tmp_path, ROWS)
    words = {"none": ("no finding",)}
    assert read(path, multi_label=True, **words) == {
        "a": "conflicting labels",
        "b": (0, 0, 0),
        "c": "conflicting labels",
    }
    assert read(path, multi_label=True, rows="add", **words) == {
        "a": (0, 1, 1),
        "b": (0, 0, 0),
        "c": "conflicting labels",
    }


def test_several_words_in_a_cell(tmp_path, read):
    path = csv(tmp_path, "PatientID,label\na,Erguss | knoten\nb,erguss;nodule\n")
    words = {"Erguss": "effusion", "Knoten": "nodule"}
    assert read(path, multi_label=True, words=words) == {"a": (0, 1, 1), "b": (0, 1, 1)}


@pytest.mark.parametrize("options", [{"column": "diagnosis"}, {"columns": {"x": "nodule"}}])
def test_a_misspelt_column_is_an_error_and_no_empty_label(tmp_path, read, options):
    with pytest.raises(DataError, match="columns that site"):
        read(csv(tmp_path, "PatientID,label\na,nodule\n"), **options)


def test_a_column_that_is_there_twice(tmp_path, read):
    with pytest.raises(DataError, match="once"):
        read(csv(tmp_path, "PatientID,label,Label\na,nodule,normal\n"))


def test_blank_lines_and_rows_without_a_key(tmp_path, read):
    assert read(csv(tmp_path, "\n\nPatientID,label\n\n,nodule\na,1\n")) == {"a": (1,)}


REMARKS = "PatientID;Remark;Label\nA;{0};normal\nB;{0};nodule\n"


@pytest.mark.parametrize(
    ("remark", "encoding"),
    [
        ("wait\u2026", "cp1252"),
        ("wait\u2026\x81", "latin-1-like"),
        ("a\u2028b", "utf-8"),
        ("a\x0bb", "utf-8"),
        ("a\x0cb", "utf-8"),
        ("a\x85b", "utf-8"),
        ('"a\n;b"', "utf-8"),
    ],
)
def test_only_ends_of_lines_end_a_row(tmp_path, read, remark, encoding):
    text = REMARKS.format(remark)
    raw = text.encode("utf-8") if encoding == "utf-8" else text.replace("\x81", "").encode("cp1252")
    if encoding == "latin-1-like":  # a byte that Windows-1252 does not know
        raw = raw.replace(b"\x85", b"\x85\x81")
    for ends in (b"\n", b"\r\n", b"\r"):
        (tmp_path / "labels.csv").write_bytes(raw.replace(b"\n", ends))
        assert read(tmp_path / "labels.csv") == {"A": (0,), "B": (2,)}


def test_words_of_windows_are_read_as_such(tmp_path, read):
    (tmp_path / "labels.csv").write_bytes("PatientID,Label\nA,œdème – 5 €\n".encode("cp1252"))
    assert read(tmp_path / "labels.csv", words={"œdème – 5 €": "effusion"}) == {"A": (1,)}


def test_numbers_of_a_workbook_never_label_another_patient(tmp_path, make_dicom, make_plan):
    ids = ["45", "0045", "046", "47", "48E2", "4800", "1234567890123456", "A9"]
    for k, patient in enumerate(ids):
        make_dicom(tmp_path / f"{k}.dcm", np.full((4, 4), k, np.uint8), PatientID=patient)
    book = openpyxl.Workbook()
    book.active.append(["PatientID", "label"])
    for value in (45, 46, 47, 4800, 1234567890123456, "A9"):
        book.active.append([value, "sick"])
    book.save(tmp_path / "labels.xlsx")
    task = make_plan(classes=["well", "sick"]).task
    found = read_dataset(DatasetSpec(tmp_path, "dicom"), task)
    # 45 may be 0045, 4800 may be 48E2, 46 is nobody here, and the last digits are rounded.
    assert {sample.patient for sample in found.samples} == {"\\47", "\\A9"}
    assert {item.reason for item in found.left_out} == {"no label"}
    book.active["A2"].value = "45"  # as text it is nobody else's
    book.save(tmp_path / "labels.xlsx")
    found = read_dataset(DatasetSpec(tmp_path, "dicom"), task)
    assert {sample.patient for sample in found.samples} == {"\\45", "\\47", "\\A9"}
