"""A real aggregator and two real hospitals on loopback; a bare loop; a model of 100 MB."""

from __future__ import annotations

import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx
import numpy as np
import torch
from deployment_hops import TRACE

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
channels = {channels}
[training]
rounds = {rounds}
learning_rate = 0.01
{amount}
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


@dataclass(frozen=True)
class Work:
    """What a round has to do."""

    name: str
    channels: str
    amount: str

    def plan(self, rounds: int) -> str:
        """The plan."""
        return PLAN.format(rounds=rounds, channels=self.channels, amount=self.amount)


WORKS = (
    Work("nearly nothing", "[8, 8]", "local_steps = 1"),
    Work("CNN, 1 epoch", "[16, 32, 64, 64]", "local_epochs = 1"),
    Work("CNN, 10 epochs", "[16, 32, 64, 64]", "local_epochs = 10"),
)


def command(module: str, *words: object) -> dict[str, Any]:
    """A command of the aggregator or a hospital, with its answer."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words), "--json"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Federation:
    """An aggregator and two hospitals as real processes."""

    def __init__(self, folder: Path) -> None:
        from fedward_simulation.cohort import write_cohort

        self.folder, self.running = folder, list[subprocess.Popen[bytes]]()
        told = command("fedward_server.cli", "init", folder / "agg")
        self.config, self.token = folder / "agg" / "server.toml", told["token"]
        self.port, self.api = free_port(), free_port()
        text = self.config.read_text()
        for old, new in ((9443, self.port), (9444, self.api), (9445, free_port())):
            text = text.replace(str(old), str(new))
        self.config.write_text(
            text.replace("requests_per_minute = 600", "requests_per_minute = 99999")
        )
        self.start("fedward_server.cli", "run", "--config", self.config)
        write_cohort(folder / "data", 0, "classification", 60, 2)
        ca = folder / "agg" / "tls" / "ca.crt"
        self.sites = []
        for number in (1, 2):
            site = folder / f"h{number}"
            name = f"hospital {number}"
            command(
                "fedward_client.cli",
                "enrol",
                "--name",
                name,
                "--server",
                f"127.0.0.1:{self.port}",
                "--ca",
                ca,
                "--out",
                site,
            )
            (site / "site.toml").write_text(
                SITE.format(
                    name=name,
                    port=self.port,
                    coordinator=told["coordinator"],
                    root=folder / "data" / f"hospital-{number}",
                )
            )
            command("fedward_client.cli", "data", "freeze", "chest", "--config", site / "site.toml")
            self.sites.append((name, site))
        self.wait(lambda: self.get("/readyz").status_code == 200)
        for name, site in self.sites:
            command(
                "fedward_server.cli",
                "site",
                "add",
                name,
                site / "connector" / "site.pub",
                "--config",
                self.config,
            )
            self.start("fedward_client.cli", "run", "--config", site / "site.toml")

    def start(self, module: str, *words: object) -> None:
        log = (self.folder / "log").open("ab")
        traced = {
            **os.environ,
            "PYTHONPATH": f"{TRACE}:{ROOT}",
            "FEDWARD_BENCH_TRACE": str(self.folder / "trace"),
        }
        self.running.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *map(str, words)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=traced,
            )
        )
        log.close()

    def get(self, path: str) -> httpx.Response:
        context = ssl.create_default_context(cafile=str(self.folder / "agg" / "tls" / "ca.crt"))
        with httpx.Client(verify=context, timeout=300.0) as client:
            return client.get(
                f"https://127.0.0.1:{self.api}{path}",
                headers={"Authorization": f"Bearer {self.token}"},
            )

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

    def rounds(self, work: Work, rounds: int) -> list[dict[str, Any]]:
        """Run a study; its rounds."""
        plan = self.folder / f"{work.name}.toml"
        plan.write_text(work.plan(rounds))
        study = command(
            "fedward_server.cli",
            "study",
            "submit",
            plan,
            "--sites",
            "hospital 1,hospital 2",
            "--config",
            self.config,
        )["id"]
        list(self.get(f"/v1/studies/{study}/events?follow=true").iter_lines())
        return list(self.get(f"/v1/studies/{study}").json()["rounds"])

    def close(self) -> None:
        for process in reversed(self.running):
            process.terminate()
        for process in self.running:
            process.wait(60)


def prepared(federation: Federation, work: Work) -> tuple[Any, list[Any]]:
    """The plan, and both hospitals' images as their trainers have them."""
    from fedward.plan import load_plan
    from fedward_client.cohort.training import preparers
    from fedward_simulation.options import Hospital, Options
    from fedward_simulation.prepare import frozen_sites

    plan = load_plan(federation.folder / f"{work.name}.toml")
    hospitals = tuple(Hospital(site / "site.toml") for _, site in federation.sites)
    options = Options(data=None, out=federation.folder / "bare", hospitals=hospitals)
    with preparers() as crew:
        return plan, frozen_sites(plan, options, crew, lambda text: None)


def bare_loop(federation: Federation, work: Work, rounds: int) -> list[float]:
    """Seconds of rounds of the same work in this process: both sites side by side, two threads."""
    from fedward.models import build_model, to_arrays
    from fedward.plan.load import canonical, plan_hash
    from fedward.protocol import RoundOrder
    from fedward_client.training.runtime import Runtime
    from fedward_client.training.trainer import Trainer

    torch.set_num_threads(1)
    plan, sites = prepared(federation, work)
    trainers = [Trainer(plan, site, Runtime(randomness="seeded")) for site in sites]
    arrays = to_arrays(build_model(plan, 0))
    text, mark = canonical(plan), plan_hash(plan)

    def side_by_side(act: Any) -> list[Any]:
        with ThreadPoolExecutor(len(trainers)) as pool:
            return list(pool.map(act, trainers))

    took = []
    for round_ in range(1, rounds + 1):
        began = time.perf_counter()
        order = RoundOrder(plan=text, plan_hash=mark, round=round_)
        part, now = order.model_copy(update={"part": "validation"}), arrays
        updates = side_by_side(lambda one: one.train(now, order)[0])  # noqa: B023
        arrays = {name: np.mean([u[name] for u in updates], axis=0) for name in arrays}
        made = arrays
        side_by_side(lambda one: one.evaluate(made, part))  # noqa: B023
        took.append(time.perf_counter() - began)
    return took


def hundred_megabytes(federation: Federation) -> list[float]:
    """Seconds for 100 MB down to a hospital's node and 100 MB back, each time it was tried."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

    from fedward.flower.control_client import ControlClient
    from fedward.flower.fleet_client import FleetClient
    from fedward.flower.server_session import RunSession
    from fedward.flower.study_grid import StudyGrid
    from fedward_server.config import load_config

    config = load_config(federation.config)
    ca = config.tls.ca.read_bytes()
    link = ControlClient(config.superlink_address, ca, config.control_secret.read_bytes().strip())
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    node = link.register(public, "bench")
    session = RunSession(
        link, config.runtime_secret.read_bytes().strip(), federation.folder / "lock"
    )
    fleet = FleetClient(config.superlink_address, ca, key, 1 << 30)
    fleet.activate()

    def echo() -> None:
        while (message := fleet.pull(10.0)) is None:
            continue
        fleet.confirm(message)
        packed = message.content.array_records["arrays"]["packed"].numpy()
        back = ArrayRecord({"packed": Array(packed)})
        fleet.push(Message(RecordDict({"arrays": back}), reply_to=message))

    took = []
    for _ in range(4):
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
        fleet.beat()
    fleet.close()
    session.close(complete=True)
    return took
