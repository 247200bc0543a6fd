"""How a site's trainer may use its machine; the site's business, not the plan's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from fedward.models.registry import GradSampleMode
from fedward_client.worker_pool import tune_malloc

_FREED: Final = 256 << 20  # about what a step of a U-Net takes and lets go


@dataclass(frozen=True)
class Runtime:
    """Settings of the machine.

    Attributes
    ----------
    device : str
        ``cpu``, ``cuda`` or ``cuda:1``.
    threads : int
        CPU threads of one trainer.
    randomness : str
        ``system``: sampling and noise come from the system's entropy, as a hospital must have it.
        ``seeded``: they follow the order's seed, so that a simulation can be repeated. Whoever
        knows the seed can subtract the noise: never for real patients.
    cache : Path or None
        Folder for what is computed once and kept.
    cache_bytes : int or None
        Bytes that all in it may take; None for no bound.
    physical_batch : int
        Images on the device at once; larger private steps are cut into such parts.
    grad_sample_mode : str or None
        Overrides the measured choice of Opacus' mode.
    seeded_counts : bool
        Simulations: whether the noise of counts follows the order's seed as well.
    watch : callable or None
        Called after each step of training, or batch of evaluation, with its number (from 1) and
        how many there are; what it raises ends the work.
    """

    device: str = "cpu"
    threads: int = 1
    randomness: Literal["system", "seeded"] = "system"
    cache: Path | None = None
    cache_bytes: int | None = None
    physical_batch: int = 64
    grad_sample_mode: GradSampleMode | None = None
    seeded_counts: bool = False
    watch: Callable[[int, int], None] | None = None

    @property
    def torch_device(self) -> torch.device:
        """The device as torch knows it."""
        return torch.device(self.device)

    def enter(self) -> None:
        """Apply the settings to this process."""
        torch.set_num_threads(self.threads)
        # The bounds on one patient's share (fedward/models/clipping.py) are float32's; TF32 keeps
        # 11 of its 24 bits. What needs no bound runs in bfloat16 on a GPU anyway.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        tune_malloc(_FREED)
        if self.torch_device.type == "cuda":
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
