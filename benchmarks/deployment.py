"""What a round between hospitals costs, on loopback, against the same work without any network.

``python benchmarks/deployment.py`` starts a real aggregator and two real hospital daemons over TLS,
Flower's own SuperLink with two SuperNodes, and a bare loop, and writes ``deployment.md``. With
``--only`` it measures one part; what was measured is kept in ``deployment.json``, and the page is
written anew from all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
from deployment_federation import WORKS, Federation, bare_loop, hundred_megabytes
from deployment_hops import hops
from deployment_memory import FOLDED, HELD, peak_of
from deployment_stock import stock_rounds

PARTS: Final = ("rounds", "model", "stock", "memory")
_ROUNDS: Final = {"nearly nothing": 10, "CNN, 1 epoch": 10, "CNN, 10 epochs": 5}
_STOCK_ROUNDS: Final = 4
_ALLOWED: Final = (1.15, 0.5)


def measure(parts: list[str]) -> dict[str, Any]:
    """Figures of the parts."""
    found: dict[str, Any] = {}
    if "memory" in parts:
        found["memory"] = {
            "folded": {n: peak_of("folded", n) for n in FOLDED},
            "held": {n: peak_of("held", n) for n in HELD},
        }
    if set(parts) - {"memory"}:
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            federation = Federation(Path(name))
            try:
                if "rounds" in parts:
                    found["rounds"] = _rounds(federation)
                if "model" in parts:
                    found["model"] = hundred_megabytes(federation)
            finally:
                federation.close()
            if "stock" in parts:
                found["stock"] = _stock(federation)
    return found


def _rounds(federation: Federation) -> dict[str, Any]:
    found, since = {}, 0
    for work in WORKS:
        rounds = federation.rounds(work, _ROUNDS[work.name])
        table, since = hops(federation.folder / "trace", since)
        found[work.name] = {
            "seconds": float(np.median([one["seconds"] for one in rounds[1:]])),
            "bare": float(np.median(bare_loop(federation, work, _ROUNDS[work.name])[1:])),
            "megabytes": (rounds[-1]["bytes_down"] + rounds[-1]["bytes_up"]) / 1e6,
            "hops": table,
        }
    return found


def _stock(federation: Federation) -> dict[str, Any]:
    """Flower alone, and the bare loop beside it once more."""
    found = {}
    for work in WORKS[:2]:
        (federation.folder / f"{work.name}.toml").write_text(work.plan(_STOCK_ROUNDS))
        seconds = stock_rounds(federation, work, _STOCK_ROUNDS)
        bare = bare_loop(federation, work, _STOCK_ROUNDS)[1:]
        found[work.name] = {"seconds": float(np.median(seconds)), "bare": float(np.median(bare))}
    return found


def page(found: dict[str, Any]) -> str:
    """The page in Markdown."""
    return (
        "\n\n".join(
            [
                "# What a deployment costs",
                _how(),
                *([_round_table(found)] if "rounds" in found else []),
                *([_hop_table(found["rounds"])] if "rounds" in found else []),
                *([_model(found["model"])] if "model" in found else []),
                *([_memory(found["memory"])] if "memory" in found else []),
            ]
        )
        + "\n"
    )


def _how() -> str:
    cores = len(os.sched_getaffinity(0))
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"""Written by `python benchmarks/deployment.py` on {cores} cores and
{gigabytes:.0f} GiB, all processes on the same cores. *Fedward*: an aggregator and two hospital
daemons (four processes within their walls), TLS on loopback. *Stock Flower*: `flower-superlink`
with TLS and a database, two `flower-supernode`, `flwr run` of an app in plain torch with the same
network, images and steps, Flower {version("flwr")} as it is shipped. *Bare loop*: the same training
and evaluation in one process, both sites side by side, nothing sent. Seconds are medians over the
rounds after the first."""


def _round_table(found: dict[str, Any]) -> str:
    stock = found.get("stock", {})
    rows = []
    for name, one in found["rounds"].items():
        ratio, more = _ALLOWED
        seconds, allowed = one["seconds"], ratio * one["bare"] + more
        other = f"{stock[name]['seconds']:.1f}" if name in stock else "—"
        rows.append(
            f"| {name} | {one['bare']:.2f} | {seconds:.2f} | {seconds - one['bare']:.2f} | "
            f"{allowed:.2f}, {_met(seconds, allowed)} | {other} | {one['megabytes']:.2f} |"
        )
    return f"""## A round of two sites: train and evaluate

The goal is 1.15 times the bare loop and half a second.

| work | bare loop, s | Fedward, s | more, s | goal, s | stock Flower, s | MB of tensors |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}"""


def _hop_table(rounds: dict[str, Any]) -> str:
    names = list(rounds)
    lines = [
        f"| {hop} | " + " | ".join(f"{rounds[name]['hops'][hop]:.3f}" for name in names) + " |"
        for hop in next(iter(rounds.values()))["hops"]
    ]
    return f"""## Where a round's seconds go

Each line ends when both sites have passed it. Noted within the processes of the same run.

| hop, seconds | {" | ".join(names)} |
|---|{"---|" * len(names)}
{chr(10).join(lines)}"""


def _model(seconds: list[float]) -> str:
    tries = ", ".join(f"{one:.2f}" for one in seconds)
    return f"""## A model of 100 MB

To one node and back, over TLS and the SuperLink's database, best of {len(seconds)}:
**{min(seconds):.2f} s** (each: {tries}). The goal is 3 s: {_met(min(seconds), 3.0)}."""


def _met(seconds: float, goal: float) -> str:
    return "met" if seconds <= goal else "missed"


def _memory(memory: dict[str, Any]) -> str:
    rows = [
        f"| {n} | {int(n) * 95.4:.0f} | {folded:.0f} | "
        + (f"{memory['held'][n]:.0f} |" if n in memory["held"] else "— |")
        for n, folded in memory["folded"].items()
    ]
    return f"""## Server memory with replies of 100 MB

Peak of a process of its own (VmHWM) that takes in replies one at a time, beyond its imports and
one model. Flower's `FedAvg` holds all replies; 128 of them do not fit here.

| replies | MiB of tensors | folded in as they come, MiB | held for Flower's `FedAvg`, MiB |
|---|---|---|---|
{chr(10).join(rows)}"""


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "deployment.md")
    given = parser.parse_args()
    kept = given.out.with_suffix(".json")
    found = json.loads(kept.read_text()) if given.only and kept.exists() else {}
    found |= json.loads(json.dumps(measure(given.only or list(PARTS))))
    kept.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    given.out.write_text(page(found), "utf-8")
    print(given.out.read_text("utf-8"))


if __name__ == "__main__":
    main()
