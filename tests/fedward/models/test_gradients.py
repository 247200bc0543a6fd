"""Per-sample gradients of each mode against one backward pass per sample, in float64."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from networks import by_loop, check_clipped_sum, check_gradients, least

from fedward.dp.ghost_clipping import keep_books
from fedward.dp.layers import sampled
from fedward.errors import ModelError
from fedward.models.registry import best_mode
from fedward.plan.schema import ModelName

MODELS: tuple[ModelName, ...] = get_args(ModelName)
# The other networks in 3D are made of the same layers as these.
VOLUMES: tuple[ModelName, ...] = ("cnn", "resnet50", "unet", "segresnet", "attention-unet")
MODES = ("hooks", "functorch", "bookkeeping", "sampled")
CELLS = [
    (name, dimensions, mode)
    for dimensions, names in ((2, MODELS), (3, VOLUMES))
    for name in names
    for mode in MODES
]
# PyTorch says so of every first layer: its input is an image, and images need no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


@pytest.mark.parametrize(("name", "dimensions", "mode"), CELLS)
def test_mode_gives_every_samples_gradient(
    plan_for: Any, built: Any, images_for: Any, name: ModelName, dimensions: int, mode: str
) -> None:
    size = (32, 32) if name == "basicunet" else None
    plan = plan_for(name, dimensions=dimensions, size=size, **least(name))
    model = built(plan, seed=0).double()
    images = images_for(plan, count=2).double()
    expected = by_loop(model, images)
    if mode != "bookkeeping":
        check_gradients(sampled(model) if mode == "sampled" else model, images, expected, mode)
    elif best_mode(model) == mode:
        check_clipped_sum(model, images, expected)
    else:
        with pytest.raises(ModelError, match="book-keeping takes"):
            keep_books(sampled(model))
