"""Where the parts of messages lie: Flower's own object store, read and written in large pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final

from starlette.concurrency import run_in_threadpool

from fedward.frames import object_frame, read_object

_BATCH: Final = 8 << 20


class Shelf:
    """Gives out the parts of messages and takes them in.

    Parameters
    ----------
    state : callable
        Gives the SuperLink's state.
    """

    def __init__(self, state: Callable[[], Any]) -> None:
        # One writer at a time: SQLite lets others wait in naps, and the unlucky ones too long.
        self._state, self._writing = state, asyncio.Lock()

    async def frames(self, run: int, wanted: list[str], hospital: bool) -> AsyncIterator[bytes]:
        """Objects as frames, in the order in which they are wanted; hospitals' traffic counts."""
        while wanted:
            found = await run_in_threadpool(self._some, run, wanted, hospital)
            wanted = wanted[len(found) :]
            for identifier, content in found:
                for piece in object_frame(identifier, content):
                    yield piece

    def _some(self, run: int, wanted: Iterable[str], hospital: bool) -> list[tuple[str, bytes]]:
        """The first objects of a list, until they are large; what is not there yet is empty."""
        state, found, size = self._state(), list[tuple[str, bytes]](), 0
        with state.session():
            for identifier in wanted:
                content = state.get_object(run, identifier) or b""
                found.append((identifier, content))
                size += len(content)
                if size > _BATCH:
                    break
            if size and hospital:
                state.store_traffic(run, bytes_sent=size, bytes_recv=0)
        return found

    async def forget(self, message: str) -> None:
        """Let go of a message's parts."""
        async with self._writing:
            await run_in_threadpool(self._state().object_store.delete, message)

    async def keep(
        self,
        run: int,
        session: str,
        missing: set[str],
        frames: AsyncIterator[bytes],
        hospital: bool,
    ) -> bool:
        """Store the objects that are missing, as they come; whether all of them came."""
        batch, size, fine = list[tuple[str, bytes]](), 0, True
        async for content in frames:
            identifier, value = read_object(content)
            if identifier in missing:
                missing.discard(identifier)
                batch.append((identifier, value))
                size += len(value)
            if size > _BATCH:
                fine = fine and await self._store(run, session, batch, hospital)
                batch, size = [], 0
        return fine and await self._store(run, session, batch, hospital) and not missing

    async def _store(
        self, run: int, session: str, batch: list[tuple[str, bytes]], hospital: bool
    ) -> bool:
        async with self._writing:
            return await run_in_threadpool(self._stored, run, session, batch, hospital)

    def _stored(
        self, run: int, session: str, batch: list[tuple[str, bytes]], hospital: bool
    ) -> bool:
        """Store objects in one transaction: all, or none."""
        state = self._state()
        try:
            with state.session():
                for identifier, content in batch:
                    if not state.store_object(run, session, identifier, content):
                        raise _NotStored
                size = sum(len(content) for _, content in batch)
                if size and hospital:
                    state.store_traffic(run, bytes_sent=0, bytes_recv=size)
        except _NotStored:
            return False
        return True


class _NotStored(Exception):
    """An object was not taken."""
