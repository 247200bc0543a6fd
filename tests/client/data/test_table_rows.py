"""A table's rows as numbers beside the images, and why an image is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from fedward import rule_codes
from fedward.errors import DataError
from fedward.plan import Plan, plan_from
from fedward.plan.schema import TableInput
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.options import ColumnOptions, LabelOptions
from fedward_client.data.prepare import prepare
from fedward_client.data.table_rows import encoded, outcomes, rows_of

COLUMNS = [
    {"name": "age", "kind": "number", "unit": "years", "range": [20, 100], "missing": True},
    {"name": "sex", "kind": "category", "values": ["female", "male"]},
    {"name": "site", "kind": "category", "values": ["arm", "unknown", "face"], "missing": True},
]
TABLE = TableInput.model_validate({"column": tuple(COLUMNS)}, strict=False)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"Age": "40", "SEX": "Male", "site": "arm"}, [-0.5, 0, 0, 1, 1, 0, 0, 0]),
        ({"age": "100.0", "sex": "female", "site": "face"}, [1, 0, 1, 0, 0, 0, 1, 0]),
        ({"age": "n/a", "sex": "female", "site": ""}, [0, 1, 1, 0, 0, 0, 0, 1]),
        ({"sex": " FEMALE ", "site": "Unknown"}, [0, 1, 1, 0, 0, 1, 0, 0]),
    ],
)
def test_a_row_is_encoded_column_after_column(cells: Any, expected: list[float]) -> None:
    row = encoded(TABLE, cells)
    assert row.dtype == np.float32 and len(row) == TABLE.width == 8
    np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"age": "40", "sex": ""}, rule_codes.VALUE_MISSING),
        ({"age": "480", "sex": "male"}, rule_codes.VALUE_RANGE),
        ({"age": "inf", "sex": "male"}, rule_codes.VALUE_RANGE),
        ({"age": "forty", "sex": "male"}, rule_codes.VALUE_UNKNOWN),
        ({"age": "40", "sex": "other"}, rule_codes.VALUE_UNKNOWN),
    ],
)
def test_a_value_that_the_plan_does_not_take_has_a_reason(cells: Any, reason: str) -> None:
    assert rows_of(TABLE, [{"site": ""} | cells]) == [reason]


def test_a_column_that_is_nowhere_is_not_taken_for_missing_values() -> None:
    with pytest.raises(DataError, match=r"must have the plan's columns .*site"):
        rows_of(TABLE, [{"age": "40", "sex": "male"}] * 2)


def test_the_outcomes_of_a_column_add_up() -> None:
    cells = [{"age": age} for age in ("40", "", "unknown", "480", "x")]
    assert outcomes(TABLE.column[0], cells) == {
        "given": 1,
        "missing": 2,
        rule_codes.VALUE_RANGE: 1,
        rule_codes.VALUE_UNKNOWN: 1,
    }


def test_a_prepared_site_has_the_rows_of_its_images(tmp_path: Path, make_plan: Any) -> None:
    """From a site's own columns and words; what is left out is counted, and a cache is renewed."""
    text = "image,label,Alter,m/w\n"
    for k in range(20):
        Pillow.fromarray(np.full((16, 16), k, np.uint8)).save(tmp_path / f"{k}.png")
        text += f"{k}.png,{('no', 'yes')[k % 2]},{20 + k if k else 999},{'mw'[k % 2]}\n"
    (tmp_path / "labels.csv").write_text(text)
    words = {"m": "male", "w": "female"}
    beside = {"age": ColumnOptions("alter"), "sex": ColumnOptions("m/w", words)}

    def plan_with(*columns: Any) -> Plan:
        content = make_plan(classes=["no", "yes"]).model_dump(exclude_defaults=True)
        return plan_from(content | {"table": {"column": list(columns)}})

    plan = plan_with(*COLUMNS[:2])
    spec = DatasetSpec(tmp_path, labels=LabelOptions(beside=beside))
    samples = read_dataset(spec, plan.task).samples
    cache = tmp_path / "cache"
    for _ in range(2):  # made, and read back
        site = prepare("site", samples, plan, cache)
        assert site.left_out == {rule_codes.VALUE_RANGE: 1}
        assert site.table is not None and site.table.shape == (19, 4)
        grey = [
            int(sample.columns["age"]) - 20 for sample in samples if sample.columns["age"] < "9"
        ]
        np.testing.assert_allclose(site.table[:, 0], [2 * k / 80 - 1 for k in grey], atol=1e-6)
        np.testing.assert_array_equal(site.table[:, 2], [k % 2 for k in grey])
    wider = plan_with({**COLUMNS[0], "range": [0, 1000]}, COLUMNS[1])
    again = prepare("site", samples, wider, cache)
    assert len(again.images) == 20 and again.left_out == {}
    with pytest.raises(DataError, match="plan's columns"):
        prepare("site", samples, plan_with(*COLUMNS), cache)
