"""Start-up, seconds and CPU seconds per round: our engines, a bare loop, plain Flower.

The same work each time: a small CNN on made images, four sites, one local epoch a round, and an
evaluation on validation images. Every contender runs in a process of its own, in turn, so that
figures come from one session of one machine; ratios are to the bare loop.
Writes ``benchmarks/simulation.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
HERE = Path(__file__).resolve().parent
# Run as a script, this folder comes first, and this file would hide the package of its name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
SITES, IMAGES, SIZE = 4, 2400, 28
CONTENDERS = ("bare loop, 1 thread", "bare loop, all cores", "local", "ray", "plain Flower")
PLAN: dict[str, Any] = {
    "version": 1,
    "study": {"name": "engines"},
    "task": {"kind": "classification", "classes": ["no", "yes"]},
    "preprocessing": {"size": [SIZE, SIZE]},
    "split": {"validation": 0.1, "test": 0.1},
    "model": {"name": "cnn"},
    "training": {
        "learning_rate": 2e-3,
        "local_epochs": 1,
        "batch_size": 32,
        "loss": "cross_entropy",
    },
    "privacy": {"mechanism": "none"},
    "participation": {"sites": SITES},
    "metrics": {"report": ["auc", "accuracy"], "primary": "auc"},
}


def plan_of(rounds: int) -> Any:
    """The plan with so many rounds."""
    from fedward.plan import plan_from

    return plan_from({**PLAN, "training": {**PLAN["training"], "rounds": rounds}})


def write_data(path: Path) -> None:
    """Made images: positives have a brighter corner."""
    import numpy as np

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, IMAGES)
    images = rng.integers(0, 200, (IMAGES, SIZE, SIZE))
    images[labels == 1, :14, :14] += 30
    np.savez(path, images=images.astype(np.uint8), labels=labels)


def sites_of(data: Path, plan: Any) -> list[Any]:
    """The four prepared sites."""
    from fedward_client.data.dataset import DatasetSpec, read_dataset
    from fedward_client.data.prepare import prepare
    from fedward_simulation.partition import partition

    samples = read_dataset(DatasetSpec(data), plan.task).samples
    parts = partition(samples, "iid", SITES, 0)
    return [prepare(name, part, plan) for name, part in parts.items()]


def bare(data: Path, rounds: int, threads: int) -> dict[str, Any]:
    """FedAvg written out in one loop: no framework, no messages."""
    import numpy as np
    import torch

    from fedward.models import build_model

    torch.set_num_threads(threads)
    plan = plan_of(rounds)
    sites = sites_of(data, plan)
    model = build_model(plan, 0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        total, sum_ = 0, {k: torch.zeros_like(v) for k, v in state.items()}
        for site in sites:
            model.load_state_dict(state)
            _epoch(model, site, np.random.default_rng(0))
            count = len(site.split["train"])
            total += count
            for key, value in model.state_dict().items():
                sum_[key] += value * count
        state = {k: v / total for k, v in sum_.items()}
        model.load_state_dict(state)
        _validate(model, sites)
        seconds.append(time.perf_counter() - started)
    return {"rounds": seconds}


def _epoch(model: Any, site: Any, rng: Any) -> int:
    import numpy as np
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    order = rng.permutation(site.split["train"])
    for batch in np.array_split(order, max(1, round(len(order) / 32))):
        images, targets = (
            torch.from_numpy(site.images[batch]),
            torch.from_numpy(site.targets[batch]),
        )
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(order)


def _validate(model: Any, sites: list[Any]) -> float:
    import torch

    model.eval()
    right = total = 0
    with torch.no_grad():
        for site in sites:
            part = site.split["validation"]
            guess = model(torch.from_numpy(site.images[part])).argmax(1)
            right += int((guess == torch.from_numpy(site.targets[part])).sum())
            total += len(part)
    return right / total


def engine(data: Path, rounds: int, name: str) -> dict[str, Any]:
    """Fedward's own engines, set up as the command sets up its process."""
    from fedward.startup import prepare

    prepare()
    from fedward.flower import identity
    from fedward_simulation.study import Options, Study

    identity.quiet()
    with tempfile.TemporaryDirectory() as out:
        options = Options(data=data, out=Path(out), partition="iid", sites=SITES, engine=name)  # type: ignore[arg-type]
        study = Study(plan_of(rounds), options, note=lambda text: None)
        results = study.run()
    arm = results.arms[0]
    return {
        "rounds": [one.seconds for one in arm.rounds],
        "start": results.start_up_seconds,
        "arm": arm.seconds,
    }


def plain_flower(data: Path, rounds: int) -> dict[str, Any]:
    """The same study written directly on Flower's simulation engine."""
    import logging

    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from fedward.models import build_model

    logging.getLogger("flwr").setLevel(logging.ERROR)
    client, server, marks = ClientApp(), ServerApp(), []
    where = str(data)

    def site_of(context: Any) -> Any:
        return sites_of(Path(where), plan_of(1))[int(context.node_config["partition-id"])]

    @client.train()
    def train(message: Any, context: Any) -> Any:
        import numpy as np
        import torch

        torch.set_num_threads(1)
        model, site = build_model(plan_of(1), 0), site_of(context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        count = _epoch(model, site, np.random.default_rng(0))
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": count}),
        }
        return Message(RecordDict(content), reply_to=message)

    @client.evaluate()
    def evaluate(message: Any, context: Any) -> Any:
        model, site = build_model(plan_of(1), 0), site_of(context)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        metrics = MetricRecord({"num-examples": 1, "accuracy": _validate(model, [site])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        arrays = ArrayRecord(build_model(plan_of(1), 0).state_dict())
        marks.append(time.perf_counter())
        strategy = FedAvg()
        for _ in range(rounds):
            result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1)
            arrays = result.arrays
            marks.append(time.perf_counter())

    config: Any = {
        "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
        "init_args": {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"},
    }
    run_simulation(server, client, num_supernodes=SITES, backend_config=config)
    return {"rounds": [b - a for a, b in itertools.pairwise(marks)]}


def contend(name: str, data: Path, rounds: int) -> dict[str, Any]:
    """One contender, in this process."""
    if name.startswith("bare"):
        return bare(data, rounds, 1 if "1 thread" in name else os.cpu_count() or 1)
    if name == "plain Flower":
        return plain_flower(data, rounds)
    return engine(data, rounds, name)


def measure(name: str, data: Path, rounds: int) -> dict[str, Any]:
    """One contender in a process of its own, with its wall and CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, __file__, "--contender", name, "--data", str(data)]
    done = subprocess.run(
        [*command, "--rounds", str(rounds)], check=True, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**found, "wall": time.perf_counter() - started, "cpu": cpu}


def page(found: dict[str, dict[str, Any]], rounds: int) -> str:
    """The table as Markdown."""
    typical = {name: statistics.median(one["rounds"][1:]) for name, one in found.items()}
    best = min(typical[name] for name in found if name.startswith("bare"))
    lines = [
        "# Engines",
        "",
        "Written by `python benchmarks/simulation.py`: "
        f"{IMAGES} made images of {SIZE}×{SIZE}, {SITES} sites, {rounds} rounds. A round trains "
        "and validates. *First*: seconds of the first round. *Later*: median of the others; the "
        "ratio is to the faster bare loop. *Whole* and *CPU*: the process from start to end, "
        "imports included.",
        "",
        f"Machine: {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}.",
        "",
        "| contender | first | later | ratio | whole | CPU |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {one['rounds'][0]:.2f} s | {typical[name]:.2f} s | {typical[name] / best:.2f} "
        f"| {one['wall']:.1f} s | {one['cpu']:.1f} s |"
        for name, one in found.items()
    ]
    start = found["local"]["start"]
    lines += ["", f"`local` was ready for its first round {start:.2f} s after its imports."]
    lines += [
        "",
        "Ray's CPU seconds leave out its background processes, which are not its children.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all, or be one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--contender", choices=CONTENDERS)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(contend(options.contender, options.data, options.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        write_data(data)
        found = {}
        for name in CONTENDERS:
            found[name] = measure(name, data, options.rounds)
            print(f"{name}: {found[name]['wall']:.1f} s", flush=True)
    text = page(found, options.rounds)
    (HERE / "simulation.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
