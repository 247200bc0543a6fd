"""``fedward-client watch``: what comes is predicted once, and stored once, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_start
from hostile_pacs import Pacs, web

from fedward.errors import OutputError
from fedward.models.finished import open_finished
from fedward_client.predict.inputs import find_inputs
from fedward_client.predict.run import Results, Wish
from fedward_client.predict.watch import Watch
from fedward_client.training.runtime import Runtime


def write(dx: Any, folder: Path, *numbers: int, **tags: Any) -> None:
    for k in numbers:
        pixels = np.random.default_rng(k).integers(0, 4096, (20, 24))
        about = {"PatientID": f"P{k}", "StudyInstanceUID": f"1.2.3.{k}"}
        dx(folder / f"{k:03}.dcm", pixels, **about, SeriesInstanceUID=f"1.2.3.{k}.4", **tags)


def build(model: Path, folder: Path, out: Path, **more: Any) -> Watch:
    wish = Wish(open_finished(model), folder, out)

    def look() -> Any:
        return find_inputs(folder, wish.model.plan.task), wish

    return Watch(wish, look, Runtime(), **{"every": 0.01, "settle": 0.0, **more})


def notes(out: Path) -> dict[str, str]:
    told = [json.loads(path.read_text()) for path in (out / "dead-letter").glob("*.json")]
    return {one["input"]: one["reason"] for one in told}


def lines(out: Path) -> list[str]:
    return (out / "progress.jsonl").read_text().splitlines()


def test_what_comes_is_predicted_and_stored_once(tmp_path: Path, dx: Any, chest: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    stored: list[int] = []

    def store() -> tuple[bool, dict[str, str]]:
        stored.append(len(list((out / "dicom").iterdir())))
        return True, {}

    folder.mkdir()
    fetched: list[int] = []

    def fetch() -> tuple[bool, dict[str, str]]:
        fetched.append(1)
        write(dx, folder, *(range(2) if len(fetched) == 1 else ()))
        return True, {}

    watching = build(chest, folder, out, store=store, fetch=fetch)
    assert watching.run(once=True).predicted == 2 and stored == [2]
    write(dx, folder, 2)
    assert watching.run(once=True).predicted == 3 and stored == [2, 3]
    assert len(lines(out)) == 4  # and the head
    assert watching.run(once=True).predicted == 3 and stored == [2, 3]
    told = json.loads((out / "predictions.json").read_text())["inputs"]
    assert [one["name"] for one in told] == ["000.dcm", "001.dcm", "002.dcm"]
    (folder / "000.dcm").unlink()
    write(dx, folder, 3)
    again = build(chest, folder, out, store=store)
    assert again.run(once=True).predicted == 3 and stored == [2, 3, 4]
    told = json.loads((out / "predictions.json").read_text())["inputs"]
    assert len(told) == 4  # also those whose image is gone


def test_what_cannot_be_predicted_gets_a_note(tmp_path: Path, dx: Any, chest: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write(dx, folder, 0)
    write(dx, folder, 1, Modality="MR")
    (folder / "letter.txt").write_text("no image")
    said: list[str] = []
    count = build(chest, folder, out, tell=said.append).run(once=True)
    assert (count.predicted, count.dead, count.waiting) == (1, 2, 0)
    why = {"001.dcm": "modality MR; the model is for DX", "letter.txt": "not DICOM"}
    assert notes(out) == why
    assert len([one for one in lines(out) if "001.dcm" in one]) == 3  # tried with growing pauses
    assert said[-1] == "1 predicted, 0 waiting, 2 in dead-letter"
    assert not any("dcm" in one for one in said)
    count = build(chest, folder, out).run(once=True)
    assert (count.predicted, count.dead) == (1, 2) and len(lines(out)) == 5
    write(dx, folder, 1)  # mended
    assert build(chest, folder, out).run(once=True).predicted == 2
    (out / "dead-letter" / next((out / "dead-letter").glob("letter*")).name).unlink()
    assert build(chest, folder, out).run(once=True).dead == 1


def test_what_still_changes_waits(tmp_path: Path, dx: Any, chest: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write(dx, folder, 0, 1)
    watching = build(chest, folder, out, settle=1000.0)
    results = Results(watching.wish, watching.runtime)
    watching._look(results)
    assert (watching.count.waiting, watching.count.predicted) == (2, 0)
    assert not results.records()
    watching.settle, watching._next = 0.0, 0.0
    path = folder / "001.dcm"
    os.utime(path, ns=(1, 1))  # it changed meanwhile
    watching._look(results)
    assert (watching.count.waiting, watching.count.predicted) == (0, 2)


def test_a_step_that_fails_is_tried_later(tmp_path: Path, dx: Any, chest: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write(dx, folder, 0)
    answers = iter([(False, {}), (True, {"x.seg.dcm": "it is too large"})])
    moments: list[float] = []

    def store() -> Any:
        moments.append(time.monotonic())
        return next(answers)

    count = build(chest, folder, out, store=store, every=0.1).run(once=True)
    assert moments[1] - moments[0] >= 0.1 and count.failing == 0
    assert notes(out) == {"x.seg.dcm": "the PACS does not take it: it is too large"}
    write(dx, folder, 1)
    count = build(chest, folder, out, store=lambda: (False, {})).run(once=True)
    assert (count.failing, count.predicted) == (1, 2)


def test_an_input_that_ends_the_process_is_left_aside(
    tmp_path: Path, dx: Any, chest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that crashes, or memory that runs out: three times, then the others go on."""
    folder, out = tmp_path / "in", tmp_path / "out"
    write(dx, folder, 0, 1, 2)
    watching, real = build(chest, folder, out), Results.of

    def crash(results: Results, source: Any) -> Any:
        if source.name == "001.dcm":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(results, source)

    monkeypatch.setattr(Results, "of", crash)
    for turn in range(3):
        child = os.fork()
        if child == 0:
            try:
                watching.run(once=True)
            finally:
                os._exit(70)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), turn
    count = build(chest, folder, out).run(once=True)
    assert (count.predicted, count.dead) == (2, 1)
    assert notes(out) == {"001.dcm": "the process ended 3 times while it predicted it"}


def test_two_at_a_time_are_refused(tmp_path: Path, dx: Any, chest: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write(dx, folder, 0)
    inner = build(chest, folder, out)

    def store() -> Any:
        with pytest.raises(OutputError, match="one process at a time"):
            inner.run(once=True)
        return True, {}

    assert build(chest, folder, out, store=store).run(once=True).predicted == 1


@pytest.mark.integration
def test_a_kill_loses_nothing_and_sigterm_ends_it(tmp_path: Path, dx: Any, chest: Path) -> None:
    """Killed while it predicts and while the PACS takes an object; then ended; then to the end."""
    folder, out = tmp_path / "in", tmp_path / "out"
    write(dx, folder, *range(12))
    pacs = Pacs([])
    with web(pacs) as table:
        (tmp_path / "site.toml").write_text(
            'version = 1\n[site]\nname = "st-mary"\n[datasets.chest]\nroot = "data"\n'
            'task = "classification"\nclasses = ["well", "sick"]\n'
            "[importer]\nallow_unconfined = true\n" + table.replace("2.0", "100.0")
        )
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "fedward_client.cli", "watch", str(chest), str(folder)]
        command += ["--out", str(out), "--store", "--settle", "0", "--every", "0.1"]
        command += ["--config", str(tmp_path / "site.toml")]

        def run(ready: Any, name: signal.Signals) -> subprocess.Popen[str]:
            working = warm_start.popen(command, stdout=pipe, stderr=pipe, text=True)
            while not ready():
                assert working.poll() is None, working.communicate()
                time.sleep(0.01)
            os.kill(working.pid, name)
            return working

        journal = out / "progress.jsonl"
        run(lambda: journal.exists() and len(lines(out)) > 3, signal.SIGKILL).communicate()
        held = [True]

        def takes(one: Any) -> int | None:
            return None if len(pacs.objects) == 5 and held.pop() else 0x0000

        pacs.takes = takes
        run(lambda: len(pacs.objects) == 6, signal.SIGKILL).communicate()
        pacs.end.set()
        write(dx, folder, 12)
        working = run(lambda: len(pacs.objects) == 13, signal.SIGTERM)
        _, said = working.communicate(timeout=100)
        assert working.returncode == 0 and "stopped; what was done is kept" in said
        write(dx, folder, 13)
        done = warm_start.run([*command, "--once"], 100, stdout=pipe, stderr=pipe, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("14 predicted, 0 in dead-letter")
    assert len(pacs.objects) == 14 and set(pacs.received.values()) == {1}
    assert not any(word in done.stderr for word in ("P13", "013.dcm", "1.2.3"))
