"""A table beside the images: the head that reads it, frozen layers, privacy, and what is learnt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CLASSIFIERS, least, sections
from torch import nn

from fedward.dp.accounting import Mechanism
from fedward.errors import ModelError, PlanError
from fedward.models import (
    best_mode,
    build_model,
    sampled,
    split_at_trainable,
    to_arrays,
    trainable_names,
)
from fedward.networks import MODELS
from fedward.plan import Plan, canonical, plan_from, plan_hash
from fedward.protocol import RoundOrder
from fedward_client.data.sample import PreparedSite
from fedward_client.training.private import PrivateStep
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_simulation.sites import pool_sites

Make = Callable[..., Any]
SEEDED = Runtime(randomness="seeded")
TABLE: dict[str, Any] = {
    "column": [
        {"name": "age", "kind": "number", "range": [0, 100], "missing": True},
        {"name": "sex", "kind": "category", "values": ["f", "m"]},
    ]
}
WIDTH = 4


def plan_of(name: str, hidden: int | None) -> Plan:
    table = TABLE if hidden is None else {**TABLE, "hidden": hidden}
    made: Plan = plan_from(sections(name, **least(name)) | {"table": table})
    return made


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_each_classifier_s_last_layer_reads_features_and_columns(
    name: str, hidden: int | None
) -> None:
    plan = plan_of(name, hidden)
    without = plan.model_copy(update={"table": None})
    model, plain = build_model(plan, 3).eval(), build_model(without, 3).eval()
    images = torch.randn(2, plan.preprocessing.channels, *plan.preprocessing.size)
    rows = torch.randn(2, WIDTH)
    if hidden is None:  # it starts as the network that reads no table
        torch.testing.assert_close(model(images, rows), plain(images))
    head = next(n for n in model.state_dict() if n.endswith("weight") and _is_head(name, n))
    with torch.no_grad():
        weight = model.get_parameter(head)
        weight.copy_(torch.randn(weight.shape))
    # The cut lies behind the features: what the head makes of them is worked out here.
    prefix, suffix = split_at_trainable(model, {head, "table.hidden.weight"})
    assert prefix is not None
    joined = torch.cat([prefix(images), rows], 1)
    if hidden is not None:
        layer = model.get_submodule("table.hidden")
        assert isinstance(layer, nn.Linear)
        joined = (joined @ layer.weight.T + layer.bias).clamp(min=0)
    bias = model.get_parameter(head.replace("weight", "bias"))
    expected = joined @ model.get_parameter(head).T + bias
    torch.testing.assert_close(model(images, rows), expected)
    torch.testing.assert_close(suffix(prefix(images), rows), expected)


def _is_head(name: str, parameter: str) -> bool:
    return parameter.startswith(MODELS[name].head.removesuffix("*"))


def test_a_network_without_a_last_linear_layer_is_refused(make_plan: Make) -> None:
    from fedward.models.table_head import with_table

    table = make_plan(table=TABLE).table
    with pytest.raises(PlanError, match="ends in a linear one"):
        with_table(nn.Sequential(nn.Conv2d(1, 2, 3)), table)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    hidden=st.sampled_from([None, 6]),
    mode=st.sampled_from(["hooks", "functorch", "bookkeeping"]),
    power=st.floats(-20, 20),
    bright=st.sampled_from([1e-20, 1.0, 1e19, float("inf")]),
    column=st.sampled_from([0.0, 1.0, -1e6, float("inf")]),
    each=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**20),
)
def test_one_patient_moves_the_sum_by_c_at_most(
    hidden: int | None, mode: Any, power: float, bright: float, column: float, each: int, seed: int
) -> None:
    """Images and rows at will, weights as a coordinator may send them."""
    rng = torch.Generator().manual_seed(seed)
    plan = plan_of("cnn", hidden)
    model = build_model(plan, 0)
    assert best_mode(model) == "bookkeeping"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 ** (power * (2 * torch.rand((), generator=rng) - 1)))
    images = torch.randn((3 * each, 1, *plan.preprocessing.size), generator=rng)
    rows = torch.randn((3 * each, WIDTH), generator=rng)
    images[:each] *= bright
    rows[:each] = column
    there, gone = (
        _summed(copy.deepcopy(model), images, rows, mode, each, left_out)
        for left_out in (False, True)
    )
    assert float((there - gone).norm()) <= 1 + 1e-4


def _summed(
    module: nn.Module, images: Any, rows: Any, mode: Any, each: int, left_out: bool
) -> torch.Tensor:
    module = module if mode == "functorch" else sampled(module)
    trained = list(module.parameters())
    none = Mechanism(0.0, 1.0, 1)
    step = PrivateStep(module, torch.optim.SGD(trained, lr=1.0), none, 1.0, 1, mode, None)
    real = torch.arange(len(images)) >= (each if left_out else 0)
    images = images.masked_fill(~real.view(-1, 1, 1, 1), 0.0)
    rows = rows.masked_fill(~real.view(-1, 1), 0.0)
    losses = nn.functional.cross_entropy(
        step.module(images, rows), torch.ones(len(images), dtype=torch.long), reduction="none"
    )
    step.accumulate(losses, torch.arange(len(images)) // each, last=True, real=real)
    total = torch.cat([p.grad.double().flatten() for p in step.parameters if p.grad is not None])
    step.close()
    return total


def with_rows(site: PreparedSite) -> PreparedSite:
    """Images of noise; the label stands in the last column."""
    images = np.random.default_rng(1).normal(size=site.images.shape).astype(np.float32)
    rows = np.zeros((len(images), WIDTH), np.float32)
    rows[:, 2:] = np.eye(2)[site.targets]
    return replace(site, images=images, table=rows)


HEAD = {"rounds": None, "learning_rate": None}
STAGES = [{"name": "head", "rounds": 2, "learning_rate": 1.0, "train": ["fc.*", "table.*"]}]
PRIVATE = {
    "mechanism": "dp-sgd",
    "epsilon": 50.0,
    "delta": 1e-3,
    "clipping_norm": 1.0,
    "sampling_rate": 0.5,
}


@pytest.mark.parametrize("how", ["plain", "frozen", "centred", "private"])
def test_what_stands_in_the_table_alone_is_learnt(
    how: str, make_plan: Make, make_site: Make
) -> None:
    changes: dict[str, Any] = {"training": {"local_epochs": 4, "optimizer": "sgd"}}
    changes["training"]["learning_rate"] = 0.5
    if how in ("frozen", "centred"):
        # A pattern that matches nothing is an error, so without a hidden layer: the head alone.
        changes = {
            "training": {**HEAD, "local_epochs": 8, "optimizer": "sgd"},
            "stages": [{**STAGES[0], "train": ["fc.*"]}],
            "model": {"feature_centering": how == "centred"},
        }
    if how == "private":
        changes["training"] = {"local_epochs": None, "local_steps": 12, "optimizer": "sgd"}
        changes["training"]["learning_rate"] = 1.0
        changes["privacy"] = PRIVATE
    plan: Plan = make_plan(table=TABLE, **changes)
    trainer = Trainer(plan, with_rows(make_site(patients=60)), SEEDED)
    arrays = to_arrays(build_model(plan, 0))
    text, digest = canonical(plan), plan_hash(plan)
    for round_ in range(1, plan.rounds + 1):
        order = RoundOrder(plan=text, plan_hash=digest, round=round_, seed=1)
        arrays |= trainer.train(arrays, order)[0]
    order = RoundOrder(plan=text, plan_hash=digest, round=plan.rounds, part="test")
    counts = trainer.answers(arrays, order).exact()
    assert counts.figures(["auc"])["auc"] == pytest.approx(1.0)


def test_pooled_sites_keep_each_image_s_row(make_site: Make) -> None:
    sites = [with_rows(make_site(f"s{k}", seed=k, patients=10)) for k in range(2)]
    pooled = pool_sites(sites)
    assert pooled.table is not None
    np.testing.assert_array_equal(pooled.table[10:], sites[1].table)


def test_hidden_layers_train_by_their_name(make_plan: Make) -> None:
    hidden = build_model(make_plan(table={**TABLE, "hidden": 5}), 0)
    assert trainable_names(hidden, ["table.*"]) == ("table.hidden.weight", "table.hidden.bias")
    with pytest.raises(ModelError, match="match a parameter"):
        trainable_names(build_model(make_plan(table=TABLE), 0), ["table.*"])
