"""Memory that ends: the same step in smaller parts, then a refusal with its own words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from fedward.models import build_model, to_arrays
from fedward.plan.schema import Plan
from fedward.protocol import Refusal
from fedward_client.audit.log import audit_folder
from fedward_client.audit.verify import entries
from fedward_client.link.messages import TrainerMessage
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

pytestmark = pytest.mark.integration
Make = Callable[..., Any]
PRIVATE = {
    "mechanism": "dp-sgd",
    "epsilon": 8.0,
    "delta": 1e-3,
    "clipping_norm": 1.0,
    "sampling_rate": 0.5,
}


@contextmanager
def memory_for(images: int) -> Iterator[list[int]]:
    """A device on which convolutions run out of memory beyond so many images at once."""
    seen: list[int] = []

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Conv2d) and not inputs[0].is_meta:
            seen.append(len(inputs[0]))
            if len(inputs[0]) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, PRIVATE], ids=["open", "private"])
def test_a_step_in_smaller_parts_is_the_same_step(
    make_plan: Make, make_site: Make, make_order: Make, privacy: dict[str, Any]
) -> None:
    steps = {"local_epochs": None, "local_steps": 3} if privacy is PRIVATE else {}
    plan: Plan = make_plan(
        privacy=privacy,
        training={"batch_size": 24, **steps},
        preprocessing={"augmentation": {"flip": ["horizontal"], "rotate": 10.0}},
    )
    if privacy is PRIVATE:  # the draws of a changed image follow the parts
        plan = make_plan(privacy=privacy, training={"batch_size": 24, **steps})
    start, site = to_arrays(build_model(plan, 0)), make_site("north")
    results = []
    for batch in (64, 5):
        runtime = Runtime(randomness="seeded", physical_batch=batch)
        with memory_for(batch) as seen:
            made, _ = Trainer(plan, site, runtime).train(start, make_order(plan, 1))
        assert max(seen) <= batch
        results.append(made)
    moved = max(float(np.abs(results[0][n] - start[n]).max()) for n in results[0])
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, atol=1e-5 + 1e-4 * moved)


def test_training_and_measuring_go_on_in_smaller_parts(
    make_hospital: Make, plan: Plan, private_plan: Plan
) -> None:
    hospital = make_hospital()
    for one, study in ((plan, "tiny-1"), (private_plan, "tiny-2")):
        with memory_for(3) as seen:
            answer = hospital.ask("train", one, study=study)
            assert answer.kind == "update", answer.record
            assert max(seen[-3:]) <= 3
            assert hospital.ask("evaluate", one, part="validation", study=study).kind == "counts"
    rows = {row["study"]: row for row in hospital.ledger.studies()}
    assert (rows["tiny-2"]["charged"], rows["tiny-2"]["released"]) == (1, 1)


def test_without_memory_for_one_image_it_says_so(make_hospital: Make, private_plan: Plan) -> None:
    hospital = make_hospital()
    with memory_for(0):
        answers = [
            hospital.ask("train", private_plan),
            hospital.ask("evaluate", private_plan, part="validation"),
        ]
    for answer in answers:
        refusal = Refusal.from_flat(answer.record)
        assert (refusal.kind, refusal.rule) == (
            "error",
            "the device must have memory for one image",
        )
        assert "GiB" not in json.dumps(answer.record)
    # The round is lost and stays charged; the next one works.
    again: TrainerMessage = hospital.ask("train", private_plan)
    assert Refusal.from_flat(again.record).kind == "budget"
    assert hospital.ask("train", private_plan, 2).kind == "update"
    told = [one.event for one in entries(audit_folder(hospital.config.site.state))]
    assert told.count("refused") == 3
