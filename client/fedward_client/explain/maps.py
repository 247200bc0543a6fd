"""Maps of one prepared image: what a classifier's answer rests on, and where a mask is unsure.

A classifier is explained by the log-odds of one class, :math:`\\log(p / (1 - p))`. A softmax leaves
the network's outputs undetermined up to a constant; the log-odds are free of it, and of several
independent labels they are the outputs themselves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any, Final, Literal

import numpy as np
import torch
from monai.visualize import GradCAM, GradCAMpp, OcclusionSensitivity
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from fedward.errors import PlanError
from fedward.networks import MODELS
from fedward.plan.schema import Plan

Method = Literal["grad-cam", "grad-cam++", "integrated-gradients", "occlusion"]
METHODS: Final[tuple[Method, ...]] = (
    "grad-cam",
    "grad-cam++",
    "integrated-gradients",
    "occlusion",
)
_CAMS: Final = {"grad-cam": GradCAM, "grad-cam++": GradCAMpp}
_STEPS: Final = 32  # of the path of integrated gradients, at first
_BLUR: Final = 1 / 20  # of a side: the deviation of the Gaussian
_AT_ONCE: Final = 16  # images in the network at once
_OCCLUDED: Final = 8  # parts of a side, one of which is covered
_OVERLAP: Final = {2: 0.5, 3: 0.0}  # of covered parts; in 3D half would take 3,375 answers, not 512
_BRIGHTEST: Final = 99.5  # per cent of pixels that are not shown as the brightest


class LogOdds(nn.Module):
    """A classifier that answers with log-odds ``(n, K)``.

    Parameters
    ----------
    network : nn.Module
        Of the plan, in evaluation mode.
    multi_label : bool
        Whether its outputs are those of sigmoids.
    """

    def __init__(self, network: nn.Module, multi_label: bool) -> None:
        super().__init__()
        self.network, self._several = network, multi_label
        self.row: Tensor | None = None
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        beside = () if self.row is None else (self.row.expand(len(images), -1),)
        outputs: Tensor = self.network(images, *beside)
        if self._several:
            return outputs
        classes = range(outputs.shape[1])
        others = [outputs[:, [j for j in classes if j != k]].logsumexp(1) for k in classes]
        return outputs - torch.stack(others, dim=1)


class Explained:
    """A classifier, ready to be explained.

    Parameters
    ----------
    plan : Plan
        Of the network.
    network : nn.Module
        In evaluation mode, on its device.
    method : str
        One of :data:`METHODS`.

    Raises
    ------
    PlanError
        The method needs a feature map, and the network has none.
    """

    def __init__(self, plan: Plan, network: nn.Module, method: Method) -> None:
        self._model, self._method = LogOdds(network, plan.task.multi_label), method
        self._cam: GradCAM | None = None
        if method in _CAMS and not MODELS[plan.model.name].feature_map:
            raise PlanError(
                f"{method} needs a feature map, which {plan.model.name} has not",
                fix="Choose integrated-gradients or occlusion",
                where="--method",
            )

    def probabilities(self, images: Tensor, row: Tensor | None = None) -> NDArray[np.float64]:
        """``(n, K)`` of prepared images ``(n, C, *S)``, all with the same row of a table."""
        self._model.row = row
        with torch.no_grad():
            parts = [self._model(part) for part in torch.split(images, _AT_ONCE)]
        return np.asarray(torch.cat(parts).double().sigmoid().cpu().numpy())

    def __call__(
        self, images: Tensor, number: int, row: Tensor | None = None
    ) -> NDArray[np.float32]:
        """The map ``(*S)`` of one image ``(1, C, *S)``: what speaks for a class is above 0.

        Grad-CAM and Grad-CAM++ give the weighted feature map, enlarged linearly; integrated
        gradients sum up to the log-odds' distance from those of the blurred image; occlusion gives
        how far they fall when the mean covers a part.
        """
        self._model.row = row
        if self._method == "integrated-gradients":
            found = integrated_gradients(lambda x: self._model(x)[:, number], images)
            return np.asarray(found.sum(dim=1)[0].cpu().numpy())
        if self._method == "occlusion":
            return self._occlusion(images, number)
        if self._cam is None:
            layer = last_feature_map(self._model, images)
            self._cam = _CAMS[self._method](self._model, layer, postprocessing=lambda x: x)
        inputs = images.detach().clone().requires_grad_(True)
        found = self._cam(x=inputs, class_idx=number)
        return np.asarray(found[0, 0].detach().float().cpu().numpy())

    def _occlusion(self, images: Tensor, number: int) -> NDArray[np.float32]:
        covered = [max(1, side // _OCCLUDED) for side in images.shape[2:]]
        look = OcclusionSensitivity(
            self._model,
            covered,
            _AT_ONCE,
            verbose=False,
            mode="mean_img",
            overlap=_OVERLAP[len(covered)],
            activate=False,
        )
        with torch.no_grad(), warnings.catch_warnings():
            # MONAI indexes with lists, of which torch warns; a test knows what must come of it.
            warnings.filterwarnings("ignore", "Using a non-tuple sequence", UserWarning)
            answers, _ = look(x=images)
            fall = self._model(images)[0, number] - torch.as_tensor(answers)[0, number]
        return np.asarray(fall.float().cpu().numpy())


def last_feature_map(model: nn.Module, images: Tensor) -> str:
    """Name of the layer that ends a network's last feature map: what has places, and is made once.

    Parameters
    ----------
    model : nn.Module
        Takes `images`.
    images : Tensor
        ``(1, C, *S)``.

    Raises
    ------
    PlanError
        There is none.
    """
    made: list[tuple[str, bool]] = []

    def listen(name: str) -> Callable[..., None]:
        def hear(_module: nn.Module, _inputs: Any, output: Any) -> None:
            places = isinstance(output, Tensor) and output.ndim == images.ndim
            made.append((name, places and math.prod(output.shape[2:]) > 1))

        return hear

    hooks = [one.register_forward_hook(listen(name)) for name, one in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, _ in made]
    for name, has_places in reversed(made):
        if has_places and names.count(name) == 1:
            return name
    raise PlanError(
        "Grad-CAM needs a feature map of more than one place",
        fix="Choose integrated-gradients or occlusion",
        where="--method",
    )


def integrated_gradients(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365), by the midpoint rule.

    The path is straight and starts at the blurred image. A constant image, the usual start, has no
    deviation by which a normalising layer could divide.

    Parameters
    ----------
    score : callable
        From images ``(n, C, *S)`` to what is explained, ``(n,)``.
    images : Tensor
        ``(1, C, *S)``.

    Returns
    -------
    Tensor
        Shape of `images`; its sum is the score of the image less that of the blurred one
        (completeness), to a hundredth of it or of 0.1: the steps are halved until it is, at most
        twice.
    """
    start = blurred(images)
    with torch.no_grad():
        whole = float(score(images) - score(start))
    steps, found = _STEPS, images
    while True:
        places = (torch.arange(steps, device=images.device, dtype=images.dtype) + 0.5) / steps
        gradient = torch.zeros_like(images)
        for part in torch.split(places, _AT_ONCE):
            share = part.reshape(-1, *[1] * (images.ndim - 1))
            on_path = (start + share * (images - start)).requires_grad_(True)
            (slope,) = torch.autograd.grad(score(on_path).sum(), on_path)
            gradient += slope.sum(dim=0, keepdim=True)
        found = (images - start) * gradient / steps
        if abs(float(found.sum()) - whole) <= max(0.1, abs(whole)) / 100 or steps >= _STEPS << 2:
            return found
        steps *= 2


def blurred(images: Tensor) -> Tensor:
    """Images ``(n, C, *S)`` under a Gaussian whose deviation is a twentieth of each side."""
    sigma = [0.0, 0.0, *(side * _BLUR for side in images.shape[2:])]
    return torch.from_numpy(ndimage.gaussian_filter(images.cpu().numpy(), sigma)).to(images.device)


def mean_image(images: Tensor) -> Tensor:
    """Images of one shape, every pixel being the mean of its channel."""
    return images.mean(dim=tuple(range(2, images.ndim)), keepdim=True).expand_as(images)


def scaled(found: NDArray[np.float32]) -> NDArray[np.float32]:
    """What speaks for the class, from 0 to 1 for a page; the brightest half per cent are 1."""
    above = np.maximum(found, 0)
    top = float(np.percentile(above, _BRIGHTEST)) or float(above.max())
    return np.asarray(np.clip(above / top, 0, 1) if top > 0 else above, np.float32)


@torch.no_grad()
def mirrored(
    answer: Callable[[Tensor], NDArray[Any]], images: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Test-time augmentation (Wang et al. 2019, arXiv:1807.07356) by all mirrorings.

    Parameters
    ----------
    answer : callable
        From an image ``(1, C, *S)`` to probabilities ``(K, *S)``, the first class being background.
    images : Tensor
        ``(1, C, *S)``.

    Returns
    -------
    tuple
        The entropy of the mean probabilities ``(*S)``, 0 (sure) to 1 (all classes alike), and where
        some answer is no background.
    """
    axes = range(2, images.ndim)
    ways = [list(some) for k in range(len(axes) + 1) for some in combinations(axes, k)]
    mean, marked = None, np.zeros(images.shape[2:], np.bool_)
    for way in ways:
        found = np.flip(answer(images.flip(way)), tuple(axis - 1 for axis in way))
        marked |= found.argmax(axis=0) > 0
        mean = found / len(ways) if mean is None else mean + found / len(ways)
    return entropy(np.asarray(mean)), marked


def entropy(probabilities: NDArray[Any]) -> NDArray[np.float32]:
    """Of ``(K, ...)`` probabilities that sum to 1, as a share of the largest possible."""
    sure = np.clip(probabilities, 1e-12, 1.0)
    whole = -(probabilities * np.log(sure)).sum(axis=0) / math.log(len(probabilities))
    return np.asarray(np.clip(whole, 0, 1), np.float32)
