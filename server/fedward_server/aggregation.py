"""The updates of one round: asked for, checked, folded in as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedward.strategies import Contribution
from fedward_server.reply_validation import InvalidReply, Update
from fedward_strategies.contribution import Added, added
from fedward_strategies.fold import Fold
from fedward_strategies.robust import NormBound, capped_weights, most_capped


class Aggregation:
    """What a round has of updates.

    Parameters
    ----------
    fold : bool
        Whether the strategy needs their mean alone; an update is then let go of as soon as neither
        its weight can be capped nor its norm be the largest.
    max_share : float
        Largest share of the round's weight that a site may have.
    bound : NormBound, optional
        Of the norms; none: it is not known before all updates are there.
    weigh : callable
        The strategy's weight of a contribution in the mean.
    favour : mapping
        By site, what its weight is multiplied by; a site that is not in it keeps its weight.
    passes : int
        How often a site does its local training in the round; of which the update has one.

    Attributes
    ----------
    besides : NormBound or None
        The same of what the strategy has a site send besides its update.
    """

    def __init__(
        self,
        *,
        fold: bool,
        max_share: float = 1.0,
        bound: NormBound | None = None,
        weigh: Callable[[Contribution], float] = attrgetter("weight"),
        favour: Mapping[str, float] = MappingProxyType({}),
        passes: int = 1,
    ) -> None:
        self.updates: dict[str, Update] = {}
        self.refused: dict[str, InvalidReply] = {}
        self.bound = bound
        self.besides: NormBound | None = None
        self._max_share, self._weigh, self._passes = max_share, weigh, passes
        self._favour = favour
        self._fold = Fold() if fold else None

    def add(self, site: str, update: Update) -> None:
        """Take a valid update; a second one of a site is ignored."""
        if site in self.updates or update.message is None:
            return
        self.updates[site] = replace(update, weight=update.weight * self._favour.get(site, 1.0))
        if self._fold is not None:
            held = [name for name, one in self.updates.items() if one.message is not None]
            for name in set(held) - self._kept(held):
                self._take_in(name, self.updates[name].weight)

    def _kept(self, held: list[str]) -> set[str]:
        """Whose arrays a fold must not have yet: the heaviest sites' and the largest update."""
        heaviest = sorted(held, key=lambda name: self.updates[name].weight, reverse=True)
        largest = max(held, key=lambda name: self.updates[name].norm)
        besides = max(held, key=lambda name: self.updates[name].besides)
        both = {largest, besides} if self.updates[besides].besides else {largest}
        return {*heaviest[: most_capped(self._max_share)], *both}

    def _take_in(self, site: str, weight: float) -> None:
        update = self.updates[site]
        if self._fold is not None and update.message is not None:
            record = update.message.content.array_records["arrays"]
            share = self._weigh(self._contribution(site, weight))
            self._fold.add({n: a.numpy() for n, a in record.items()}, share)
            free_arrays(update.message)
            self.updates[site] = replace(update, message=None)

    def outliers(self, sizes: Mapping[str, float], ratio: float) -> dict[str, InvalidReply]:
        """Take out the updates whose norm lies beyond the round's bound, and say so of each.

        Where the mean has one of them already, nothing is left of the round but the bound and who
        was refused: :attr:`updates` is empty, and the other sites must send theirs again.
        """
        if self.bound is not None or len(self.updates) < 2:
            return {}
        updates, of_sites = self.updates.values(), [sizes[site] for site in self.updates]
        self.bound = NormBound.of([one.norm for one in updates], of_sites, ratio)
        self.besides = NormBound.of([one.besides for one in updates], of_sites, ratio)
        found = {
            site: bad
            for site, one in self.updates.items()
            if (bad := self.too_far(one, sizes[site]))
        }
        whole = all(self.updates[site].message is not None for site in found)
        for site in found if whole else list(self.updates):
            if (message := self.updates.pop(site).message) is not None:
                free_arrays(message)
        if not whole:
            self._fold = Fold()
        self.refused |= found
        return found

    def too_far(self, update: Update, size: float) -> InvalidReply | None:
        """Why an update's norm is too large for this round; none where it is not, or not yet."""
        for what, norm, bound in (
            ("an update's norm", update.norm, self.bound),
            ("the norm of what is sent besides an update", update.besides, self.besides),
        ):
            if bound is not None and norm > bound.limit(size):
                return InvalidReply(
                    f"{what} must stay near the median of its round (got {norm:.3g}, "
                    f"{norm / bound.median:.3g} times the median; strategy.max_norm_ratio is "
                    f"{bound.ratio:g}).",
                    outcome=update.outcome,
                )
        return None

    def weights(self) -> dict[str, float]:
        """Each site's weight in this round, none with more than its largest share."""
        return capped_weights(
            {site: one.weight for site, one in sorted(self.updates.items())}, self._max_share
        )

    def added(self, *, weighted: bool) -> dict[str, Added]:
        """What each site adds to the round; nothing where its updates were not sketched.

        Parameters
        ----------
        weighted : bool
            Whether the strategy looks at weights; else each site counts once.
        """
        sketches = {s: one.sketch for s, one in self.updates.items() if one.sketch is not None}
        weights = self.weights() if weighted else dict.fromkeys(self.updates, 1.0)
        total = sum(weights.values())
        return added(sketches, {site: weight / total for site, weight in weights.items()})

    def contributions(self) -> list[Contribution]:
        """What the round is made of, in the order of the sites' names."""
        return [self._contribution(site, weight) for site, weight in self.weights().items()]

    def _contribution(self, site: str, weight: float) -> Contribution:
        update = self.updates[site]
        return Contribution(weight, update.outcome.steps // self._passes, site, update.norm)

    def ordered(self) -> list[Update]:
        """The updates in the order of their sites' names, however they came."""
        return [self.updates[site] for site in sorted(self.updates)]

    def messages(self, node: int) -> list[Message]:
        """What the strategy aggregates: the updates, or one message that is their mean.

        A strategy over means cannot tell them apart: the weighted mean of one is itself.
        """
        weights = self.weights()
        if self._fold is None:
            for site, weight in weights.items():
                if (message := self.updates[site].message) is not None:
                    message.content["metrics"] = MetricRecord({"num-examples": weight})
            return [update.message for update in self.ordered() if update.message]
        for site, weight in weights.items():
            self._take_in(site, weight)
        content = RecordDict(
            {
                "arrays": record_of(self._fold.mean()),
                "metrics": MetricRecord({"num-examples": self._fold.weight}),
            }
        )
        return [Message(content, dst_node_id=node, message_type="train")]


def free_arrays(message: Message) -> None:
    """Free a reply's arrays now.

    Flower's records refer to themselves once they were read, and would stay until Python's
    collector comes by; a few replies of a large model fill a machine before that.
    """
    if message.has_content():
        for record in message.content.array_records.values():
            record.clear()


def record_of(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Arrays as Flower sends them."""
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def size_of(content: RecordDict) -> int:
    """Bytes of all tensors of a message."""
    return sum(len(a.data) for record in content.array_records.values() for a in record.values())
