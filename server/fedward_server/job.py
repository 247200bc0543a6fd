"""A study to run, and what stands of it after each round."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from fedward.errors import FedwardError
from fedward.plan.schema import Plan
from fedward.protocol import RoundOrder, SiteFacts
from fedward_server.events import Listener, ignore
from fedward_server.reply_validation import InvalidReply
from fedward_server.results import Arm

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SizeLimit:
    """The most patients and images that a site was enrolled with; None: not known."""

    patients: int | None = None
    images: int | None = None


def _nothing(job: Job) -> None:
    """Keep nothing."""


@dataclass
class Job:
    """A study to run, and what stands of it after each round.

    Attributes
    ----------
    plan : Plan
        What to do.
    arrays : dict
        The global model that the next round starts from.
    arm : Arm
        Results so far.
    seed : int
        Of the random draws of a simulation.
    listen : callable
        Hears what happens.
    stop : threading.Event
        Ends the study at the next occasion.
    average : dict
        The model that is delivered: the moving average, or the same as ``arrays``.
    best : dict
        With ``keep = "best"``, the one of these models with the best figures so far; empty before.
    facts : dict
        What the sites said of themselves.
    members : mapping or None
        Between hospitals: node ids and names of the study's sites that may take part; it is
        replaced when one is removed, released or gets another key. None: every node of the grid,
        which says itself who it is.
    left_out : mapping
        Sites of the study that may take no part now, and why.
    evaluate_only : frozenset of str
        Sites that take no part in training and are asked to evaluate the delivered model.
    limits : mapping
        What the coordinator enrolled of each site's size.
    study : str
        Between hospitals: the study's id.
    sign : callable or None
        Between hospitals: signs an order as its coordinator (see :mod:`fedward.signing`).
    held : dict
        Between hospitals: the digest of the frozen arrays that a node was sent last and answered.
    bad_answers : dict
        How many invalid answers in a row each site has given, by kind of answer.
    memory, memory_stage : dict, str
        What the strategy remembers, and in which stage.
    site_states : dict
        Simulations: what each site keeps from round to round, by its number; a hospital keeps it
        itself.
    save : callable
        Called after each round, before anybody hears that it ended.
    patient : bool
        Whether too few sites make the study wait instead of fail.
    again : threading.Event
        Set by who wants that a study that waits for sites tries again at once.
    ask_again_seconds : float
        After which a site that refused is asked again.
    most_change : float
        Largest change that an update may make, in units of the model's norm.
    quorum, deadline : int or None, float or None
        In place of the plan's, where the study was submitted with others.
    """

    plan: Plan
    arrays: Arrays
    arm: Arm
    seed: int = 0
    listen: Listener = ignore
    stop: threading.Event = field(default_factory=threading.Event)
    average: Arrays = field(default_factory=dict)
    best: Arrays = field(default_factory=dict)
    facts: dict[str, SiteFacts] = field(default_factory=dict)
    members: Mapping[int, str] | None = None
    left_out: Mapping[str, InvalidReply] = field(default_factory=dict)
    evaluate_only: frozenset[str] = frozenset()
    limits: Mapping[str, SizeLimit] = field(default_factory=dict)
    held: dict[int, str] = field(default_factory=dict)
    bad_answers: dict[str, int] = field(default_factory=dict)
    study: str = ""
    sign: Callable[[RoundOrder], RoundOrder] | None = None
    memory: Arrays = field(default_factory=dict)
    memory_stage: str = ""
    site_states: dict[int, Arrays] = field(default_factory=dict)
    save: Callable[[Job], None] = _nothing
    patient: bool = False
    again: threading.Event = field(default_factory=threading.Event)
    ask_again_seconds: float = math.inf
    most_change: float = 1000.0
    quorum: int | None = None
    deadline: float | None = None
    complete: bool = False
    error: FedwardError | None = None

    def __post_init__(self) -> None:
        self.average = self.average or dict(self.arrays)

    @property
    def needed(self) -> int:
        """Updates that make a round count."""
        return self.quorum if self.quorum is not None else self.plan.participation.needed

    @property
    def patience(self) -> float:
        """Seconds that a round waits."""
        return self.deadline if self.deadline is not None else self.plan.participation.deadline

    @property
    def round(self) -> int:
        """The round that runs or comes next, from 1."""
        return len(self.arm.rounds) + 1
