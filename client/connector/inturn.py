"""Orders that wait, studies in turn."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

from client.connector.spool import InHand


class InTurn:
    """A queue that a study with many orders does not fill for the others; for several threads."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[InHand]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, order: InHand) -> None:
        """Add an order behind those of its study."""
        study = str(order.order.record.get("study", ""))
        with self._lock:
            self._waiting.setdefault(study, deque()).append(order)

    def take(self) -> InHand:
        """The next order of the study that has waited longest since its last one."""
        with self._lock:
            study, orders = self._waiting.popitem(last=False)
            order = orders.popleft()
            if orders:
                self._waiting[study] = orders
            return order
