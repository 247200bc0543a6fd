"""What a plan may ask of one network, without loading torch; its builder loads it when called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from fedward.plan.schema import Plan

Sizes = tuple[int, ...]
KeyMap = Callable[[str], str]


@dataclass(frozen=True)
class Widths:
    """What ``model.channels`` means for a network that has a choice of widths.

    Attributes
    ----------
    meaning : str
        Which widths it takes, for the plan reference and for the error.
    default, least : tuple of int
        Without ``model.channels``; and the narrowest that still train, which the tests use.
    fits : callable
        Whether the network takes these widths.
    """

    meaning: str
    default: Sizes
    least: Sizes
    fits: Callable[[Sizes], bool] = lambda widths: True


@dataclass(frozen=True)
class Sides:
    """What the sides of an image must be multiples of.

    Attributes
    ----------
    meaning : str
        The rule, for the plan reference.
    rule : callable
        From ``preprocessing.size`` and the widths to the reason and the number.
    """

    meaning: str
    rule: Callable[[Sizes, Sizes], tuple[str, int]]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One network: its name in a plan, what a plan may ask of it, and how it is built.

    Attributes
    ----------
    name : str
        ``model.name`` of a plan.
    summary : str
        The architecture and its source.
    tasks : tuple of str
        ``task.kind`` of the plans that it serves.
    build : callable
        From a plan to the network on torch's default device; it must train with per-sample
        gradients (:func:`fedward.dp.compat.make_private`). A chain of blocks is best an
        ``nn.Sequential``: its frozen beginning is then computed once per image
        (:func:`fedward.models.prefix.split_at_trainable`). Imports torch and MONAI inside.
    head : str
        Shell-style pattern of the arrays whose shape follows the number of classes.
    dimensions, colours : tuple of int
        ``task.dimensions`` and ``preprocessing.channels`` that it takes.
    widths : Widths or None
        Its choice of widths; none: fixed.
    sides : Sides or None
        The image sizes that it takes; none: :func:`fedward.models.registry.build_model` finds out.
    dropout, taps, supervised : bool
        Whether it has dropout; whether its head can read blocks in the middle; whether its levels
        can answer in training.
    feature_map : bool
        Whether a classifier's head reads a feature map, which Grad-CAM weighs.
    frozen_statistics : bool
        Whether it keeps the statistics of public weights, and so cannot start without them.
    public_keys : callable or None
        From the model's array names to a function that translates a name in public weights.
    since : int
        The plan schema version that added it (see :mod:`fedward.plan.versions`).
    """

    name: str
    summary: str
    tasks: tuple[str, ...]
    build: Callable[[Plan], nn.Module] = field(repr=False)
    head: str
    dimensions: Sizes = (2, 3)
    colours: Sizes = (1, 3)
    widths: Widths | None = None
    sides: Sides | None = None
    dropout: bool = True
    taps: bool = False
    supervised: bool = False
    feature_map: bool = True
    frozen_statistics: bool = False
    public_keys: Callable[[Iterable[str]], KeyMap] | None = None
    since: int = 1

    def channels(self, plan: Plan) -> Sizes:
        """The plan's widths, or the default ones; () where they are fixed."""
        return plan.model.channels or (self.widths.default if self.widths else ())

    def broken(self, plan: Plan) -> Iterator[tuple[str, str]]:
        """Key and rule of whatever a plan asks of this network that it does not do."""
        name, model = self.name, plan.model
        if plan.task.kind not in self.tasks:
            yield "model.name", f"{name} does not do {plan.task.kind}; choose another model"
            return
        if plan.task.dimensions not in self.dimensions:
            (only,) = self.dimensions
            yield "model.name", f"{name} is {only}D only; choose another model"
        if self.frozen_statistics and model.initial_weights is None:
            yield (
                "model.initial_weights",
                f"{name} keeps the public statistics of its weights frozen, so it needs "
                "initial_weights; name the file and its SHA-256",
            )
        # A network that takes grey and colours takes any number of channels.
        if len(self.colours) == 1 and plan.preprocessing.channels not in self.colours:
            (only,) = self.colours
            yield "preprocessing.channels", f"{name} takes {only} channels; set channels = {only}"
        if model.taps is not None and not self.taps:
            yield "model.taps", f"{name} has no taps; remove them"
        if model.deep_supervision and not self.supervised:
            yield (
                "model.deep_supervision",
                f"the levels of {name} do not answer by themselves; remove deep_supervision",
            )
        if model.dropout and not self.dropout:
            yield "model.dropout", f"{name} has no dropout; remove dropout, or choose another model"
        if model.channels is not None and self.widths is None:
            yield "model.channels", f"{name} has fixed widths; remove channels"
        elif model.channels is not None and self.widths and not self.widths.fits(model.channels):
            yield (
                "model.channels",
                f"{name} takes {self.widths.meaning}; change the widths, or leave channels out",
            )
        elif self.sides is not None:
            why, multiple = self.sides.rule(plan.preprocessing.size, self.channels(plan))
            if any(side % multiple for side in plan.preprocessing.size):
                yield (
                    "preprocessing.size",
                    f"{name} {why}; make each side a multiple of {multiple}",
                )


def halved(between: str, times: Callable[[Sizes], int]) -> Sides:
    """Sides for a network that halves the image.

    Parameters
    ----------
    between : str
        How often, for the reference.
    times : callable
        From the widths to how often.
    """

    def rule(size: Sizes, channels: Sizes) -> tuple[str, int]:
        return f"halves the image {times(channels)} times", 2 ** times(channels)

    return Sides(f"a power of two: the image is halved {between}", rule)
