"""The frozen first part of a model, whose output is computed once per image and cached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from monai.networks.nets import DenseNet, EfficientNet, ResNet
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fedward.plan.schema import FEATURE_MEAN


class Chain(nn.Module):
    """Blocks of a model, one after the other, under the names that they have in the model.

    The blocks are shared, not copied, and ``chain.named_parameters()`` gives the model's own names
    for them, so that what trains through the chain trains the model.

    Parameters
    ----------
    steps : sequence of (str, nn.Module)
        Dotted name in the model and the block, in the order of the forward pass.
    """

    def __init__(self, steps: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.order = tuple(path for path, _ in steps)
        for path, module in steps:
            _place(self, path, module)

    def forward(self, x: Tensor) -> Tensor:
        for path in self.order:
            x = self.get_submodule(path)(x)
        return x


class TableJoin(nn.Module):
    """Puts the row of a table behind each image's features."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """``(N, d)`` and ``(N, t)`` to ``(N, d + t)``."""
        return torch.cat((x, table.to(x.dtype)), dim=1)


class TableChain(Chain):
    """A chain with a :class:`TableJoin` among its blocks, which takes a table beside the images."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        """``(N, C, *S)`` and ``(N, t)`` to what the last block makes of them."""
        for path in self.order:
            block = self.get_submodule(path)
            x = block(x, table) if isinstance(block, TableJoin) else block(x)
        return x


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def split_at_trainable(
    model: nn.Module, trainable: Iterable[str]
) -> tuple[nn.Module | None, nn.Module]:
    """Divide a model where training starts.

    Parameters
    ----------
    model : nn.Module
        Any model of the registry.
    trainable : iterable of str
        Names of the parameters that train.

    Returns
    -------
    prefix : nn.Module or None
        The longest leading run of blocks in which nothing trains and nothing is random; run it
        under ``torch.no_grad()``. None where there is none, or where the model does not divide
        (the U-Nets: their skips reach over any cut).
    suffix : nn.Module
        The rest, with ``suffix(prefix(x)) == model(x)``, and with the same table where the model
        takes one. It shares its parameters with the model
        and names them alike; the model itself where there is no prefix.
    """
    # The mean of the features is measured once; what lies before it is the same in all rounds.
    steps, names = steps_of(model), {*trainable, FEATURE_MEAN}
    cut = next((i for i, step in enumerate(steps) if _alive(step, names)), len(steps))
    # A prefix without parameters (padding) saves nothing; one without a suffix trains nothing.
    useful = any(True for _, block in steps[:cut] for _ in block.parameters())
    if not useful or cut == len(steps):
        return None, model
    rest = TableChain if isinstance(model, TableChain) else Chain
    prefix, suffix = Chain(steps[:cut]), rest(steps[cut:])
    prefix.train(model.training)
    return prefix, suffix.train(model.training)


def _alive(step: tuple[str, nn.Module], trainable: set[str]) -> bool:
    path, block = step
    if isinstance(block, TableJoin):  # what lies behind it depends on more than the image
        return True
    if any(f"{path}.{name}" in trainable for name in block.state_dict()):
        return True
    return any(isinstance(m, _DropoutNd) and m.p > 0 for m in block.modules())


def steps_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and blocks in the order of the forward pass; none where the model does not divide."""
    if isinstance(model, Chain):
        return [(path, model.get_submodule(path)) for path in model.order]
    if isinstance(model, ResNet):
        return list(_resnet(model))
    if isinstance(model, EfficientNet):
        return list(_efficientnet(model))
    if isinstance(model, DenseNet):
        return [
            *_unrolled("features", model.features),
            *_unrolled("class_layers", model.class_layers),
        ]
    if type(model).forward is nn.Sequential.forward:
        return [step for name, child in model.named_children() for step in _unrolled(name, child)]
    return []


def _unrolled(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if type(module).forward is not nn.Sequential.forward:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _unrolled(f"{path}.{name}", child)


def _resnet(model: ResNet) -> Iterator[tuple[str, nn.Module]]:
    stem = ("conv1", "bn1", "act", *(() if model.no_max_pool else ("maxpool",)))
    for name in (*stem, "layer1", "layer2", "layer3", "layer4", "avgpool"):
        yield from _unrolled(name, model.get_submodule(name))
    yield "flatten", nn.Flatten()
    yield "fc", model.fc


def _efficientnet(model: EfficientNet) -> Iterator[tuple[str, nn.Module]]:
    for name in ("_conv_stem_padding", "_conv_stem", "_bn0", "_swish", "_blocks"):
        yield from _unrolled(name, model.get_submodule(name))
    for name in ("_conv_head_padding", "_conv_head", "_bn1", "_swish", "_avg_pooling"):
        yield name, model.get_submodule(name)
    yield "flatten", nn.Flatten()
    yield "_dropout", model._dropout
    yield "_fc", model._fc
