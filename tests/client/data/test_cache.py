"""The cache of prepared images against kills, full disks, other writers and its bound."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import warm_start

from fedward.errors import OutputError
from fedward.plan.load import canonical
from fedward_client.cohort.training import preparers
from fedward_client.data.prepare import Means, prepare, prepared_bytes
from fedward_client.data.sample import Sample
from fedward_client.worker_pool import Limits

ROOT = str(Path(__file__).parents[3])
MODULE = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from fedward_client.data.sample import Image

@dataclass(frozen=True)
class Known:
    value: int
    folder: str = ""
    how: str = ""
    def __call__(self):
        if self.folder:
            with (Path(self.folder) / "decoded").open("a") as file:
                file.write(f"{self.value}\\n")
        if self.how == "hang":
            time.sleep(600)
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.how == "wait":
            while not (Path(self.folder) / "go").exists():
                time.sleep(0.01)
        rows = np.random.default_rng(self.value).random((1, 16, 16)).astype(np.float32)
        return Image(rows, (1.0, 1.0))
    def identity(self):
        return str(self.value)
"""
PROGRAM = """
import json, sys
from pathlib import Path
from cache_work import Known
from fedward_client.data.prepare import Means, prepare
from fedward_client.data.sample import Sample
from fedward.errors import FedwardError
from fedward.plan.load import from_canonical

if __name__ == "__main__":
    cache, plan, how, folder = sys.argv[1:5]
    samples = [Sample(f"p{k}", Known(k, folder, how if k == 12 else ""), (k % 2,))
               for k in range(30)]
    try:
        site = prepare("x", samples, from_canonical(plan), Path(cache))
    except FedwardError as error:
        print(type(error).__name__, error)
        raise SystemExit(error.exit_code)
    print(float(site.images.sum()), flush=True)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Loaders that a spawned process can import."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "cache_work.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    sys.modules.pop("cache_work", None)
    return importlib.import_module("cache_work")


@pytest.fixture
def start(tmp_path, work, make_plan):
    path = tmp_path / "modules"
    running = []

    def start(how="", prefix=(), cache=None, before=""):
        program = f"import sys; sys.path.insert(0, {str(path)!r})\n{before}\n{PROGRAM}"
        command = [*prefix, sys.executable, "-c", program, str(cache or tmp_path / "cache")]
        popen = subprocess.Popen if prefix else warm_start.popen
        running.append(
            popen(
                [*command, canonical(make_plan()), how, str(tmp_path)],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": ROOT},
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def until(condition, seconds=60.0):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def decoded(tmp_path):
    path = tmp_path / "decoded"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def entries(cache):
    return {p.name for p in cache.iterdir() if not p.name.startswith(".")}


def cohort(work, first=0, how=None):
    return [
        Sample(f"p{k}", work.Known(first + k, how=(how or {}).get(k, "")), (k % 2,))
        for k in range(20)
    ]


@pytest.mark.integration
def test_after_a_kill_in_the_middle_the_next_one_makes_it_whole(tmp_path, start, work, make_plan):
    process = start("wait")
    until(lambda: 12 in decoded(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list((tmp_path / "cache").iterdir())
    assert [p.name.startswith(".partial-") for p in left] == [True]
    assert (left[0] / "images.npy").stat().st_size > 0
    out, err = start().communicate(timeout=60)
    assert not err
    expected = prepare(
        "x", [Sample(f"p{k}", work.Known(k), (k % 2,)) for k in range(30)], make_plan()
    )
    assert float(out) == pytest.approx(float(expected.images.sum()))
    names = [p.name for p in (tmp_path / "cache").iterdir()]
    assert len(names) == 1 and len(names[0]) == 64  # the leftover is gone


@pytest.mark.integration
def test_a_second_writer_waits_instead_of_doing_the_same(tmp_path, start):
    first = start("wait")
    until(lambda: 12 in decoded(tmp_path))
    second = start("wait")
    until(lambda: _waits_for_a_lock(second.pid))
    (tmp_path / "go").touch()
    outs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert outs[0] == outs[1] and float(outs[0])
    assert decoded(tmp_path) == list(range(30))


@pytest.mark.integration
def test_the_second_writer_takes_over_when_the_first_is_killed(tmp_path, start):
    first = start("wait")
    until(lambda: 12 in decoded(tmp_path))
    second = start("wait")
    until(lambda: _waits_for_a_lock(second.pid))
    first.send_signal(signal.SIGKILL)
    (tmp_path / "go").touch()
    out, err = second.communicate(timeout=60)
    assert not err and float(out)
    assert [p.name for p in (tmp_path / "cache").glob(".partial-*")] == []


def _waits_for_a_lock(pid):
    return any(
        f" {pid} " in line and "->" in line for line in Path("/proc/locks").read_text().splitlines()
    )


@pytest.mark.integration
def test_a_decoder_that_hangs_or_dies_costs_its_sample(tmp_path, work, make_plan):
    samples = cohort(work, how={3: "hang", 8: "die"})
    with preparers(Limits(workers=2, seconds=1.5)) as crew:
        site = prepare("x", samples, make_plan(), tmp_path / "cache", Means(crew=crew))
        pids = [worker.process.pid for worker in crew.workers]
    assert site.left_out == {"decoder failed": 2}
    kept = [k for k in range(20) if k not in (3, 8)]
    plain = prepare("x", [cohort(work)[k] for k in kept], make_plan())
    np.testing.assert_array_equal(site.images, plain.images)
    np.testing.assert_array_equal(site.targets, plain.targets)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_entries_that_were_used_longest_ago_make_room(tmp_path, work, make_plan):
    plan, cache = make_plan(), tmp_path / "cache"
    one = prepared_bytes(plan, 20)
    means = Means(cache_bytes=3 * one)  # of two entries: each has some small files beside

    def make(first):
        before = entries(cache) if cache.is_dir() else set()
        prepare("x", cohort(work, first), plan, cache, means)
        return entries(cache) - before

    (a,), (b,) = make(0), make(100)
    os.utime(cache / a, (time.time() - 100,) * 2)
    os.utime(cache / b, (time.time() - 50,) * 2)
    held = prepare("x", cohort(work, 0), plan, cache, means)  # a is used again
    (c,) = make(200)
    assert entries(cache) == {a, c}
    assert sum(f.stat().st_size for f in cache.rglob("*.npy")) <= 3 * one
    os.utime(cache / a, (time.time() - 100,) * 2)
    make(300)
    assert a not in entries(cache)
    assert float(held.images.sum()) > 0  # what is mapped stays readable


def test_an_entry_above_the_bound_is_refused_before_an_image_is_read(tmp_path, work, make_plan):
    samples = [Sample("p", work.Known(0, str(tmp_path)), (0,))] * 20
    with pytest.raises(OutputError, match="Raise cache_gib"):
        prepare("x", samples, make_plan(), tmp_path / "cache", Means(cache_bytes=1000))
    assert decoded(tmp_path) == []
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_being_written_counts_into_the_bound(tmp_path, work, make_plan):
    import fcntl

    plan, cache = make_plan(), tmp_path / "cache"
    one = prepared_bytes(plan, 20)
    other = cache / f".partial-{'0' * 16}-{one}-x"
    other.mkdir(parents=True)
    handle = os.open(other, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="other studies"):
        prepare("x", cohort(work), plan, cache, Means(cache_bytes=round(1.5 * one)))
    os.close(handle)
    prepare("x", cohort(work), plan, cache, Means(cache_bytes=round(1.5 * one)))
    assert not other.exists()


@pytest.mark.integration
def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path, start):
    """A real one of 16 KiB, or where none can be mounted, a bound on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=16k none "{disk}" && "$@"; code=$?; ls -A "{disk}" >&2'
    prefix = ["unshare", "-rm", "sh", "-c", f"{mount}; exit $code", "sh"]
    can = (
        shutil.which("unshare")
        and not subprocess.run(
            ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs none "{disk}"'],
            capture_output=True,
            check=False,
        ).returncode
    )
    if not can:
        pytest.skip("no file system can be mounted here")
    process = start(prefix=prefix, cache=disk)
    out, err = process.communicate(timeout=60)
    assert process.returncode == OutputError.exit_code, out + err
    assert "No space left" in out and "Traceback" not in out
    assert err == ""  # nothing lies on the disk
    assert decoded(tmp_path) == [0]  # found out with the first image


@pytest.mark.integration
def test_a_file_that_may_not_grow_is_an_output_error(tmp_path, start):
    bound = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))"
    process = start(before=bound)
    out, err = process.communicate(timeout=60)
    assert process.returncode == OutputError.exit_code, out + err
    assert "OutputError" in out and "Traceback" not in out + err
    assert list((tmp_path / "cache").iterdir()) == []


def test_images_in_memory_need_no_process(tmp_path, make_plan):
    from fedward_client.data.readers.npz import ArrayImage

    rows = np.arange(256, dtype=np.uint8).reshape(16, 16)
    samples = [Sample(f"p{k}", ArrayImage(rows, 2), (k % 2,)) for k in range(4)]
    with preparers() as crew:
        assert len(prepare("x", samples, make_plan(), tmp_path, Means(crew=crew)).images) == 4
        assert not crew.workers


def test_a_look_that_fails_keeps_nothing(tmp_path, work, make_plan):
    def changed():
        raise OutputError("changed")

    with pytest.raises(OutputError, match="changed"):
        prepare("x", cohort(work), make_plan(), tmp_path / "cache", Means(verify=changed))
    assert list((tmp_path / "cache").iterdir()) == []
