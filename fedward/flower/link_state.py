"""SuperLink state that delivers messages completely and repeats what was not confirmed.

Flower hands a message out once, and counts a reply as arrived before its parts are there. A
hospital whose link broke in between would lose its order, and a half-sent answer would hold up the
round beyond its deadline while the hospital believes that it has sent it. Here an order that was
not confirmed is handed out again, and an answer is seen when all of it has arrived, also where its
hospital has left meanwhile; until then a newer answer of the same hospital takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.date import now
from flwr.supercore.state.schema.corestate_models import (
    ObjectPushSession,
    ObjectPushSessionRoot,
)
from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes, Node
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from sqlalchemy import ColumnElement, select, update


class WholeMessages(SqlLinkState):
    """Flower's state on a database, with deliveries that survive a broken link."""

    def get_message_ins(
        self, node_id: int, limit: int | None, *, run_id: int | None = None
    ) -> list[Message]:
        """Orders for a node: new ones, and those that it did not confirm."""
        with self.session():
            if node_id != SUPERLINK_NODE_ID:
                self._take_back(node_id)
            return super().get_message_ins(node_id, limit, run_id=run_id)

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """A reply that is whole, and an error in place of each of those that will not come.

        One reply at a time: whoever asks has it in memory, and they may be large and many.
        """
        with self.session():
            there = message_ids - self._awaited(message_ids)
            asked = there - self._later(there)
            with self._still_there(asked):
                return super().get_message_res(asked, run_id)

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """Announce a message; a reply takes the place of one that was sent in part."""
        with self.session():
            if message.metadata.reply_to_message_id:
                self._forget_part(message)
            return super().store_message_and_object_tree(message, object_tree, session_id)

    def _take_back(self, node_id: int) -> None:
        """Make ready to go out again what went out, has no answer and was not confirmed.

        A node asks for the next order when it is done with the last; confirming it removes its
        parts from the store.
        """
        answered = select(MessageRes.reply_to_message_id)
        query = select(MessageIns.message_id).where(
            MessageIns.dst_node_id == uint64_to_int64(node_id),
            MessageIns.delivered_at != "",
            MessageIns.message_id.not_in(answered),
        )
        with self.session() as session:
            lost = [one for one in session.scalars(query) if str(one) in self.object_store]
            if lost:
                chosen = update(MessageIns).where(MessageIns.message_id.in_(lost))
                session.execute(chosen.values(delivered_at=""))

    def _awaited(self, asked: set[str]) -> set[str]:
        """Orders that may still be answered, and whose answer is not whole."""
        whole = select(MessageRes.reply_to_message_id).where(MessageRes.message_id.not_in(_parts()))
        query = select(MessageIns.message_id).where(
            MessageIns.message_id.in_(asked),
            MessageIns.created_at + MessageIns.ttl > now().timestamp(),
            MessageIns.message_id.not_in(whole),
        )
        with self.session() as session:
            return {str(one) for one in session.scalars(query)}

    def _later(self, asked: set[str]) -> set[str]:
        """Orders whose replies are there, but for the one that came first."""
        query = (
            select(MessageRes.reply_to_message_id)
            .where(MessageRes.reply_to_message_id.in_(asked), MessageRes.delivered_at == "")
            .order_by(MessageRes.created_at, MessageRes.message_id)
        )
        with self.session() as session:
            return {str(one) for one in list(session.scalars(query))[1:]}

    @contextmanager
    def _still_there(self, asked: set[str]) -> Iterator[None]:
        """Count those who have answered as online, within this transaction.

        Flower drops an answer, though it is there, when its hospital has left meanwhile.
        """
        query = (
            select(Node)
            .join(MessageIns, MessageIns.dst_node_id == Node.node_id)
            .join(MessageRes, MessageRes.reply_to_message_id == MessageIns.message_id)
            .where(MessageIns.message_id.in_(asked), MessageRes.delivered_at == "")
        )
        with self.session() as session:
            left = {node: node.online_until for node in session.scalars(query).unique()}
            for node in left:
                node.online_until = math.inf
            session.flush()
            yield
            for node, until in left.items():
                node.online_until = until

    def _forget_part(self, reply: Message) -> None:
        about = reply.metadata
        mine: list[ColumnElement[bool]] = [
            MessageRes.reply_to_message_id == about.reply_to_message_id,
            MessageRes.src_node_id == uint64_to_int64(about.src_node_id),
            MessageRes.message_id != about.message_id,
        ]
        query = (
            select(ObjectPushSessionRoot.session_id)
            .join(MessageRes, MessageRes.message_id == ObjectPushSessionRoot.root_object_id)
            .where(*mine, MessageRes.message_id.in_(_parts()))
        )
        with self.session() as session:
            for old in list(session.scalars(query)):
                self._cleanup_push_session(old, cleanup_messages=True)


def _parts() -> Any:
    """Messages of which something is missing."""
    return (
        select(ObjectPushSessionRoot.root_object_id)
        .join(ObjectPushSession, ObjectPushSession.session_id == ObjectPushSessionRoot.session_id)
        .where(ObjectPushSession.pending_count > 0)
    )


class Lifespan(SuperLinkLifespan):
    """Flower's start and stop, with this state in place of its own."""

    def __init__(self, config: Any, state_factory: LinkStateFactory) -> None:
        made = WholeMessages(
            state_factory.database,
            state_factory.federation_manager,
            state_factory.objectstore_factory.store(),
        )
        made.initialize()
        state_factory.state_instance = made
        super().__init__(config, state_factory)
