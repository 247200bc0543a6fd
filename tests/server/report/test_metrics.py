from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fedward.errors import OutputError
from fedward_server.report import read_metrics, write_metrics
from fedward_server.results import Paired, StudyResults
from tools.docs.metrics import metrics_reference

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def _refuse_constants(name: str) -> float:
    raise AssertionError(name)


def _sorted(value: Any) -> bool:
    if isinstance(value, dict):
        return list(value) == sorted(value) and all(map(_sorted, value.values()))
    return all(map(_sorted, value)) if isinstance(value, list) else True


def test_one_study_reads_back_as_it_was(classification: StudyResults, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_metrics(classification, path)
    assert read_metrics(path) == [classification]
    value = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constants)
    assert value["schema_version"] == 1 and _sorted(value)
    write_metrics([classification], tmp_path / "list.json")
    assert (tmp_path / "list.json").read_bytes() == path.read_bytes()


def test_curves_intervals_and_paired_differences_read_back(
    answering: StudyResults, tmp_path: Path
) -> None:
    answering.paired = [
        Paired(
            one="federated",
            others=["pooled"],
            metric="auc",
            own=False,
            difference=-0.004,
            interval=(-0.02, 0.01),
        )
    ]
    write_metrics(answering, tmp_path / "metrics.json")
    (again,) = read_metrics(tmp_path / "metrics.json")
    assert again == answering
    test = again.arms[4].test
    assert test is not None and test.answers is not None and len(test.site_answers) == 4


def test_several_studies_read_back_as_they_were(
    classification: StudyResults, segmentation: StudyResults, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    write_metrics([classification, segmentation], path)
    assert list(json.loads(path.read_text("utf-8"))) == ["studies"]
    assert read_metrics(path) == [classification, segmentation]


def test_there_is_no_nan_in_the_file(classification: StudyResults, tmp_path: Path) -> None:
    path, arm = tmp_path / "metrics.json", classification.arms[4]
    arm.rounds[0].train_loss = math.nan
    arm.rounds[0].validation["auc"] = math.inf
    arm.rounds[0].sites["North"].loss = -math.inf
    write_metrics(classification, path)
    json.loads(path.read_text("utf-8"), parse_constant=_refuse_constants)
    again = read_metrics(path)[0].arms[4].rounds[0]
    assert again.train_loss is None and again.validation["auc"] is None
    assert again.sites["North"].loss is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"studies": 1}', '{"studies": [{}]}', "[" * 100_000]
)
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(text, "utf-8")
    with pytest.raises(OutputError, match=r"metrics\.json"):
        read_metrics(path)


def test_unknown_keys_and_missing_files_are_refused(
    classification: StudyResults, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({**classification.model_dump(mode="json"), "more": 1}), "utf-8")
    with pytest.raises(OutputError, match=r"^more: "):
        read_metrics(path)
    with pytest.raises(OutputError):
        read_metrics(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_file(
    classification: StudyResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old", "utf-8")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_metrics(classification, path)
    assert path.read_text("utf-8") == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.json"]


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text("utf-8") == metrics_reference(), (
        "regenerate: python -m tools.docs.metrics > docs/metrics.md"
    )


def test_every_key_has_a_meaning_and_every_link_leads_somewhere() -> None:
    rows = re.findall(r"^\| `\w+` \|.*\|$", metrics_reference(), re.MULTILINE)
    assert len(rows) > 60
    assert [row for row in rows if re.split(r"(?<!\\)\|", row)[-2].strip() == ""] == []
    anchors = set(re.findall(r'<a id="([^"]+)">', metrics_reference()))
    assert set(re.findall(r"\(#([^)]+)\)", metrics_reference())) <= anchors
