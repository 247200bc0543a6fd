"""All that is wrong in a file at once, with its line and with what may have been meant."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from fedward.errors import PlanError, together
from fedward.plan import parse_plan

WRONG = """version = 1
rounds = 3

[study]
name = "chest"
titel = "x"

[task]
kind = "classification"
classes = ["a", "a"]

[preprocessing]
size = [32, 32, 32]
window = [
  1,
  0,
]
percentiles = [5, 200]

[model]
name = "ResNet-18"

[training]
lr = 0.1
local_epochs = 1
loss = "bce"
batch_size = 0

[privacy]
mechanism = "none"
epsilon = 3.0

[metrics]
report = ["auc"]
primary = "aucc"
"""


def told(text: str) -> list[str]:
    with pytest.raises(PlanError) as failed:
        parse_plan(text)
    return [line.strip() for line in str(failed.value).splitlines()]


def test_each_error_has_its_line_and_its_next_step() -> None:
    lines = told(WRONG)
    assert lines[0].endswith("9 more to mend after this one:") and len(lines) == 10
    for start, step in {
        "line 6, study.titel": "Did you mean `title`?",
        "line 14, preprocessing.window: window and percentiles": "Keep one",
        "line 14, preprocessing.window: window must rise": "Swap",
        "line 18, preprocessing.percentiles": "Bring both into that range",
        "line 21, model.name": "Did you mean `resnet18`?",
        "line 24, training.lr": "Did you mean `learning_rate`?",
        "line 27, training.batch_size": "Raise it",
        "line 31, privacy.epsilon": "Remove",
        "line 35, metrics.primary": "Did you mean `auc`?",
        "line 2, rounds": "It belongs in [training] or [stages]",
    }.items():
        (line,) = (line for line in lines if line.startswith(start))
        assert step in line, line


def test_rules_between_keys_are_told_beside_unknown_keys() -> None:
    """An unknown key hides no rule; nor does the key that it stands for seem to be missing."""
    mended = re.sub(r'^(window|percentiles) = .*|^  [10],|^\]|"aucc"', "", WRONG, flags=re.M)
    mended = mended.replace("primary = ", 'primary = "auc"').replace("batch_size = 0", "rounds = 1")
    mended = mended.replace("epsilon = 3.0", "").replace("ResNet-18", "resnet18")
    lines = told(mended)
    assert not any("learning_rate go together" in line for line in lines)
    keys = {re.sub(r"line \d+, |[:].*", "", line) for line in lines}
    assert keys == {
        "rounds",
        "study.titel",
        "training.lr",
        "task.classes",
        "preprocessing.size",
        "training.loss",
    }


def test_a_missing_key_is_told_at_its_table() -> None:
    (line,) = (one for one in told(WRONG.replace('kind = "cl', '# "')) if "task.kind" in one)
    assert line.startswith("line 8, task.kind: this key is required")


def test_very_many_errors_are_counted() -> None:
    lines = told("\n".join(f"k{n} = 1" for n in range(300)))
    assert len(lines) < 110 and re.fullmatch(r"and \d+ more\.", lines[-1])


def test_several_errors_stay_one_between_processes() -> None:
    made = together([PlanError("a rule", fix="Mend", where="x.y"), PlanError("b")], {"x.y": 3}.get)
    assert str(copy.copy(made)) == str(made)
    assert str(made).startswith("line 3, x.y: a rule. Mend. 1 more to mend after this one:\n  b.")


def test_the_command_line_tells_all(tmp_path: Path, commands: Any) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(WRONG, "utf-8")
    done = commands("fedward_simulation.cli", "plan", "check", str(plan), cwd=tmp_path)
    assert done.returncode == PlanError.exit_code
    assert "line 24, training.lr" in done.stderr and "line 35, metrics.primary" in done.stderr
