"""Importing our packages changes nothing; what a process sets up is a call in its ``main``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedward.startup import defer_compiler

Ask = Callable[[str], Any]
ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import json, sys
def say(*what):
    print(json.dumps(what))
"""
PREPARED = (
    BEGIN
    + """
from fedward.startup import prepare
prepare()
"""
)
# Runs each code that it is given in a process of its own, forked after torch and MONAI are there.
FORKING = (
    PREPARED
    + """
import os, torch, fedward.models
for line in sys.stdin:
    if (child := os.fork()) == 0:
        exec(json.loads(line))
        sys.stdout.flush(), os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the code failed")
    print(flush=True)
"""
)
PACKAGES = """
import os
def state():
    return ([id(finder) for finder in sys.meta_path], [id(hook) for hook in sys.path_hooks],
            dict(os.environ), sys.path[:])
before = state()
import fedward, fedward_client, fedward_server, fedward_strategies, fedward_simulation
same = state() == before, "torch" in sys.modules
import fedward.models, fedward.flower.control_client, fedward_client.connector.process
import fedward_client.cohort.training, fedward_server.runner, fedward_simulation.study
import fedward_client.cli, fedward_server.cli, fedward_simulation.cli
import torch._compile, opacus.optimizers.optimizer as opacus
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
say(*same, [finder for finder, _ in zip(sys.meta_path, before[0]) if id(finder) not in before[0]],
    [key for key in ("FLWR_TELEMETRY_ENABLED", "LOGNAME") if key in os.environ],
    torch._compile._disable_dynamo.__module__, opacus.DTensor is DTensor,
    FSDPModule is torch.distributed.fsdp.FSDPModule, hasattr(FSDPModule, "unshard"))
"""
BUILD = """
import torch
from fedward.models.registry import build_model, outline
from fedward.plan.schema import Plan
from fedward.networks import MODELS
from fedward_client.training.optimizers import build_optimizer
def train(name, dimensions):
    seg, widths = "segmentation" in MODELS[name].tasks, MODELS[name].widths
    size = [32] * dimensions
    least = {} if widths is None else {"channels": widths.least}
    plan = Plan.model_validate({
        "version": 1, "study": {"name": "lean"},
        "task": {"kind": "segmentation" if seg else "classification", "dimensions": dimensions,
                 "classes": ["a", "b"]},
        "preprocessing": {"size": size}, "model": {"name": name, **least},
        "training": {"rounds": 1, "learning_rate": 0.1, "local_epochs": 1, "optimizer": "adam",
                     "loss": "dice_ce" if seg else "cross_entropy"},
        "privacy": {"mechanism": "none"}, "metrics": {"report": ["loss"], "primary": "loss"},
    })
    model = build_model(plan, 0)
    assert {k: v.shape for k, v in outline(plan).state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()}
    optimizer = build_optimizer(plan, model.parameters())
    optimizer.zero_grad()
    model(torch.rand(2, 1, *size)).square().mean().backward()
    optimizer.step()
for name in ("cnn", "resnet18", "densenet121", "efficientnet-b0", "unet", "basicunet",
             "segresnet", "attention-unet"):
    train(name, 2)
    if name not in ("densenet121", "efficientnet-b0"):
        train(name, 3)
say(*(name in sys.modules for name in ("torch._dynamo", "sympy")),
    [str(f) for f in sys.meta_path if "fedward" in str(f)])
"""
VISUALIZE = """
import numpy, torch
import fedward.models, opacus.optimizers.optimizer as optimizer
from monai.metrics import EmbeddingCollapseMetric
from monai.utils.jupyter_utils import plot_metric_graph
from monai.visualize import GradCAM, matshow3d
import matplotlib.pyplot as plt
import sklearn.metrics
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 2))
cam = GradCAM(model, target_layers="0")(torch.rand(1, 1, 8, 8))
figure, _ = matshow3d(numpy.zeros((4, 4, 4)), show=False)
plot_metric_graph(plt.figure().gca(), "loss", {"loss": [0.5, 0.25]})
collapse = EmbeddingCollapseMetric()(torch.rand(6, 3), torch.arange(6) % 2)
say(list(cam.shape), type(figure).__name__, 0 <= collapse["separation"].item() <= 1,
    sklearn.metrics.roc_auc_score([0, 1], [0.1, 0.9]), optimizer.DTensor is DTensor,
    hasattr(FSDPModule, "unshard"))
"""
THREAD = """
import threading, torch
from pathlib import Path
from fedward.models.registry import build_model
from fedward.plan.load import load_plan
found = []
def ask():
    import sympy
    from torch.fx.experimental import symbolic_shapes
    found.append([sympy.Basic.__module__, (sympy.Symbol("x") * 2).is_symbol,
                  symbolic_shapes.expect_true.__module__])
forward = torch.nn.Conv2d.forward
def asked(self, images):
    if not found:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    return forward(self, images)
torch.nn.Conv2d.forward = asked
build_model(load_plan(Path("studies/demo/classification.toml")), 0)
say(*found)
"""
LOADED = '[name for name in ("torch", "monai", "opacus", "scipy", "flwr") if name in sys.modules]'
SLOW = f"""
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
say({LOADED})
"""
NAMELESS = """
import os
os.getuid = lambda: 54321  # a user of whom this machine knows nothing but the number
"""
MAIN = """
import runpy
sys.argv = [{module!r}, "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as ended:
    code = ended.code
loaded = sys.modules.get("torch._compile")
say(os.environ["LOGNAME"], os.environ["FLWR_TELEMETRY_ENABLED"], code,
    loaded is None or loaded._disable_dynamo.__module__ == "fedward.startup", {loaded})
"""
COMPILED = """
import torch
early = "torch._dynamo" in sys.modules
from fedward_client.training.optimizers import _KINDS
weight = torch.nn.Parameter(torch.ones(2))
optimizer = _KINDS["sgd"]([weight], lr=0.5)
@torch.compile(backend="eager")
def loss(x):
    return (x * weight).sum()
optimizer.zero_grad()
loss(torch.ones(2)).backward()
optimizer.step()
say(early, weight.tolist(), "torch._dynamo" in sys.modules)
"""
STEP = """
import json, torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
torch.manual_seed(0)
model = GradSampleModule(torch.nn.Sequential(
    torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(108, 2)))
optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), 0.1), noise_multiplier=1.0,
    max_grad_norm=0.5, expected_batch_size=4, generator=torch.Generator().manual_seed(1))
model(torch.randn(4, 1, 8, 8)).square().mean().backward()
optimizer.step()
print(json.dumps([one.tolist() for one in model.parameters()]))
"""
EXIT = """
import atexit, gc
atexit._run_exitfuncs()
say(gc.get_freeze_count() > 100_000)
"""


NAMED = ("LOGNAME", "USER", "LNAME", "USERNAME", "FLWR_TELEMETRY_ENABLED")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in NAMED}


def started(*code: str, words: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", "\n".join(code), *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def lines_of(*code: str, words: tuple[str, ...] = ()) -> list[str]:
    process = started(*code, words=words)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.splitlines()


def told(*code: str, words: tuple[str, ...] = ()) -> Any:
    """What a code says last: before that a command may print its help."""
    return json.loads(lines_of(*code, words=words)[-1])


@pytest.fixture(scope="module")
def prepared() -> Iterator[Ask]:
    """Runs a code in a prepared process of its own, and gives what it says last."""
    process = started(FORKING)

    def ask(code: str) -> Any:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(json.dumps(code) + "\n")
        process.stdin.flush()
        said = []
        while (line := process.stdout.readline()) != "\n":
            assert line, process.stderr.read()
            said.append(line)
        return json.loads(said[-1])

    yield ask
    process.communicate()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """What a process says that only imports our packages, and what a private step gives there."""
    return [json.loads(line) for line in lines_of(BEGIN, PACKAGES, STEP)]


LIGHT = ("health", "trainer.admin_client", "policy.approvals", "doctor", "daemon.launch")


@pytest.mark.parametrize(
    ("modules", "slow"),
    [
        (LIGHT, []),
        (["connector.process"], ["flwr"]),
        (["trainer.process"], ["torch", "monai", "scipy"]),  # only a private plan needs Opacus
    ],
)
def test_a_hospital_imports_what_it_needs_and_no_more(modules: list[str], slow: list[str]) -> None:
    """A health check comes every few seconds; torch and Opacus take seconds of processor time."""
    assert told(PREPARED, SLOW, words=tuple(f"fedward_client.{one}" for one in modules)) == [slow]


def test_an_import_changes_nothing_in_the_process(plain: list[Any]) -> None:
    expected = [True, False, [], [], "torch._compile", True, True, True]
    assert plain[0] == expected


@pytest.mark.integration
def test_every_model_trains_without_compiler_and_sympy(prepared: Ask) -> None:
    assert prepared(BUILD) == [False, False, []]


def test_who_compiles_has_the_compiler(prepared: Ask) -> None:
    assert prepared(COMPILED) == [False, [0.5, 0.5], True]


def test_plots_metrics_and_sharding_are_whole_in_a_prepared_process(prepared: Ask) -> None:
    assert prepared(VISUALIZE) == [[1, 1, 8, 8], "Figure", True, 1.0, True, True]


def test_another_thread_imports_the_real_sympy_while_a_model_is_built(prepared: Ask) -> None:
    module = "torch.fx.experimental.symbolic_shapes"
    assert prepared(THREAD) == [["sympy.core.basic", False, module]]


def test_the_end_looks_at_no_object_once_more(prepared: Ask) -> None:
    assert prepared(EXIT) == [True]


def test_opacus_steps_as_it_does_alone(prepared: Ask, plain: list[Any]) -> None:
    assert prepared(STEP) == plain[1]


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        ("fedward_client.cli", []),
        ("fedward_server.cli", []),
        ("fedward_server.runner", ["torch", "monai", "scipy", "flwr"]),
        ("fedward_server.service", ["flwr"]),
        ("fedward_simulation.cli", []),
        ("fedward.flower.superlink", ["flwr"]),
    ],
)
def test_each_main_prepares_its_process_for_a_user_without_a_name(
    module: str, slow: list[str]
) -> None:
    main = MAIN.format(module=module, loaded=LOADED)
    assert told(BEGIN, NAMELESS, main) == ["54321", "0", 0, True, slow]


def test_a_user_without_a_name_is_the_reason() -> None:
    code = "try:\n    import monai\nexcept (KeyError, OSError):\n    say(1)\nelse:\n    say(0)"
    assert told(BEGIN, NAMELESS, code) == [1]


def test_a_torch_that_does_it_otherwise_starts_as_ever() -> None:
    module = ModuleType("torch._compile")
    defer_compiler(module)
    assert not hasattr(module, "_disable_dynamo")
