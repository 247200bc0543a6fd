"""Wake those who wait for something that has just come."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager


class Bells:
    """Who waits for what, within one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, set[asyncio.Event]] = {}

    @contextmanager
    def listen(self, keys: Iterable[Hashable]) -> Iterator[asyncio.Event]:
        """An event that is set whenever one of the keys is rung."""
        bell, known = asyncio.Event(), set(keys)
        for key in known:
            self._waiting.setdefault(key, set()).add(bell)
        try:
            yield bell
        finally:
            for key in known:
                self._waiting[key].discard(bell)
                if not self._waiting[key]:
                    del self._waiting[key]

    def ring(self, keys: Iterable[Hashable]) -> None:
        """Wake who waits for any of these."""
        for key in keys:
            for bell in self._waiting.get(key, ()):
                bell.set()

    def ring_all(self) -> None:
        """Wake everybody."""
        self.ring(list(self._waiting))
