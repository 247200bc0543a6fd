"""What a plan asks for is found out without data, by the check and by the run alike."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from fedward.errors import PlanError
from fedward.models import build_model
from fedward.plan import load_plan
from fedward_server.results import StudyResults
from fedward_simulation.feasible import start_model

PROGRAM = "fedward_simulation.cli"
STAGES = '[[stages]]\nname = "a"\nrounds = 1\nlearning_rate = 0.1\ntrain = ["nothing*"]\n'
RATES = "rounds = 2\nlearning_rate = 0.01\n"
NONE = 'mechanism = "none"'
DP_SGD = (
    'mechanism = "dp-sgd"\nepsilon = {}\ndelta = 1e-3\nclipping_norm = 1.0\nsampling_rate = 0.3'
)
WEIGHTS = '[model.initial_weights]\nfile = "{}"\nsha256 = "{}"\n[training]'
# changes of the plan, exit code, what the message says
ASKS_TOO_MUCH: dict[str, tuple[list[tuple[str, str]], int, str]] = {
    "size": (
        [('"cnn"\nchannels = [4, 8]', '"densenet121"'), ("[16, 16]", "[8, 8]")],
        10,
        "preprocessing.size: densenet121",
    ),
    "pattern": ([(RATES, ""), ("[metrics]", STAGES + "[metrics]")], 10, "stages.0.train: "),
    "weights": ([("[training]", WEIGHTS.format("w.pt", "0" * 64))], 13, "initial_weights.file: "),
    "epsilon": ([(NONE, DP_SGD.format("1e-12"))], 14, "privacy: "),
}
pytestmark = pytest.mark.integration


def change(plan: Path, *changes: tuple[str, str]) -> None:
    text = plan.read_text("utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    plan.write_text(text, "utf-8")


@pytest.mark.parametrize("what", ASKS_TOO_MUCH)
def test_check_and_run_refuse_it_before_an_image_is_read(
    what: str, npz_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    changes, code, says = ASKS_TOO_MUCH[what]
    change(plan_file, *changes)
    run = ("run", plan_file, "--data", npz_data, "--partition", "iid", "--device", "cpu")
    for words in (("plan", "check", plan_file), run):
        done = commands(PROGRAM, *words, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert f"error: {says}" in done.stderr.replace("model.initial", "initial")
        assert "Traceback" not in done.stderr and "reading the data" not in done.stdout


@pytest.mark.parametrize(
    ("privacy", "epsilons", "code"),
    [(NONE, "1,3", 10), (DP_SGD.format("8"), "1e-12", 14)],
)
def test_other_epsilons_are_refused_before_an_image_is_read(
    privacy: str,
    epsilons: str,
    code: int,
    npz_data: Path,
    plan_file: Path,
    tmp_path: Path,
    commands: Any,
) -> None:
    change(plan_file, (NONE, privacy))
    words = ("--data", npz_data, "--partition", "iid", "--epsilons", epsilons)
    done = commands(PROGRAM, "run", plan_file, *words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "reading the data" not in done.stdout


def test_arrays_that_public_weights_leave_fresh_are_named(
    npz_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    state = build_model(load_plan(plan_file), 0).state_dict()
    first, head = next(iter(state)), "fc.weight"
    file = {name: tensor.clone() for name, tensor in state.items() if name != first}
    file[head] = file[head][:1].clone()
    save_file(file, tmp_path / "w.safetensors")
    digest = hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    change(plan_file, ("[training]", WEIGHTS.format("w.safetensors", digest)))
    words = ("--data", npz_data, "--partition", "iid", "--device", "cpu")
    done = commands(PROGRAM, "run", plan_file, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "latest"
    results = StudyResults.model_validate_json((out / "metrics.json").read_text("utf-8"))
    assert results.weights_report == {
        "matched": len(state) - 2,
        "missing": 1,
        "reshaped_head": 1,
        "unused": 0,
    }
    assert results.weights_names == {"missing": [first], "reshaped_head": [head]}
    report = (out / "report.html").read_text("utf-8")
    assert f"<code>{first}</code>" in report and f"<code>{head}</code>" in report


def test_a_stage_of_which_all_stays_at_the_sites_is_refused_before_it_starts(
    make_plan: Any,
) -> None:
    stages = [
        {"name": "all", "rounds": 2, "learning_rate": 0.1},
        {"name": "head", "rounds": 1, "learning_rate": 0.1, "train": ["fc.*"]},
    ]
    training = {"rounds": None, "learning_rate": None}
    plan = make_plan(training=training, stages=stages, personal={"method": "fedper"})
    with pytest.raises(PlanError, match=r"personal\.method: each stage must train"):
        start_model(plan, 0, None)
    start_model(make_plan(personal={"method": "fedper"}), 0, None)
