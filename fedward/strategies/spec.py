"""What the rest of the program knows of a strategy, and the hook for what it does at a site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Setting:
    """One setting of a strategy.

    Attributes
    ----------
    meaning : str
        What it does, for the plan reference.
    default : float or int or None
        The default of the server's class, which holds when a plan leaves it out; None: a plan must
        give it.
    least, below : float
        The value must be at least ``least`` and less than ``below``.
    above_least : bool
        Whether ``least`` itself is out.
    whole : bool
        Whether it counts something.
    since : int
        The schema version that added it (see :mod:`fedward.plan.versions`).
    """

    meaning: str
    default: float | int | None = None
    least: float = 0.0
    below: float = float("inf")
    above_least: bool = False
    whole: bool = False
    since: int = 1

    @property
    def limits(self) -> str:
        """The limits in words."""
        text = f"{'above' if self.above_least else 'at least'} {self.least:g}"
        if self.below != float("inf"):
            text += f", below {self.below:g}"
        return f"a whole number, {text}" if self.whole else text

    def allows(self, value: float) -> bool:
        """Whether a value is within the limits."""
        if self.whole and value != int(value):
            return False
        return (self.least < value or (self.least == value and not self.above_least)) and (
            value < self.below
        )

    def normal(self, value: float | int) -> float | int:
        """The one way to write a value: counts as integers, all else as floats."""
        if self.whole:
            return int(value) if value == int(value) else value
        return float(value)


class Memory(NamedTuple):
    """An attribute of the server's class that goes into checkpoints.

    Attributes
    ----------
    attribute : str
        Its name; it holds one array per trained array, or None before the first round.
    as_list : bool
        Whether it is a list in the order of the trained arrays, and no mapping by name.
    """

    attribute: str
    as_list: bool = False


Kinds = Mapping[str, str]
Tensors = Mapping[str, Mapping[str, "Tensor"]]
"""By kind and by name of the trained array."""


@dataclass(frozen=True)
class SiteRound:
    """What a hook is given at the beginning of a round.

    Attributes
    ----------
    settings : mapping
        The strategy's settings in the signed plan.
    parameters : mapping
        The parameters that train in this round, by name, with the global model's values.
    kept : mapping
        What :meth:`SiteHook.finish` kept in the last round, by kind and name; zeros at first and
        at the beginning of a stage.
    received : mapping
        What the aggregator sent beside the model, by kind and name.
    """

    settings: Mapping[str, float]
    parameters: Mapping[str, nn.Parameter]
    kept: Tensors
    received: Tensors


@dataclass(frozen=True)
class SiteResult:
    """What a round leaves at a site, and sends besides the update: exactly the declared kinds.

    Attributes
    ----------
    kept, sent : mapping
        Tensors by kind and name, each with the shape of its trained array.
    """

    kept: Tensors = field(default_factory=dict)
    sent: Tensors = field(default_factory=dict)


class SiteHook:
    """What a strategy does at a site in one round; made anew for each.

    It sees parameters and gradients, never an image. With differential privacy the gradients that
    it sees have their noise already, so that whatever it does with them is post-processing.

    Parameters
    ----------
    about : SiteRound
        What it is given.
    """

    def __init__(self, about: SiteRound) -> None:
        self.about = about

    def add_to_gradient(self, rate: float) -> None:
        """Change the parameters' ``grad`` in place, before the optimiser steps.

        A term of the loss is added as its gradient. It is called without autograd.

        Parameters
        ----------
        rate : float
            Learning rate of the step.
        """

    def finish(self) -> SiteResult:
        """After the last step: what to keep, and what to send besides the update."""
        return SiteResult()


class SitePast(NamedTuple):
    """What the aggregator knows of a site from the study's earlier rounds.

    Attributes
    ----------
    shortfalls : tuple of float or None
        One for each evaluation so far, at every site: how far its primary figure on its validation
        patients was from perfect, as the evaluation released it; None where it released none.
    agreements : tuple of float or None
        One for each round so far: the cosine of its update with the others', from -1 to 1; None
        where it took no part, or took it alone.
    """

    shortfalls: tuple[float | None, ...] = ()
    agreements: tuple[float | None, ...] = ()


Pasts = Mapping[str, SitePast]
"""By the site's name."""


class Contribution(NamedTuple):
    """What one site's update of a round was made of.

    Attributes
    ----------
    weight : float
        The plan's weight of the site times :meth:`ServerRule.favour`, none above
        ``strategy.max_share``.
    steps : int
        Optimiser steps.
    site : str
        Its name.
    norm : float
        L2 norm of the update minus the model that was sent.
    """

    weight: float
    steps: int
    site: str = ""
    norm: float = 0.0


@dataclass(frozen=True)
class ServerRound:
    """What a server rule is given when a round's updates are there.

    Attributes
    ----------
    model : mapping
        The arrays that train, as the sites received them.
    updates : sequence of mapping
        The sites' arrays, in the order of ``contributions``; of a strategy that does not need all
        of them one mapping: their mean, weighted by :meth:`ServerRule.weight`.
    sent : mapping
        Mean of what sites sent besides, by kind and name, with the same weights.
    contributions : sequence of Contribution
        Of each site that took part, in the order of the sites' names.
    sites : int
        Sites of the study, those that did not take part included.
    """

    model: Arrays
    updates: Sequence[Arrays]
    sent: Mapping[str, Arrays]
    contributions: Sequence[Contribution]
    sites: int

    @property
    def taking_part(self) -> float:
        """Share of the study's sites whose updates are there."""
        return len(self.contributions) / max(self.sites, len(self.contributions))


class ServerRule(ABC):
    """How a strategy makes one model of a round's updates, in numpy.

    Made anew for each stage. What it keeps from round to round are attributes, mappings by the
    name of the trained array, which the strategy's ``memory`` names; None before the first round.

    Parameters
    ----------
    settings : mapping
        The strategy's settings, defaults included.
    momentum : float
        Of the sites' optimiser.
    """

    def __init__(self, settings: Mapping[str, float], momentum: float = 0.0) -> None:
        self.settings, self.momentum = settings, momentum

    def favour(self, pasts: Pasts) -> Mapping[str, float]:
        """What the plan's weight of each site is multiplied by in the next round; above 0.

        It is asked before each round. A site that it does not name keeps its weight.
        """
        return {}

    def weight(self, made: Contribution) -> float:
        """A site's weight in the mean of the updates; above 0."""
        return made.weight

    @abstractmethod
    def combine(self, about: ServerRound) -> Arrays:
        """The next model; it may change what the rule keeps."""


@dataclass(frozen=True)
class StrategySpec:
    """A strategy.

    Attributes
    ----------
    name : str
        As plans name it.
    summary, description : str
        A line for people who read a plan; Markdown for the strategies' page, with its source.
    server : str or type
        What combines the updates: one of Flower's classes, ``module:name``, or a
        :class:`ServerRule`.
    settings : mapping
        What a plan may set.
    arguments : mapping
        The server class's name of a setting, where it has another one.
    weighted : bool
        Whether a site's weight counts.
    by_parameter : bool
        Whether it compares the updates parameter by parameter.
    needs_all : bool
        Whether it compares the updates of a round; else their weighted mean is enough.
    server_optimizer : bool
        Whether it takes a step of its own with the mean update.
    updates_least, updates_per_malicious : int
        Updates without which it cannot work, and how many more each malicious site takes.
    minimum_sites : int
        Sites that a study needs.
    plain_sgd : bool
        Whether its arithmetic is that of SGD without momentum at the sites.
    sgd : bool
        Whether its arithmetic is that of SGD, with momentum or without.
    memory : mapping
        What the server's class remembers from round to round, by kind.
    site : type or None
        What it does at a site.
    kept : mapping
        Kinds of arrays that a site keeps from round to round, and what each is.
    received : tuple of str
        Kinds of ``memory`` that travel to the sites with the model.
    sent : mapping
        Kinds of arrays that a site sends besides its update, and what each is.
    sent_from_update : bool
        Whether all that is sent is worked out from the update and from what the aggregator knows:
        post-processing of the noised update, which costs no privacy. Else a private plan is
        refused.
    by_figures : bool
        Whether it weighs sites by their primary figure on validation patients.
    since : int
        The schema version that added it (see :mod:`fedward.plan.versions`).
    """

    name: str
    summary: str
    server: str | type[ServerRule]
    description: str = ""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=dict)
    weighted: bool = True
    by_parameter: bool = False
    needs_all: bool = False
    server_optimizer: bool = False
    updates_least: int = 1
    updates_per_malicious: int = 0
    minimum_sites: int = 1
    plain_sgd: bool = False
    sgd: bool = False
    memory: Mapping[str, Memory] = field(default_factory=dict)
    site: type[SiteHook] | None = None
    kept: Kinds = field(default_factory=dict)
    received: tuple[str, ...] = ()
    sent: Kinds = field(default_factory=dict)
    sent_from_update: bool = False
    by_figures: bool = False
    since: int = 1

    def normal(self, given: Mapping[str, float | int]) -> dict[str, float | int]:
        """Settings in the one way to write them."""
        plain = Setting("")
        return {key: self.settings.get(key, plain).normal(value) for key, value in given.items()}

    def given(self, values: Mapping[str, float | int]) -> dict[str, float | int]:
        """The settings of a plan, with the defaults of those that it leaves out."""
        every = {key: setting.default for key, setting in self.settings.items()} | dict(values)
        return {key: value for key, value in every.items() if value is not None}

    def updates_needed(self, malicious: int) -> int:
        """Updates without which it cannot withstand so many malicious sites."""
        return self.updates_least + self.updates_per_malicious * malicious

    @property
    def private(self) -> bool:
        """Whether a plan with differential privacy may name it."""
        return not self.sent or self.sent_from_update

    def broken(self, given: Mapping[str, float | int]) -> Iterator[tuple[str, str]]:
        """The key and rule of each setting that is unknown, missing or out of its limits."""
        for name, value in sorted(given.items()):
            where = f"strategy.settings.{name}"
            if name not in self.settings:
                known = ", ".join(sorted(self.settings)) or "no settings"
                yield where, f"{self.name} knows {known}; remove it"
            elif not self.settings[name].allows(value):
                limits = self.settings[name].limits
                yield where, f"{name} must be {limits}, not {value:g}; change it"
        for name, setting in self.settings.items():
            if setting.default is None and name not in given:
                yield (
                    f"strategy.settings.{name}",
                    f"{self.name} needs {name} ({setting.meaning}); add it",
                )


def array_names(kinds: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Names of arrays beside the model, ``KIND/NAME``, with kind and trained array, in order."""
    every = tuple(names)
    return {f"{kind}/{name}": (kind, name) for kind in kinds for name in every}
