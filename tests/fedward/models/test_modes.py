"""The default mode is the one whose layers can be told apart; the others are for any layer."""

from __future__ import annotations

from typing import get_args

import pytest
from networks import small_plan
from torch import nn

from fedward.dp.ghost_clipping import keep_books
from fedward.dp.layers import sampled
from fedward.errors import ModelError
from fedward.models.registry import best_mode, build_model
from fedward.plan.schema import ModelName


@pytest.mark.parametrize("name", get_args(ModelName))
def test_the_default_takes_every_layer_of_the_model(name: ModelName) -> None:
    model = build_model(small_plan(name), 0)
    if best_mode(model) == "bookkeeping":
        assert best_mode(sampled(model)) == "bookkeeping"
        keep_books(model)
    else:
        with pytest.raises(ModelError, match="book-keeping takes"):
            keep_books(sampled(model))


def test_a_layer_that_bookkeeping_does_not_know_turns_to_functorch() -> None:
    known = [nn.Conv2d(1, 4, 3), nn.GroupNorm(1, 4), nn.ReLU(), nn.Linear(4, 2)]
    assert best_mode(nn.Sequential(*known)) == "bookkeeping"
    assert best_mode(nn.Sequential(*known, nn.LayerNorm(2))) == "functorch"
    assert best_mode(nn.Conv2d(1, 4, 3, padding_mode="reflect")) == "functorch"
