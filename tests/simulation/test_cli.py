"""The command itself, as a user's shell runs it: its files, its exit codes, its Ctrl-C."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from forked_command import ForkedCommand
from safetensors import safe_open

from fedward.models.finished import open_finished
from fedward.plan import load_plan, plan_hash
from fedward_server.results import StudyResults

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "fedward_simulation.cli"
COMMAND = [sys.executable, "-m", PROGRAM]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0"}
DIVIDED = ("--partition", "iid", "--sites", "2", "--device", "cpu")
DP_SGD = 'mechanism = "dp-sgd"\nepsilon = 8\ndelta = 1e-3\nclipping_norm = 1.0'
pytestmark = pytest.mark.integration


def simulate(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )


def change(plan: Path, old: str, new: str) -> None:
    """Edit a plan; the old text must be there."""
    text = plan.read_text("utf-8")
    assert old in text
    plan.write_text(text.replace(old, new), "utf-8")


def read_results(out: Path) -> StudyResults:
    """What ``metrics.json`` says, held against its schema."""
    return StudyResults.model_validate_json((out / "metrics.json").read_text("utf-8"))


def check_model(out: Path, plan: Path, complete: bool) -> None:
    """The delivered model opens, is not empty, and says which plan it came from."""
    with safe_open(out / "model.safetensors", "np") as file:
        facts = file.metadata()
        assert all(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    assert facts["plan_sha256"] == plan_hash(load_plan(plan))
    assert open_finished(out / "model.safetensors").plan == load_plan(plan)
    assert facts["classes"] == "no,yes"
    assert facts["complete"] == str(complete).lower()


def test_a_run_leaves_report_metrics_model_and_plan(
    npz_data: Path, plan_file: Path, tmp_path: Path
) -> None:
    done = simulate(
        "run", plan_file, "--data", npz_data, *DIVIDED, "--out", "out/here", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "federated: round 2 of 2" in done.stdout
    assert "Report: out/here/report.html" in done.stdout
    out = tmp_path / "out" / "here"
    results = read_results(out)
    assert results.complete and results.partition == "iid"
    assert [arm.kind for arm in results.arms] == ["federated"]
    assert [round_.round for round_ in results.arms[0].rounds] == [1, 2]
    assert results.arms[0].rounds[0].bytes_up > 0
    assert set(results.arms[0].test.per_site) == {"site-1", "site-2"}  # type: ignore[union-attr]
    report = (out / "report.html").read_text("utf-8")
    assert "site-2" in report and "<script src" not in report and "http://" not in report
    told, name = (out / "plan.sha256").read_text("utf-8").split()
    assert hashlib.sha256((out / name).read_bytes()).hexdigest() == told == results.plan_sha256
    check_model(out, plan_file, complete=True)


def test_json_is_one_object_on_standard_output_with_all_arms(
    npz_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    done = commands(
        PROGRAM,
        "run",
        plan_file,
        "--data",
        npz_data,
        *DIVIDED,
        "--baselines",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert told["out"] == "runs/latest"
    results = StudyResults.model_validate_json(json.dumps(told["studies"][0]))
    assert results == read_results(tmp_path / "runs" / "latest")
    assert [arm.name for arm in results.arms] == [
        "federated",
        "alone: site-1",
        "alone: site-2",
        "pooled",
    ]
    assert all(arm.test is not None and len(arm.rounds) == 2 for arm in results.arms)
    assert "federated: round 1 of 2" in done.stderr


def test_other_epsilons_run_beside_a_private_plan(
    npz_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    change(plan_file, 'mechanism = "none"', DP_SGD)
    change(plan_file, "rounds = 2", "rounds = 1")
    done = commands(
        PROGRAM, "run", plan_file, "--data", npz_data, *DIVIDED, "--epsilons", "8,3", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    arms = read_results(tmp_path / "runs" / "latest").arms
    assert [arm.epsilon for arm in arms] == [8, 3, None]
    noise = [arm.privacy["site-1"].noise_multiplier for arm in arms[:2]]
    assert noise[0] < noise[1]
    for arm in arms[:2]:
        assert all(0 < spent.epsilon <= (arm.epsilon or 0) for spent in arm.privacy.values())


WEIGHTS = f'[model.initial_weights]\nfile = "w.pt"\nsha256 = "{"0" * 64}"\n[training]'
# The plan's change, the arguments, the exit code of docs/errors.md, what the message says.
FAILURES: list[tuple[tuple[str, str] | None, tuple[str, ...], int, str]] = [
    (None, ("--epsilons", "1,3"), 10, "[privacy]"),
    (None, ("--sites", "1"), 10, "participation.sites"),
    (None, ("--data", "nothing"), 11, "data"),
    (None, ("--partition", "alphabet"), 11, "alphabet"),
    (None, ("--partition", "folders"), 11, "folder"),
    (None, ("--format", "dicom"), 11, "labels.csv"),
    (("[training]", WEIGHTS), (), 13, "model.initial_weights.file"),
    (None, ("--device", "cuda:99"), 15, "cuda:99"),
    (None, ("--device", "abacus"), 15, "abacus"),
    (("sites = 2", "sites = 2\nminimum_patients = 9999"), (), 17, "0 of 2"),
    (None, ("--out", "plan.toml/out"), 18, "--out"),
]


def test_each_failure_has_its_exit_code_and_no_traceback(
    npz_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    text = plan_file.read_text("utf-8")
    for failure in FAILURES:
        edit, arguments, code, says = failure
        plan_file.write_text(text, "utf-8")
        if edit:
            change(plan_file, *edit)
        words = ("run", plan_file, "--data", npz_data, *DIVIDED, *arguments)
        done = commands(PROGRAM, *words, cwd=tmp_path)
        assert done.returncode == code, (failure, done.stderr)
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ") and says in last, (failure, done.stderr)
        assert "Traceback" not in done.stdout + done.stderr
        assert str(tmp_path) not in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "arguments", "code", "says"),
    [
        pytest.param("rounds = 2", "round = 2", (), 10, "training.round", id="unknown key"),
        pytest.param("sites", "sites", ("--epsilons", "much"), 2, "1,3,8", id="no number"),
        pytest.param("sites", "sites", ("--epsilon", "1"), 2, "--epsilon", id="no option"),
    ],
)
def test_a_wrong_command_or_plan_fails_before_the_slow_imports(
    old: str,
    new: str,
    arguments: tuple[str, ...],
    code: int,
    says: str,
    npz_data: Path,
    plan_file: Path,
    tmp_path: Path,
) -> None:
    change(plan_file, old, new)
    done = simulate("run", plan_file, "--data", npz_data, *arguments, folder=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_failure_with_json_is_an_object_too(tmp_path: Path) -> None:
    done = simulate("plan", "check", "none.toml", "--json", folder=tmp_path)
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["error"], told["exit_code"], done.returncode) == ("PlanError", 10, 10)
    assert told["message"] in done.stderr


@pytest.mark.parametrize("words", [("--nope",), ("--seed", "x"), ("--epsilons", "much")])
def test_a_wrong_command_with_json_is_an_object_too(
    words: tuple[str, ...], plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    done = commands(PROGRAM, "run", plan_file, "--data", "x", *words, "--json", cwd=tmp_path)
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["error"], told["exit_code"], done.returncode) == ("UsageError", 2, 2)
    assert words[-1].lstrip("-") in told["message"] or "1,3,8" in told["message"]


@pytest.mark.parametrize("program", ["fedward_client.cli", "fedward_server.cli", PROGRAM])
def test_each_program_tells_its_version(program: str, tmp_path: Path, commands: Any) -> None:
    done = commands(program, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"fedward {version('fedward')}\n")


def test_a_run_that_fails_leaves_no_report_that_looks_current(
    npz_data: Path, plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    words = ("run", plan_file, "--data", npz_data, *DIVIDED, "--out", "out")
    assert commands(PROGRAM, *words, cwd=tmp_path).returncode == 0
    out = tmp_path / "out"
    first = (out / "report.html").read_bytes()
    for _ in range(2):
        assert commands(PROGRAM, *words, "--partition", "x", cwd=tmp_path).returncode == 11
        assert {path.name for path in out.iterdir()} == {"cache", "earlier-results"}
        assert (out / "earlier-results" / "report.html").read_bytes() == first
    assert commands(PROGRAM, *words, cwd=tmp_path).returncode == 0
    assert (out / "report.html").is_file() and not (out / "earlier-results").exists()


def test_plan_check_explains_and_tells_the_hash(
    plan_file: Path, tmp_path: Path, commands: Any
) -> None:
    check = ("plan", "check", plan_file)
    text, asked = (commands(PROGRAM, *check, *more, cwd=tmp_path) for more in ((), ("--json",)))
    assert text.returncode == asked.returncode == 0, text.stderr
    sha = plan_hash(load_plan(plan_file))
    assert sha in text.stdout and "no, yes" in text.stdout
    told = json.loads(asked.stdout)
    assert told["valid"] is True and told["plan_sha256"] == sha and told["rounds"] == 2
    assert told["parameters"] > 0 and told["plan"]["privacy"]["mechanism"] == "none"


def _group_is_gone(group: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def _signals() -> Iterator[None]:
    """A shell's background job ignores Ctrl-C, and so would what the tests start from one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# A terminal sends Ctrl-C to the whole group, workers included.


def test_ctrl_c_keeps_finished_rounds_and_leaves_no_process(
    npz_data: Path, plan_file: Path, tmp_path: Path
) -> None:
    change(plan_file, "rounds = 2", "rounds = 5000")
    command = ForkedCommand(tmp_path, "run", plan_file, "--data", npz_data, *DIVIDED)
    command.wait_for("round 1 of 5000")
    code = command.end(signal.SIGINT, group=True)
    errors = command.err.read_text("utf-8")
    assert _group_is_gone(command.pid), "a worker outlived the command"
    assert code == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    out = tmp_path / "runs" / "latest"
    results = read_results(out)
    assert not results.complete
    assert 1 <= len(results.arms[0].rounds) < 5000
    assert (out / "report.html").is_file() and (out / "plan.json").is_file()
    check_model(out, plan_file, complete=False)


@pytest.mark.usefixtures("_signals")
def test_ctrl_c_before_the_first_round_ends_cleanly(
    npz_data: Path, plan_file: Path, tmp_path: Path
) -> None:
    """Also in the middle of an import, so this is a program that starts."""
    process = subprocess.Popen(
        [*COMMAND, "run", plan_file, "--data", npz_data, *DIVIDED],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert any("reading the data" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert _group_is_gone(process.pid), "a worker outlived the command"
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
