from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from fedward import errors
from fedward.errors import FedwardError, ModelError, WeightsError

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text("utf-8")
ROWS = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE, re.MULTILINE))


def _all(kind: type[FedwardError]) -> list[type[FedwardError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _all(child))]


# What a room raises and catches itself has the code of the error that it is a kind of.
KINDS = [kind for kind in _all(FedwardError) if kind.__module__ == "fedward.errors"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_row_with_its_exit_code(kind: type[FedwardError]) -> None:
    assert ROWS.get(str(kind.exit_code)) == kind.__name__


def test_every_row_is_an_error() -> None:
    assert set(ROWS.values()) == {kind.__name__ for kind in KINDS}
    assert len(ROWS) == len(KINDS)


def test_exit_codes_are_unique_and_leave_the_command_line_its_own() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert not {0, 2} & set(codes)
    assert all(0 < code < 256 for code in codes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_at_the_top_of_the_module_is_true(kind: type[FedwardError]) -> None:
    assert re.search(rf"\b{kind.__name__}\s+{kind.exit_code}\b", errors.__doc__ or "")


def test_a_message_states_where_rule_value_and_fix() -> None:
    error = FedwardError("must be even", value=3, fix="Add one", where="a.b")
    assert str(error) == "a.b: must be even (got 3). Add one."
    assert str(FedwardError("must be even", value="three")) == "must be even (got three)."
    assert str(FedwardError("must be even")) == "must be even."


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_the_way_back_from_a_worker(kind: type[FedwardError]) -> None:
    error = kind("must be even", value=[3], fix="Add one", where="a")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is kind
    assert (str(again), again.value, again.where) == (str(error), [3], "a")


def test_weights_errors_are_model_errors() -> None:
    assert issubclass(WeightsError, ModelError)
