"""A site's images through a model at given weights, as an attacker who has both sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedward.models import build_model, freeze, from_arrays, split_at_trainable, trainable_names
from fedward.plan.schema import Plan
from fedward_client.data.sample import PreparedSite
from fedward_client.training.losses import build_loss
from fedward_client.training.runtime import Runtime
from fedward_client.training.source import Source, digest_of

Arrays = Mapping[str, NDArray[Any]]
_BATCH = 128


class SiteView:
    """Losses, confidences and gradients of a site's images.

    Parameters
    ----------
    plan : Plan
        The study; its model, loss and stages are known to the attacker.
    site : PreparedSite
        The images.
    runtime : Runtime
        Device and cache; what frozen layers make of the images is shared with the trainers.
    """

    def __init__(self, plan: Plan, site: PreparedSite, runtime: Runtime) -> None:
        self.plan, self.site, self.runtime = plan, site, runtime
        self._model = build_model(plan, seed=0).to(runtime.torch_device)
        self._loss = build_loss(plan, runtime.torch_device)
        self._key: tuple[tuple[str, ...], str] | None = None
        self.names: tuple[str, ...] = ()

    def load(self, arrays: Arrays, round_: int) -> None:
        """Take the whole model as it stands in a round, whose stage says what trains."""
        from_arrays(self._model, arrays)
        self.names = trainable_names(self._model, self.plan.stage_of(round_)[0].train)
        frozen = digest_of(arrays, [name for name in arrays if name not in set(self.names)])
        if self._key != (self.names, frozen):
            freeze(self._model, self.names)
            prefix, self.module = split_at_trainable(self._model, set(self.names))
            if prefix is not None:
                prefix.eval()
            self._source = Source(self.plan, self.site, self.runtime, prefix, frozen)
            self._key = (self.names, frozen)
        self.module.eval()

    @torch.no_grad()
    def signals(self, indices: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """``(n,)`` loss and ``(n,)`` confidence of each image.

        The confidence is that of :meth:`fedward.tasks.base.TaskSpec.confidence`.
        """
        task, losses, confidences = self.plan.task, [], []
        for start in range(0, len(indices), _BATCH):
            inputs, targets = self._source.plain(indices[start : start + _BATCH])
            logits = self.module(*inputs).float()
            loss = self._loss(logits, targets)
            losses.append(loss.double().cpu().numpy())
            sure = task.spec.confidence(task, logits.double(), targets, loss)
            confidences.append(sure.cpu().numpy())
        return np.concatenate(losses), np.concatenate(confidences)

    def gradients(self, groups: list[NDArray[np.int64]]) -> NDArray[np.float32]:
        """``(len(groups), d)`` gradient of the mean loss of each group of images.

        Over the parameters that train, in the order of ``names``.
        """
        named = dict(self._model.named_parameters())
        parameters = [named[name] for name in self.names]
        rows = []
        for group in groups:
            inputs, targets = self._source.plain(group)
            loss = self._loss(self.module(*inputs).float(), targets).mean()
            found = torch.autograd.grad(loss, parameters)
            rows.append(torch.cat([one.flatten() for one in found]).cpu().numpy())
        return np.stack(rows)
