"""The same rounds with Flower's own SuperLink, SuperNodes and ``flwr run``, as they are shipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deployment_federation import Federation, Work, free_port, prepared

SCRIPTS = Path(sys.executable).parent
PROJECT = """
[project]
name = "stock"
version = "1.0.0"
description = "The benchmark's rounds with Flower alone."
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "bench"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "stock.server:app"
clientapp = "stock.client:app"
[tool.flwr.app.config]
rounds = {rounds}
work = "{folder}"
"""
# Plain torch, and the network as TorchScript: a process that serves a message imports no more.
CLIENT = """
import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def start(message, context):
    torch.set_num_threads(1)
    work = context.run_config["work"]
    model = torch.jit.load(f"{work}/network.pt")
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = np.load(f"{work}/{context.node_config['site']}.npz")
    parts = {name: torch.from_numpy(data[name]) for name in data.files}
    return model, parts, MetricRecord({"num-examples": int(len(parts["train"]))})


@app.train()
def train(message: Message, context: Context) -> Message:
    model, data, weight = start(message, context)
    config = message.content["config"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    done, steps = 0, int(config["steps"])
    while done < steps:
        order = data["train"][torch.randperm(len(data["train"]))]
        for batch in order.tensor_split(max(1, round(len(order) / 16))):
            if done == steps:
                break
            loss = torch.nn.functional.cross_entropy(
                model(data["images"][batch]), data["targets"][batch].long()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": weight}
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model, data, weight = start(message, context)
    model.eval()
    with torch.no_grad():
        guess = model(data["images"][data["validation"]]).argmax(1)
    weight["accuracy"] = float((guess == data["targets"][data["validation"]]).float().mean())
    return Message(RecordDict({"metrics": weight}), reply_to=message)
"""
SERVER = """
import json
import time

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    work = context.run_config["work"]
    steps = json.loads(open(f"{work}/steps.json").read())
    marks = []
    initial = ArrayRecord(torch.jit.load(f"{work}/network.pt").state_dict())
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0, min_available_nodes=2)

    def note(number, arrays):
        marks.append(time.monotonic())

    strategy.start(
        grid=grid, initial_arrays=initial, num_rounds=context.run_config["rounds"],
        train_config=ConfigRecord({"steps": steps}), evaluate_fn=note,
    )
    with open(f"{work}/marks.json", "w") as file:
        json.dump(marks, file)
"""


def stock_rounds(federation: Federation, work: Work, rounds: int) -> list[float]:
    """Seconds of each round but the first, with TLS, on a database."""
    folder = federation.folder / f"stock {work.name}".replace(" ", "-").replace(",", "")
    _write_app(folder, federation, work, rounds)
    # Flower starts programs of its own by their names.
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
    }
    port, running = free_port(), list[subprocess.Popen[bytes]]()
    tls = federation.folder / "agg" / "tls"
    try:
        running.append(
            _start(
                environment,
                folder,
                "flower-superlink",
                "--ssl-certfile",
                tls / "server.crt",
                "--ssl-keyfile",
                tls / "server.key",
                "--ssl-ca-certfile",
                tls / "ca.crt",
                "--database",
                folder / "state.db",
                "--port",
                port,
                "--disable-runtime-dependency-installation",
            )
        )
        _write_connection(folder / "home", port, tls / "ca.crt")
        for number in (1, 2):
            running.append(
                _start(
                    environment,
                    folder,
                    "flower-supernode",
                    "--superlink",
                    f"127.0.0.1:{port}",
                    "--root-certificates",
                    tls / "ca.crt",
                    "--port",
                    free_port(),
                    "--node-config",
                    f'site="h{number}"',
                )
            )
        _run(environment, folder)
        return np.diff(_wait_for(folder / "marks.json", running)).tolist()[1:]
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(60)


def _write_app(folder: Path, federation: Federation, work: Work, rounds: int) -> None:
    from fedward.dp.accounting import steps_in_round
    from fedward.models import build_model

    plan, sites = prepared(federation, work)
    app = folder / "app" / "stock"
    app.mkdir(parents=True)
    (app / "__init__.py").touch()
    (app / "client.py").write_text(CLIENT)
    (app / "server.py").write_text(SERVER)
    (folder / "app" / "LICENSE").write_text("Benchmark.\n")
    (folder / "app" / "pyproject.toml").write_text(PROJECT.format(rounds=rounds, folder=folder))
    for number, site in enumerate(sites, start=1):
        np.savez(
            folder / f"h{number}.npz",
            images=site.images,
            targets=site.targets,
            train=site.split["train"],
            validation=site.split["validation"],
        )
    model = build_model(plan, 0)
    images = torch.from_numpy(np.array(sites[0].images[:4]))
    torch.jit.trace(model, images).save(str(folder / "network.pt"))
    train = sites[0].split["train"]
    steps = steps_in_round(plan, len(train), sites[0].patients_in("train"))
    (folder / "steps.json").write_text(json.dumps(steps))


def _write_connection(home: Path, port: int, ca: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{ca}"\n'
    )


def _start(environment: dict[str, str], folder: Path, *words: Any) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [str(SCRIPTS / words[0]), *map(str, words[1:])],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=log,
        )


def _run(environment: dict[str, str], folder: Path) -> None:
    for _ in range(60):
        done = subprocess.run(
            [str(SCRIPTS / "flwr"), "run", str(folder / "app"), "bench", "--format", "json"],
            env=environment,
            cwd=folder,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode == 0 and '"success": true' in done.stdout:
            return
        time.sleep(1)
    raise RuntimeError(done.stdout + done.stderr)


def _wait_for(path: Path, running: list[subprocess.Popen[bytes]]) -> list[float]:
    while not path.exists():
        if any(process.poll() is not None for process in running):
            raise RuntimeError((path.parent / "log").read_text()[-3000:])
        time.sleep(0.5)
    time.sleep(0.5)
    return list(json.loads(path.read_text()))
