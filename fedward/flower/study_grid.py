"""A Flower grid for one study's sites that returns replies as they arrive, up to a deadline."""

from __future__ import annotations

import math
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

_POLL_SECONDS = 0.02
# A study looks up between two questions whether it is to stop, and who was cut off.
_WAIT_SECONDS = 0.5


class WaitingGrid(Grid):
    """A grid that can wait for a reply instead of being asked again and again."""

    @abstractmethod
    def wait_for_messages(self, message_ids: Iterable[str], seconds: float) -> list[Message]:
        """Replies that are there; at once when one comes, and none when the time is up."""


class StudyGrid(Grid):
    """A grid that shows only the sites of one study and pulls replies promptly.

    Flower's strategies send to every node that they see; another study's hospital must not be
    among them. Flower's own ``send_and_receive`` sleeps between pulls.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    members : iterable of int
        Node ids of the study's sites.
    stop : threading.Event
        Ends the waiting at once when set.
    """

    def __init__(self, grid: Grid, members: Iterable[int], stop: threading.Event) -> None:
        self._grid, self._members, self._stop = grid, frozenset(members), stop

    @classmethod
    def over(cls, grid: Grid) -> StudyGrid:
        """All nodes of a grid, without a way to stop."""
        return cls(grid, grid.get_node_ids(), threading.Event())

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Flower's run."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message from this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The study's sites that are connected now, in a stable order."""
        return sorted(node for node in self._grid.get_node_ids() if node in self._members)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send to members only."""
        return self._grid.push_messages(
            [message for message in messages if message.metadata.dst_node_id in self._members]
        )

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there now."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send, and wait for all replies or the timeout (seconds)."""
        return [reply for _, reply in self.replies(messages, timeout)]

    def replies(
        self,
        messages: Iterable[Message],
        timeout: float | None = None,
        cut_off: Callable[[], Collection[int]] = tuple,
    ) -> Iterator[tuple[int, Message]]:
        """Send, and give each node that was asked, and its reply, as soon as it is there.

        What stands in place of a node's reply (it was cut off, its message ran out) comes from
        the link: who was asked is known from the question alone. What is there at the deadline
        counts, also where replies are fetched one by one.

        Parameters
        ----------
        messages : iterable of Message
            One per site.
        timeout : float, optional
            Seconds to wait.
        cut_off : callable
            Nodes whose answers are waited for no more.
        """
        sent = [m for m in messages if m.metadata.dst_node_id in self._members]
        nodes = [message.metadata.dst_node_id for message in sent]
        told = zip(self._grid.push_messages(sent), nodes, strict=True)
        # A message that the link did not take has no id, and no reply.
        waiting = {identifier: node for identifier, node in told if identifier}
        end = math.inf if timeout is None else time.monotonic() + timeout
        while waiting and not self._stop.is_set():
            left = end - time.monotonic()
            arrived = self._arrived(list(waiting), max(0.0, left))
            for reply in arrived:
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                # After the deadline errors tell only that it is over.
                if node is not None and not (left <= 0 and reply.has_error()):
                    yield node, reply
            if left <= 0 and not arrived:
                return
            gone = set(cut_off())
            waiting = {key: node for key, node in waiting.items() if node not in gone}

    def _arrived(self, waiting: list[str], left: float) -> list[Message]:
        """What is there of these; where nothing is, a moment passes."""
        if isinstance(self._grid, WaitingGrid):
            return self._grid.wait_for_messages(waiting, min(left, _WAIT_SECONDS))
        arrived = list(self._grid.pull_messages(waiting))
        if not arrived:
            self._stop.wait(min(left, _POLL_SECONDS))
        return arrived


class GridSnapshot(StudyGrid):
    """A study's sites as they are connected at one moment.

    Flower's strategies count the nodes and then wait until so many are there; a site that leaves
    in between would hold up the study for ever.
    """

    def __init__(self, grid: Grid, members: Iterable[int], stop: threading.Event) -> None:
        super().__init__(grid, members, stop)
        self._now = super().get_node_ids()

    def get_node_ids(self) -> list[int]:
        """The sites of that moment."""
        return list(self._now)
