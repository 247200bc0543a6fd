"""A run that is killed or ended leaves results, and the same command goes on to the same end."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked_command import ForkedCommand

from fedward.errors import OutputError
from fedward.models import build_model, to_arrays
from fedward.plan import load_plan, plan_hash
from fedward_server.job import Job
from fedward_server.report import read_metrics
from fedward_server.results import Arm, Round, SitePrivacy, StudyResults
from fedward_simulation.checkpoint import ArmFolder, RunCheckpoints
from fedward_simulation.options import Options
from fedward_simulation.output import write_outputs
from fedward_simulation.study import Study

PRIVATE = 'mechanism = "dp-sgd"\nepsilon = 8\ndelta = 1e-3\nclipping_norm = 1.0'
ADAM = '[strategy]\nname = "fedadam"\nsettings = { eta = 0.01 }\naveraging = 0.5\n[participation]'
WORDS = ("--partition", "iid", "--sites", "2", "--device", "cpu", "--baselines", "--json")
Make = Callable[..., Any]


@pytest.fixture(params=["plain", "private"])
def plan(request: Any, plan_file: Path) -> Path:
    """A plan with memory at the server; without and with privacy."""
    text = plan_file.read_text("utf-8").replace("rounds = 2", "rounds = 3")
    text = text.replace("[participation]", ADAM)
    if request.param == "private":
        text = text.replace('mechanism = "none"', PRIVATE)
    plan_file.write_text(text, "utf-8")
    return plan_file


def results_of(out: Path) -> StudyResults:
    """What a run left, without what differs from run to run."""
    (results,) = read_metrics(out / "metrics.json")
    for arm in results.arms:
        arm.seconds = 0.0
        for round_ in arm.rounds:
            round_.seconds = 0.0
            for site in round_.sites.values():
                site.seconds = site.cpu_seconds = 0.0
    results.seconds = results.start_up_seconds = 0.0
    return results


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where two results differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from differences(one.get(key), other.get(key), f"{at}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{at}[{place}]")
    elif one != other:
        yield f"{at}: {one} != {other}"


def assert_same(out: Path, whole: Path) -> None:
    """The same model to the byte, and the same figures and privacy."""
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (out, whole))
    assert one == other
    again, first = results_of(out), results_of(whole)
    for arm, expected in zip(again.arms, first.arms, strict=True):
        assert arm.privacy.keys() == expected.privacy.keys()
        for site, spent in arm.privacy.items():
            assert spent.steps == expected.privacy[site].steps
            # The accountant's last digits depend on the process.
            assert spent.epsilon == pytest.approx(expected.privacy[site].epsilon, rel=1e-9)
            spent.epsilon = expected.privacy[site].epsilon
            for round_, same in zip(arm.rounds, expected.rounds, strict=True):
                found, wanted = round_.sites[site].epsilon, same.sites[site].epsilon
                assert found == pytest.approx(wanted, rel=1e-9)
                round_.sites[site].epsilon = wanted
    assert list(differences(again.model_dump(), first.model_dump())) == []


def written(out: Path) -> set[str]:
    """Checkpoints that are there."""
    found = set[str]()
    for arm in out.glob("checkpoints/*"):
        with suppress(FileNotFoundError):  # an arm that is complete loses its folder
            found |= {f"{arm.name}/{one.name}" for one in arm.glob("round-*")}
    return found


def wait_for_new(command: ForkedCommand, out: Path, count: int) -> None:
    """Until the run has written so many more checkpoints, or has ended."""
    seen, before = set[str](), written(out)
    while command.runs() and len(seen) < count:
        seen |= written(out) - before
        time.sleep(0.002)


@pytest.mark.integration
def test_a_run_killed_at_random_rounds_ends_as_one_that_was_not(
    plan: Path, npz_data: Path, tmp_path: Path
) -> None:
    run = ("run", plan, "--data", npz_data, *WORDS)
    assert ForkedCommand(tmp_path, *run, "--out", "whole").end() == 0
    out, kills, chance = tmp_path / "out", 0, random.Random(os.environ.get("FEDWARD_SEED"))
    rounds: list[int] = []
    while True:
        seldom = () if kills == 2 else ("--checkpoint-seconds", "0")
        command = ForkedCommand(tmp_path, *run, "--out", "out", *seldom)
        wait_for_new(command, out, chance.randint(2, 4) if kills < 2 else 1000)
        if not command.runs():
            assert command.end() == 0, command.err.read_text()
            break
        time.sleep(chance.uniform(0, 0.1))
        command.end(signal.SIGKILL)
        kills += 1
        # What is there can be used, and says what is missing.
        left = results_of(out)
        assert not left.complete and left.missing
        assert "INTERRUPTED" in (out / "report.html").read_text("utf-8")
        assert (out / "model.safetensors").is_file()
        rounds.append(sum(len(arm.rounds) for arm in left.arms))
        for arm in left.arms:
            for spent in arm.privacy.values():  # 12 steps in a round
                assert spent.last_round == len(arm.rounds) and spent.epsilon > 0
    assert kills == 2 and rounds == sorted(rounds)
    assert_same(out, tmp_path / "whole")
    assert not (out / "checkpoints").exists()
    assert "going on with an unfinished run" in command.err.read_text()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("how", "group", "ignored"),
    [
        (signal.SIGTERM, True, signal.SIGHUP),
        (signal.SIGINT, False, signal.SIGINT),
        (signal.SIGHUP, False, None),
    ],
    ids=["SIGTERM to all under nohup", "SIGINT in background", "SIGHUP"],
)
@pytest.mark.parametrize("plan", ["plain"], indirect=True)
def test_a_signal_ends_a_run_with_all_complete_rounds_kept(
    plan: Path,
    npz_data: Path,
    tmp_path: Path,
    how: signal.Signals,
    group: bool,
    ignored: signal.Signals | None,
) -> None:
    text = plan.read_text("utf-8").replace("rounds = 3", "rounds = 500")
    plan.write_text(text, "utf-8")
    run = ("run", plan, "--data", npz_data, *WORDS, "--out", "out", "--checkpoint-seconds", "3600")
    command, out = ForkedCommand(tmp_path, *run, ignore=ignored), tmp_path / "out"
    while "federated: round 3 of 500" not in command.err.read_text("utf-8"):
        assert command.runs()
        time.sleep(0.01)
    assert not written(out)  # so soon nothing is written but what a signal asks for
    assert command.end(how, group=group) == 130
    told = json.loads((out / "metrics.json").read_text("utf-8"))
    done = len(told["arms"][0]["rounds"])
    assert done >= 3 and not told["arms"][0]["rounds"][-1]["failures"]
    says = f"missing: federated, {done} of 500 rounds done; alone: site-1, 0 of 500"
    errors = command.err.read_text("utf-8")
    assert says in errors and "The same command goes on" in errors and "Traceback" not in errors
    assert told["missing"][0] == f"federated, {done} of 500 rounds done"
    assert f"arm-0/round-{done:06d}" in written(out)


@pytest.mark.parametrize("plan", ["plain"], indirect=True)
def test_an_unfinished_run_of_something_else_is_refused_until_fresh(
    plan: Path, npz_data: Path, tmp_path: Path, commands: Any
) -> None:
    run = ("fedward_simulation.cli", "run", plan, "--data", npz_data, *WORDS, "--out", "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("of the unfinished run", "utf-8")
    start = Study(
        load_plan(plan),
        Options(
            data=npz_data,
            out=tmp_path / "out",
            partition="iid",
            sites=2,
            baselines=True,
            device="cpu",
        ),
    )
    start.checkpoints.begin("0" * 64)
    job = Job(start.plan, to_arrays(build_model(start.plan, 0)), Arm(name="t", kind="federated"))
    kept = start.checkpoints.arm("arm-0", plan_hash(start.plan)).open(job)
    job.arm.rounds.append(Round(round=1, stage="all", seconds=0.0))
    job.save(job)
    kept.flush()
    for more, says in (
        (("--seed", "1"), "seed 1, not 0"),
        (("--epsilons", ""), "on other images"),
        (("--partition", "shards:2"), "partition shards:2, not iid"),
    ):
        done = commands(*run, *more, cwd=tmp_path)
        assert done.returncode == 18, done.stderr
        assert says in done.stderr and "--fresh" in done.stderr and "Traceback" not in done.stderr
        assert (tmp_path / "out" / "report.html").read_text("utf-8") == "of the unfinished run"
    plan.write_text(plan.read_text("utf-8").replace("eta = 0.01", "eta = 0.02"), "utf-8")
    assert "plan " in commands(*run, cwd=tmp_path).stderr
    # This process is still at it.
    done = commands(*run, "--fresh", cwd=tmp_path)
    assert done.returncode == 18 and "one process at a time" in done.stderr
    start.checkpoints._lock.close()  # type: ignore[union-attr]
    done = commands(*run, "--fresh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "out").complete and not (tmp_path / "out/checkpoints").exists()


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    run = RunCheckpoints(tmp_path, {"plan": "a"}, 0)
    assert not run.begin("0" * 64)
    run._lock.close()  # type: ignore[union-attr]
    (tmp_path / "checkpoints" / "arm-0" / "round-000001").mkdir(parents=True)
    assert RunCheckpoints(tmp_path, {"plan": "a"}, 0).found()
    (tmp_path / "checkpoints" / "run.json").write_text("{", "utf-8")
    with pytest.raises(OutputError, match="--fresh"):
        RunCheckpoints(tmp_path, {"plan": "a"}, 0).found()


@pytest.fixture
def job(make_plan: Make) -> Job:
    plan = make_plan(training={"rounds": 50})
    return Job(plan, to_arrays(build_model(plan, 0)), Arm(name="t", kind="federated"))


def a_round(job: Job, number: int) -> None:
    """What a round does to a job."""
    job.arrays = {name: np.full_like(value, number) for name, value in job.arrays.items()}
    job.average = dict(job.arrays)
    job.arm.rounds.append(Round(round=number, stage="all", seconds=0.0))
    job.save(job)


def test_quick_rounds_are_written_once_in_a_while_and_a_large_model_less_often(
    job: Job, tmp_path: Path
) -> None:
    place = ArmFolder(tmp_path, plan_hash(job.plan), 0.05)
    kept, writes = place.open(job), list[float]()
    kept.wrote = lambda: (writes.append(time.monotonic()), time.sleep(0.02))[0]  # what it costs
    began = time.monotonic()
    for number in range(1, 51):
        a_round(job, number)
        time.sleep(0.02)
    took = time.monotonic() - began
    # The first after the least time; then a write of 20 ms is due each 400 ms.
    assert 1 <= len(writes) <= 2 + took / 0.4
    assert writes[0] - began >= 0.05
    kept.flush()
    kept.flush()
    assert place.rounds == 50
    again = Job(job.plan, to_arrays(build_model(job.plan, 0)), Arm(name="t", kind="federated"))
    place.open(again)
    assert len(again.arm.rounds) == 50 and all((v == 50).all() for v in again.arrays.values())


def test_what_is_written_is_a_round_that_has_ended(job: Job, tmp_path: Path) -> None:
    """A signal comes while the next round has charged a site and changed the model."""
    place = ArmFolder(tmp_path, plan_hash(job.plan), 3600)
    kept = place.open(job)
    spent = SitePrivacy(
        epsilon=0.0, delta=1e-5, noise_multiplier=1.0, sampling_rate=0.1, steps=4, last_round=1
    )
    job.arm.privacy["a"] = spent
    a_round(job, 1)
    job.arrays = {name: value + 1 for name, value in job.arrays.items()}
    job.arm.privacy["a"] = spent.model_copy(update={"steps": 8, "last_round": 2})
    kept.flush()
    again = Job(job.plan, to_arrays(build_model(job.plan, 0)), Arm(name="t", kind="federated"))
    place.open(again)
    assert all((value == 1).all() for value in again.arrays.values())
    assert (again.arm.privacy["a"].steps, again.arm.privacy["a"].last_round) == (4, 1)
    assert again.arm.privacy["a"].epsilon > 0.01  # of the steps that are told


def test_a_full_disk_ends_no_run(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = ArmFolder(tmp_path, plan_hash(job.plan), 0)
    kept = place.open(job)
    a_round(job, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        a_round(job, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert place.rounds == 1
    assert "round 2: a checkpoint must be writable" in caplog.text
    kept.flush()
    assert place.rounds == 2


def test_a_model_that_is_to_be_audited_is_not_left_behind_before(
    make_plan: Make, tmp_path: Path
) -> None:
    for audit in (False, True):
        plan = make_plan(
            privacy={
                "mechanism": "dp-sgd",
                "epsilon": 8.0,
                "delta": 1e-3,
                "clipping_norm": 1.0,
                "audit": audit,
            }
        )
        study = Study(plan, Options(data=tmp_path, out=tmp_path / str(audit)))
        study.model = to_arrays(build_model(plan, 0))
        study.results.arms.append(Arm(name="federated", kind="federated"))
        write_outputs([study], study.options.out)
        assert (study.options.out / "model.safetensors").exists() is not audit
        assert (study.options.out / "report.html").is_file()
