"""Which way to per-sample gradients to take.

From ``benchmarks/dp.py`` (figures in ``benchmarks/dp.md``): on one CPU thread and on two,
``bookkeeping`` took less time than ``hooks`` or as much, and less memory for large models;
``functorch`` stays behind. No GPU was at hand: there the choice follows from the work and the
memory of each way. Opacus' own ``ghost`` mode is none of them: it multiplies the losses with the
clipping factors and goes through the network a second time, whose rounding nothing bounds.
"""

from __future__ import annotations

from fedward.errors import ModelError
from fedward.models.registry import GradSampleMode
from fedward.plan.schema import ModelName


def best_mode(model_name: ModelName, device_type: str, threads: int) -> GradSampleMode:
    """The mode to take by default.

    Parameters
    ----------
    model_name : ModelName
        A model of the registry.
    device_type : str
        ``cpu`` or ``cuda``.
    threads : int
        CPU threads, at least 1. Neither it nor the others change the answer today; they are part of
        the question all the same.

    Returns
    -------
    {"hooks", "functorch", "bookkeeping"}
        With ``hooks`` and ``bookkeeping``, call :func:`fedward.models.sampled.sampled` on the model
        before wrapping.

    Raises
    ------
    ModelError
        Fewer than one thread.
    """
    if threads < 1:
        raise ModelError("threads must be at least 1", value=threads, fix="Give 1 or more")
    return "bookkeeping"
