"""The four calls of Flower's APIs that move whole messages, and what each waits or rings for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from google.protobuf.message import Message


@dataclass(frozen=True)
class Pull:
    """A question for messages: how it is read, and what rings for it."""

    asked: type[Message]
    told: type[Message]
    waits_for: Callable[[Any], Iterable[Hashable]]
    hospital: bool


@dataclass(frozen=True)
class Push:
    """A delivery of messages: how it is read, and for whom it rings."""

    asked: type[Message]
    told: type[Message]
    rings: Callable[[Any], Iterable[Hashable]]
    hospital: bool


PULLS: Final = {
    "/v1/fleet/pull-messages": Pull(
        PullMessagesRequest, PullMessagesResponse, lambda asked: (asked.node.node_id,), True
    ),
    "/v1/runtime/pull-messages": Pull(
        PullAppMessagesRequest, PullAppMessagesResponse, lambda asked: asked.message_ids, False
    ),
}
PUSHES: Final = {
    "/v1/fleet/push-messages": Push(
        PushMessagesRequest,
        PushMessagesResponse,
        lambda asked: (m.metadata.reply_to_message_id for m in asked.messages_list),
        True,
    ),
    "/v1/runtime/push-messages": Push(
        PushAppMessagesRequest,
        PushAppMessagesResponse,
        lambda asked: (m.metadata.dst_node_id for m in asked.messages_list),
        False,
    ),
}
