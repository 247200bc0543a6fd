"""The updates of one round: asked for, checked, folded in as they come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from server.replies import Update
from strategies.fold import Fold


class Gathered:
    """What a round has of updates.

    Parameters
    ----------
    fold : bool
        Whether the strategy needs their mean alone; each update is then let go of at once.
    """

    def __init__(self, *, fold: bool) -> None:
        self.updates: dict[str, Update] = {}
        self._fold = Fold() if fold else None

    def add(self, site: str, update: Update) -> None:
        """Take a valid update; a second one of a site is ignored."""
        if site in self.updates or update.message is None:
            return
        if self._fold is not None:
            record = update.message.content.array_records["arrays"]
            self._fold.add({n: a.numpy() for n, a in record.items()}, update.weight)
            let_go(update.message)
            update = Update(None, update.outcome, update.size, update.weight)
        self.updates[site] = update

    def ordered(self) -> list[Update]:
        """The updates in the order of their sites' names, however they came."""
        return [self.updates[site] for site in sorted(self.updates)]

    def messages(self, node: int) -> list[Message]:
        """What the strategy aggregates: the updates, or one message that is their mean.

        A strategy over means cannot tell them apart: the weighted mean of one is itself.
        """
        if self._fold is None:
            return [update.message for update in self.ordered() if update.message]
        content = RecordDict(
            {
                "arrays": record_of(self._fold.mean()),
                "metrics": MetricRecord({"num-examples": self._fold.weight}),
            }
        )
        return [Message(content, dst_node_id=node, message_type="train")]


def let_go(message: Message) -> None:
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
