"""Which of Opacus's ways to per-sample gradients to take: measured defaults.

From ``benchmarks/dp.py`` (64x64 pixels, 8 images, one CPU thread; DP step over plain step):

==================  =====  =======  =========  =====
model               hooks  sampled  functorch  ghost
==================  =====  =======  =========  =====
cnn                   2.2      1.6        2.6    3.0
resnet18              4.5      4.0        6.4    4.3
resnet50              2.8      2.5        4.0    3.5
densenet121           2.3      2.2        3.6    3.1
efficientnet-b0      21.1      1.9        3.0   22.7
efficientnet-lite0   26.8      1.4        2.9   25.8
unet                  2.6      2.1        3.1    3.0
basicunet             2.2      1.5        2.4    3.0
segresnet             2.2      1.6        2.8    2.7
attention-unet        2.0      1.5        2.7    2.9
==================  =====  =======  =========  =====

``sampled`` is ``hooks`` with the layers of :mod:`fedward.models.sampled`, and what ``hooks`` means
below. No GPU was at hand: the choice for CUDA follows from the memory that the gradients take.
"""

from __future__ import annotations

from fedward.errors import ModelError
from fedward.models.registry import GRAD_SAMPLE_MODES, GradSampleMode
from fedward.plan.schema import ModelName

# 11 to 63 million weights: 32 samples' gradients alone are 1.4 to 8 GB.
_HEAVY = frozenset[ModelName]({"resnet18", "resnet34", "resnet50"})


def best_mode(model_name: ModelName, device_type: str, threads: int) -> GradSampleMode:
    """The Opacus mode to take by default.

    Parameters
    ----------
    model_name : ModelName
        A model of the registry.
    device_type : str
        ``cpu`` or ``cuda``.
    threads : int
        CPU threads, at least 1. With two, ``functorch`` stayed behind as with one, so the number
        decides nothing today; it is part of the question all the same.

    Returns
    -------
    {"hooks", "functorch", "ghost"}
        With ``hooks``, call :func:`fedward.models.sampled.sampled` on the model before wrapping.

    Raises
    ------
    ModelError
        Fewer than one thread.
    """
    if threads < 1:
        raise ModelError("threads must be at least 1", value=threads, fix="Give 1 or more")
    wanted: GradSampleMode = "ghost" if device_type == "cuda" and model_name in _HEAVY else "hooks"
    known = GRAD_SAMPLE_MODES[model_name]
    return wanted if wanted in known else known[0]
