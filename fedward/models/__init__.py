"""Networks built from a plan, with per-sample gradients, exchanged as named arrays."""

from fedward.dp.layers import sampled
from fedward.models.arrays import (
    ModelFacts,
    describe,
    freeze,
    from_arrays,
    load_model,
    most_traffic,
    save_model,
    shared_names,
    site_names,
    to_arrays,
    traffic,
    trainable_names,
)
from fedward.models.prefix import split_at_trainable
from fedward.models.registry import best_mode, build_model
from fedward.models.weights import WeightsReport, load_initial

__all__ = [
    "ModelFacts",
    "WeightsReport",
    "best_mode",
    "build_model",
    "describe",
    "freeze",
    "from_arrays",
    "load_initial",
    "load_model",
    "most_traffic",
    "sampled",
    "save_model",
    "shared_names",
    "site_names",
    "split_at_trainable",
    "to_arrays",
    "traffic",
    "trainable_names",
]
