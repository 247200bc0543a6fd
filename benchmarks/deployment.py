"""What a round between hospitals costs, on loopback, against the same work without any network.

``python benchmarks/deployment.py`` starts a real aggregator and two real hospital daemons over TLS
and writes ``benchmarks/deployment.md``. Ratios are to a bare loop in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx
import numpy as np
import torch

PLAN = """
version = 1
[study]
name = "bench"
[task]
kind = "classification"
classes = ["clear", "opacity"]
[preprocessing]
size = [64, 64]
intensity = "unit"
[model]
name = "cnn"
channels = [16, 32, 64, 64]
[training]
rounds = {rounds}
learning_rate = 0.01
local_epochs = {epochs}
batch_size = 16
loss = "cross_entropy"
[privacy]
mechanism = "none"
[participation]
sites = 2
[metrics]
report = ["auc"]
primary = "auc"
"""
SITE = """
version = 1
[site]
name = "{name}"
[server]
address = "127.0.0.1:{port}"
ca = "aggregator-ca.pem"
[trainer]
device = "cpu"
threads = 1
[datasets.chest]
root = "{root}"
format = "dicom"
task = "classification"
classes = ["clear", "opacity"]
[policy]
coordinators = ["{coordinator}"]
approval = "within-policy"
require_privacy = false
minimum_count = 1
rounding = 9
[[policy.studies]]
match = "*"
dataset = "chest"
"""


def command(module: str, *words: object) -> dict[str, Any]:
    """A command of the aggregator or a hospital, with its answer."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words), "--json"], cwd=ROOT, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Federation:
    """An aggregator and two hospitals as real processes."""

    def __init__(self, folder: Path) -> None:
        from simulation.cohort import write_cohort

        self.folder, self.running = folder, list[subprocess.Popen[bytes]]()
        told = command("server.cli", "init", folder / "agg")
        self.config, self.token = folder / "agg" / "server.toml", told["token"]
        self.port, self.api = free_port(), free_port()
        text = self.config.read_text()
        for old, new in ((9443, self.port), (9444, self.api), (9445, free_port())):
            text = text.replace(str(old), str(new))
        self.config.write_text(
            text.replace("requests_per_minute = 600", "requests_per_minute = 99999")
        )
        self.start("server.cli", "run", "--config", self.config)
        write_cohort(folder / "data", 0, "classification", 60, 2)
        ca = folder / "agg" / "tls" / "ca.crt"
        self.sites = []
        for number in (1, 2):
            site = folder / f"h{number}"
            name = f"hospital {number}"
            command("client.cli", "enrol", "--name", name, "--server", f"127.0.0.1:{self.port}",
                    "--ca", ca, "--out", site)  # fmt: skip
            (site / "site.toml").write_text(SITE.format(
                name=name, port=self.port, coordinator=told["coordinator"],
                root=folder / "data" / f"hospital-{number}",
            ))  # fmt: skip
            command("client.cli", "data", "freeze", "chest", "--config", site / "site.toml")
            self.sites.append((name, site))
        self.wait(lambda: self.get("/readyz").status_code == 200)
        for name, site in self.sites:
            command("server.cli", "site", "add", name, site / "connector" / "site.pub",
                    "--config", self.config)  # fmt: skip
            self.start("client.cli", "run", "--config", site / "site.toml")

    def start(self, module: str, *words: object) -> None:
        log = (self.folder / "log").open("ab")
        self.running.append(subprocess.Popen(
            [sys.executable, "-m", module, *map(str, words)], cwd=ROOT, stdout=log, stderr=log
        ))  # fmt: skip
        log.close()

    def get(self, path: str) -> httpx.Response:
        context = ssl.create_default_context(cafile=str(self.folder / "agg" / "tls" / "ca.crt"))
        with httpx.Client(verify=context, timeout=300.0) as client:
            return client.get(f"https://127.0.0.1:{self.api}{path}",
                              headers={"Authorization": f"Bearer {self.token}"})  # fmt: skip

    @staticmethod
    def wait(condition: Any) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                if condition():
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise TimeoutError

    def rounds(self, epochs: int, rounds: int) -> list[dict[str, Any]]:
        """Run a study; its rounds."""
        plan = self.folder / f"plan-{epochs}.toml"
        plan.write_text(PLAN.format(rounds=rounds, epochs=epochs))
        study = command("server.cli", "study", "submit", plan, "--sites", "hospital 1,hospital 2",
                        "--config", self.config)["id"]  # fmt: skip
        list(self.get(f"/v1/studies/{study}/events?follow=true").iter_lines())
        return list(self.get(f"/v1/studies/{study}").json()["rounds"])

    def close(self) -> None:
        for process in reversed(self.running):
            process.terminate()
        for process in self.running:
            process.wait(60)


def bare_loop(federation: Federation, epochs: int, rounds: int) -> float:
    """Seconds per round of the same work in this process: both sites side by side, two threads."""
    from client.cohort.training import preparers
    from client.training.runtime import Runtime
    from client.training.trainer import Trainer
    from fedward.models import build_model, to_arrays
    from fedward.plan import load_plan
    from fedward.plan.load import canonical, plan_hash
    from fedward.protocol import RoundOrder
    from simulation.options import Hospital, Options
    from simulation.prepare import frozen_sites

    torch.set_num_threads(1)
    plan = load_plan(federation.folder / f"plan-{epochs}.toml")
    hospitals = tuple(Hospital(site / "site.toml") for _, site in federation.sites)
    options = Options(data=None, out=federation.folder / "bare", hospitals=hospitals)
    with preparers() as crew:
        sites = frozen_sites(plan, options, crew, lambda text: None)
    trainers = [Trainer(plan, site, Runtime(randomness="seeded")) for site in sites]
    arrays = to_arrays(build_model(plan, 0))
    text, mark = canonical(plan), plan_hash(plan)

    def work(trainer: Trainer, round_: int, out: list[Any]) -> None:
        order = RoundOrder(plan=text, plan_hash=mark, round=round_)
        new, _ = trainer.train(arrays, order)
        trainer.evaluate({**arrays, **new}, order.model_copy(update={"part": "validation"}))
        out.append(new)

    took = []
    for round_ in range(1, rounds + 1):
        began, out = time.perf_counter(), list[Any]()
        threads = [threading.Thread(target=work, args=(t, round_, out)) for t in trainers]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        arrays = {name: np.mean([update[name] for update in out], axis=0) for name in arrays}
        took.append(time.perf_counter() - began)
    return float(np.median(took[1:]))


def hundred_megabytes(federation: Federation) -> float:
    """Seconds for 100 MB down to a hospital's node and 100 MB back."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

    from client.connector.fleet import Fleet
    from server.config import load_config
    from server.exchange import StudyGrid
    from server.flower.control import Link
    from server.flower.runtime import RunSession
    from server.runner import link_address

    config = load_config(federation.config)
    ca = config.tls.ca.read_bytes()
    link = Link(link_address(config), ca, config.control_secret.read_bytes().strip())
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    node = link.register(public, "bench")
    session = RunSession(
        link, config.runtime_secret.read_bytes().strip(), federation.folder / "lock"
    )
    fleet = Fleet(link_address(config), ca, key, 1 << 30)
    fleet.activate()

    def echo() -> None:
        while (message := fleet.pull()) is None:
            time.sleep(0.02)
        packed = message.content.array_records["arrays"]["packed"].numpy()
        back = ArrayRecord({"packed": Array(packed)})
        fleet.push(Message(RecordDict({"arrays": back}), reply_to=message))

    took = []
    for _ in range(3):
        values = np.random.default_rng(secrets.randbits(32)).random(25_000_000, np.float32)
        record = ArrayRecord({"w": Array(values)})
        content = RecordDict({"arrays": record, "config": ConfigRecord({"x": 1})})
        thread = threading.Thread(target=echo)
        grid = StudyGrid(session.grid, [node], threading.Event())
        began = time.perf_counter()
        thread.start()
        ((_, reply),) = grid.replies([Message(content, node, MessageType.TRAIN)], 120)
        took.append(time.perf_counter() - began)
        thread.join()
        assert reply.content.array_records["arrays"]["w"].numpy().nbytes == values.nbytes
    fleet.close()
    session.close(complete=True)
    return float(min(took))


def folded_memory(sites: int) -> float:
    """Peak MiB of a process that folds so many updates of 100 MB, beyond its imports."""
    code = (
        "import re, numpy as np; from strategies.fold import Fold\n"
        # Of this program alone; the counters of getrusage begin with those of who started it.
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status())[1]) / 1024\n"
        "base = peak(); fold = Fold()\n"
        f"for n in range({sites}):\n"
        "    fold.add({str(i): np.full(2_500_000, n, np.float32) for i in range(10)}, 3.0)\n"
        "fold.mean(); print(peak() - base)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          check=True)  # fmt: skip
    return float(done.stdout)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "deployment.md")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        federation = Federation(Path(name))
        try:
            lines = []
            for epochs, rounds in ((1, 6), (20, 5)):
                found = federation.rounds(epochs, rounds)
                seconds = float(np.median([one["seconds"] for one in found[1:]]))
                bare = bare_loop(federation, epochs, rounds)
                size = (found[-1]["bytes_down"] + found[-1]["bytes_up"]) / 1e6
                lines.append(
                    f"| CNN, {epochs} local epochs, 2 sites | {seconds:.2f} | {bare:.2f} | "
                    f"{seconds / bare:.2f} | {seconds - bare:.2f} | {size:.2f} |"
                )
            large = hundred_megabytes(federation)
        finally:
            federation.close()
    memory = {n: folded_memory(n) for n in (2, 8, 32, 128)}
    out.write_text(page(lines, large, memory), "utf-8")
    print(out.read_text("utf-8"))


def page(lines: list[str], large: float, memory: dict[int, float]) -> str:
    """The page in Markdown."""
    cores = len(os.sched_getaffinity(0))
    gigabytes = resource.getpagesize() * os.sysconf("SC_PHYS_PAGES") / 2**30
    rows = "\n".join(lines)
    cells = "\n".join(f"| {n} | {n * 95.4:.0f} | {mib:.0f} |" for n, mib in memory.items())
    return f"""# What a deployment costs

Written by `python benchmarks/deployment.py` on {cores} cores and {gigabytes:.0f} GiB: a real
aggregator, two real hospital daemons (four processes within their walls), TLS on loopback, all on
the same cores. The bare loop does the same training and evaluation in one process, both sites side
by side, on the same data.

| a round: train and evaluate | seconds | bare loop, seconds | ratio | more, seconds | MB |
|---|---|---|---|---|---|
{rows}

A model of 100 MB to one node and back, over TLS and the SuperLink's database: {large:.2f} s
(best of three).

| updates of 100 MB | MiB that holding them would take | peak MiB of folding them in |
|---|---|---|
{cells}

Stock SuperLink, SuperNode and `flwr run` are not measured by this script.
"""


if __name__ == "__main__":
    main()
