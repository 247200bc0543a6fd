"""A fair (round-robin) scheduler and queue: one order at a time, studies in turn."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from fedward.errors import FedwardError

T = TypeVar("T")


class Cancelled(FedwardError):
    """The order was given up."""

    def __init__(self) -> None:
        super().__init__("an order was given up", fix="Send it again")


class FairScheduler:
    """Hands one turn at a time to orders; among studies that wait, round robin."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[object]] = OrderedDict()
        self._next: object | None = None
        self._running: tuple[str, threading.Event] | None = None
        self._given_up: set[object] = set()
        self._closed = False

    @contextmanager
    def turn(self, study: str) -> Iterator[threading.Event]:
        """Wait for the study's turn and hold it; the event says that the order was given up.

        Raises
        ------
        Cancelled
            It was given up while it waited.
        """
        ticket, gone = object(), threading.Event()
        with self._changed:
            self._waiting.setdefault(study, deque()).append(ticket)
            self._advance()
            while self._next is not ticket and not self._over(ticket):
                self._changed.wait(1.0)
            # Also whoever's turn it became because the one before was given up.
            if self._over(ticket):
                self._leave(study, ticket)
                raise Cancelled
            self._running = (study, gone)
        try:
            yield gone
        finally:
            with self._changed:
                self._running = self._next = None
                self._advance()

    @property
    def closed(self) -> bool:
        """Whether everything was given up."""
        return self._closed

    def waiting(self) -> int:
        """How many orders wait."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def give_up(self, study: str) -> int:
        """Give up all orders of a study; how many there were."""
        with self._changed:
            tickets = list(self._waiting.get(study, ()))
            self._given_up |= set(tickets)
            running = self._running is not None and self._running[0] == study
            if running and self._running is not None:
                self._running[1].set()
            self._changed.notify_all()
            return len(tickets) + running

    def close(self) -> None:
        """Give up everything, for good."""
        with self._changed:
            self._closed = True
            if self._running is not None:
                self._running[1].set()
            self._changed.notify_all()

    def _over(self, ticket: object) -> bool:
        return self._closed or ticket in self._given_up

    def _advance(self) -> None:
        """Give the turn to the study that has waited longest since its last one."""
        if self._next is None and self._waiting:
            study, tickets = next(iter(self._waiting.items()))
            self._next = tickets.popleft()
            del self._waiting[study]
            if tickets:
                self._waiting[study] = tickets
        self._changed.notify_all()

    def _leave(self, study: str, ticket: object) -> None:
        self._given_up.discard(ticket)
        tickets = self._waiting.get(study)
        if tickets is not None and ticket in tickets:
            tickets.remove(ticket)
            if not tickets:
                del self._waiting[study]
        if self._next is ticket:
            self._next = None
            self._advance()


class FairQueue(Generic[T]):
    """A queue that a study with many orders does not fill for the others; for several threads."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, study: str, order: T) -> None:
        """Add an order behind those of its study."""
        with self._lock:
            self._waiting.setdefault(study, deque()).append(order)

    def take(self) -> T:
        """The next order of the study that has waited longest since its last one."""
        with self._lock:
            study, orders = self._waiting.popitem(last=False)
            order = orders.popleft()
            if orders:
                self._waiting[study] = orders
            return order
