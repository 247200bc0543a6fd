"""The local engine: Flower's apps over an in-process grid, sites side by side in warm workers."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from concurrent.futures import Future
from typing import Any

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from fedward.flower import identity
from fedward_client.app import client_app
from fedward_simulation.pool import Pool
from fedward_simulation.sites import SITE_STATE, SimulatedSites

Arrays = dict[str, NDArray[Any]]
_CLIENT_DIED = 1
_FIRST_NODE = 1001


class State:
    """What each worker holds: the sites, and the client application over them."""

    def __init__(self, sites: SimulatedSites) -> None:
        self.sites = sites
        self._app: ClientApp | None = None

    @property
    def app(self) -> ClientApp:
        """The client application; made in the worker, since applications are not picklable."""
        if self._app is None:
            identity.become_server()
            self._app = client_app(self.sites)
        return self._app


class LocalGrid(Grid):
    """A Flower grid whose nodes are workers of this machine.

    Parameters
    ----------
    pool : Pool
        Workers over a :class:`State`.
    nodes : int or sequence of int
        The partitions that take part, each with a node; a number: so many, from 0 on.
    states : mapping, optional
        What each partition's site keeps from round to round; brought up to date by its answers.
    """

    def __init__(
        self,
        pool: Pool,
        nodes: int | Sequence[int],
        states: MutableMapping[int, Arrays] | None = None,
    ) -> None:
        self._pool, self._states = pool, {} if states is None else states
        places = range(nodes) if isinstance(nodes, int) else nodes
        self._places = {_FIRST_NODE + place: place for place in places}
        self._waiting: dict[str, tuple[Message, Future[tuple[Message, Arrays]]]] = {}

    def set_run(self, run: Any) -> None:
        """One run only; nothing to set."""

    @property
    def run(self) -> Any:
        """Not known to the local engine."""
        raise RuntimeError("the local engine runs without a Flower run record")

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
        """All sites; they are always there."""
        return list(self._places)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand messages to the workers, in the order of the sites; ids in that of the messages."""
        given = list(messages)
        order = sorted(range(len(given)), key=lambda i: given[i].metadata.dst_node_id)
        pushed = {i: self._push(given[i]) for i in order}
        return [pushed[i] for i in range(len(given))]

    def _push(self, message: Message) -> str:
        identifier = identity.stamp(message)
        place = self._places[message.metadata.dst_node_id]
        future = self._pool.submit(place, _handle, message, place, self._states.get(place, {}))
        self._waiting[identifier] = (message, future)
        return identifier

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies of workers that are done; a worker that died gives an error reply."""
        done = [i for i in message_ids if i in self._waiting and self._waiting[i][1].done()]
        return [self._reply(identifier) for identifier in done]

    def _reply(self, identifier: str) -> Message:
        message, future = self._waiting.pop(identifier)
        if error := future.exception():
            return Message(Error(_CLIENT_DIED, type(error).__name__), reply_to=message)
        reply, kept = future.result()
        if kept:
            self._states[self._places[message.metadata.dst_node_id]] = kept
        return reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Not used by the studies, which pull for themselves; here for Flower's strategies."""
        from fedward.flower.study_grid import StudyGrid

        return StudyGrid.over(self).send_and_receive(messages, timeout=timeout)


def _handle(state: State, message: Message, place: int, kept: Arrays) -> tuple[Message, Arrays]:
    before = {SITE_STATE: ArrayRecord({n: Array(value) for n, value in kept.items()})}
    context = Context(
        run_id=identity.RUN_ID,
        node_id=message.metadata.dst_node_id,
        node_config={"partition-id": place, "num-partitions": len(state.sites.sites)},
        state=RecordDict(before if kept else {}),  # type: ignore[arg-type]
        run_config={},
    )
    reply = state.app(message, context)
    after = context.state.array_records.get(SITE_STATE) or ArrayRecord()
    return reply, {name: array.numpy() for name, array in after.items()}


def run_local(
    app: ServerApp,
    pool: Pool,
    nodes: int | Sequence[int],
    states: MutableMapping[int, Arrays] | None = None,
) -> None:
    """Run a server application in this thread over the workers (see :class:`LocalGrid`)."""
    identity.become_server()
    context = Context(identity.RUN_ID, identity.SERVER_NODE, {}, RecordDict(), {})
    app(LocalGrid(pool, nodes, states), context)
