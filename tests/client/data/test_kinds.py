"""Which files of a DICOM tree are images of a patient, and of these which a site asks for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.plan.image_filter import accepts
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.readers.dicom.kinds import ImageOptions

WSM = "1.2.840.10008.5.1.4.1.1.77.1.6"
SLIDE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
GREY = np.arange(20, dtype=np.uint16).reshape(4, 5)


@pytest.fixture
def taken(tmp_path: Path, make_plan: Any) -> Any:
    """Names of the files that are taken, and the reasons for the others."""

    def read(options: ImageOptions | None = None) -> tuple[set[str], Counter[str]]:
        (tmp_path / "labels.csv").write_text("PatientID,label\nP1,sick\nP2,sick\n")
        spec = DatasetSpec(tmp_path, "dicom", images=options or ImageOptions())
        found = read_dataset(spec, make_plan().task, empty=True)
        reasons = Counter(item.reason for item in found.left_out)
        return {sample.load.path.stem for sample in found.samples}, reasons

    return read


def test_labels_and_overviews_of_slides_show_no_tissue_but_names(tmp_path, make_dicom, taken):
    for kind in ("VOLUME", "LABEL", "OVERVIEW", "THUMBNAIL"):
        make_dicom(
            tmp_path / f"{kind}.dcm",
            SLIDE,
            SOPClassUID=WSM,
            Modality="SM",
            ImageType=["ORIGINAL", "PRIMARY", kind, "NONE"],
        )
    labelled = ["ORIGINAL", "PRIMARY", "LABEL"]
    make_dicom(tmp_path / "photo.dcm", SLIDE, ImageType=labelled)
    make_dicom(tmp_path / "converted.dcm", SLIDE, ImageType=labelled, Modality="SM")
    assert taken() == ({"VOLUME", "photo"}, {"slide label or overview": 4})
    kept = ImageOptions(keep=frozenset({"slide-labels"}))
    assert len(taken(kept)[0]) == 6


@pytest.mark.parametrize(
    "tags",
    [
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
        {"ImageType": ["DERIVED", "SECONDARY", "OTHER", "DOSE_INFO"]},
        {"SeriesDescription": "Dose Report"},
        {"SeriesDescription": "Patient Protocol"},
        {"SeriesDescription": "1_Screen Captures"},
        {"ConversionType": "SD", "Modality": "OT"},
    ],
)
def test_screens_and_dose_reports_are_no_images(tmp_path, make_dicom, taken, tags):
    make_dicom(tmp_path / "screen.dcm", GREY, **tags)
    make_dicom(tmp_path / "dose.dcm", GREY, SeriesDescription="LOW DOSE CHEST protocol 4")
    assert taken() == ({"dose"}, {"screen capture or report": 1})
    assert len(taken(ImageOptions(keep=frozenset({"captures"})))[0]) == 2


def test_an_exposure_counts_once_where_it_is_there_for_presentation(tmp_path, make_dicom, taken):
    def shot(name: str, study: str, intent: str, **tags: Any) -> None:
        more = {"StudyInstanceUID": study, "PresentationIntentType": f"FOR {intent}", **tags}
        make_dicom(tmp_path / f"{name}.dcm", GREY + len(name), Modality="MG", **more)

    shot("raw", "1.2.1", "PROCESSING")
    shot("shown", "1.2.1", "PRESENTATION")
    shot("alone", "1.2.2", "PROCESSING")
    shot("other patient", "1.2.1", "PROCESSING", PatientID="P2")
    assert taken() == ({"shown", "alone", "other patient"}, {"for processing": 1})
    raw = ImageOptions({"intent": ("for processing",)})
    assert taken(raw) == ({"raw", "alone", "other patient"}, {"not selected": 1})


def test_a_site_selects_by_what_headers_say(tmp_path, make_dicom, taken):
    series = {
        "lung": {"SeriesDescription": "Thorax 1.0 Br64", "ConvolutionKernel": ["Br64d", "3"]},
        "soft": {"SeriesDescription": "Thorax 1.0 Br40", "ConvolutionKernel": "Br40d"},
        "mip": {"SeriesDescription": "Thorax MIP", "ImageType": ["DERIVED", "SECONDARY", "MIP"]},
        "nothing": {},
    }
    for name, tags in series.items():
        more = {"BodyPartExamined": "CHEST", **tags} if tags else {}
        make_dicom(tmp_path / f"{name}.dcm", GREY + len(name), **more)

    def ask(**patterns: tuple[str, ...]) -> set[str]:
        return taken(ImageOptions(patterns))[0]

    assert ask(series_description=("thorax*",)) == {"lung", "soft", "mip"}
    assert ask(series_description=("thorax*", "!* mip")) == {"lung", "soft"}
    assert ask(kernel=("br6*",)) == {"lung"}
    assert ask(image_type=("!derived",)) == {"lung", "soft", "nothing"}
    assert ask(body_part=("chest", "abdomen")) == {"lung", "soft", "mip"}
    assert ask(body_part=("chest",), kernel=("!br64?", "*")) == {"soft"}


def test_patterns():
    assert accepts({"kernel": ()}, {})
    assert accepts({"kernel": ("!B*",)}, {})
    assert not accepts({"kernel": ("*",)}, {})
    assert not accepts({"kernel": ("a" * 64,)}, {"kernel": ("a" * 63,)})


def test_de_identification_is_what_the_file_says(tmp_path, make_dicom, taken):
    flags = {
        "plain": {},
        "clean": {"PatientIdentityRemoved": "YES", "BurnedInAnnotation": "NO"},
        "burnt": {"PatientIdentityRemoved": "YES", "BurnedInAnnotation": "YES"},
        "face": {"PatientIdentityRemoved": "YES", "RecognizableVisualFeatures": "YES"},
        "named": {"PatientIdentityRemoved": "NO"},
    }
    for name, tags in flags.items():
        make_dicom(tmp_path / f"{name}.dcm", GREY + len(name), **tags)
    assert taken()[0] == set(flags)
    assert taken(ImageOptions(burned_in="leave-out")) == (
        set(flags) - {"burnt"},
        {"text burnt in": 1},
    )
    assert taken(ImageOptions(identity="leave-out"))[0] == {"clean", "burnt", "face"}
    strict = ImageOptions(burned_in="refuse", identity="refuse", visual_features="leave-out")
    names, reasons = taken(strict)
    assert names == {"clean"}
    assert reasons == {
        "text burnt in": 1,
        "identity not removed": 2,
        "recognizable features": 1,
    }
    assert strict.refused == {"text burnt in", "identity not removed"}
