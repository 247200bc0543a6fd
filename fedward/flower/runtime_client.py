"""Client of the SuperLink's Runtime API that sends messages and fetches replies whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Final, cast

import httpx
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime import RuntimeHttpClient
from google.protobuf.message import Message as Proto

from fedward.errors import ProtocolError, StudyError
from fedward.flower.framing import (
    PARTS_HEADER,
    PARTS_TYPE,
    WAIT_HEADER,
    Frames,
    frame,
    object_frame,
    read_object,
)

_PUSH: Final = ("/v1/runtime/push-messages", "/flwr.proto.Runtime/PushMessages")
_PULL: Final = ("/v1/runtime/pull-messages", "/flwr.proto.Runtime/PullMessages")


class RuntimeClient(RuntimeHttpClient):
    """A client of the Runtime API that moves messages with all their parts."""

    def deliver(self, messages: Sequence[Message]) -> list[str]:
        """Send messages, each part that they share once.

        Returns
        -------
        list of str
            The messages' ids; empty for one that was not taken.

        Raises
        ------
        StudyError
            Their parts were not taken.
        """
        with no_object_id_recompute():
            objects: dict[str, InflatableObject] = {}
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                objects |= get_all_nested_objects(message)
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(m)) for m in messages],
                message_object_trees=[get_object_tree(message) for message in messages],
            )

            def body() -> Iterator[bytes]:
                yield from frame(request.SerializeToString())
                for identifier, one in objects.items():
                    yield from object_frame(identifier, one.deflate())

            try:
                (content,) = self._whole(_PUSH, request, body, {}, lambda answer: [answer.read()])
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.CONFLICT:
                    raise
                raise StudyError(
                    "the SuperLink must take a message's parts", fix="Make room on its disk"
                ) from None
        return list(PushAppMessagesResponse.FromString(content).message_ids)

    def collect(self, identifiers: Iterable[str], seconds: float) -> list[Message]:
        """Replies to messages that are there, waited for as long as there is none."""
        request = PullAppMessagesRequest(message_ids=identifiers)

        def body() -> Iterator[bytes]:
            yield request.SerializeToString()

        first, *parts = self._whole(
            _PULL, request, body, {WAIT_HEADER: f"{seconds:.3f}"}, _frames_of
        )
        told = PullAppMessagesResponse.FromString(first)
        contents = dict(map(read_object, parts))
        return [
            _inflated(about, tree, contents)
            for about, tree in zip(told.messages_list, told.message_object_trees, strict=True)
        ]

    def _whole(
        self,
        where: tuple[str, str],
        request: Proto,
        body: Callable[[], Iterator[bytes]],
        headers: dict[str, str],
        read: Callable[[httpx.Response], list[bytes]],
    ) -> list[bytes]:
        path, method = where

        def send() -> list[bytes]:
            asked = self._client.build_request(
                "POST",
                f"{self._base_url}{path}",
                content=body(),
                headers={
                    "content-type": PROTOBUF_MEDIA_TYPE,
                    "accept": PROTOBUF_MEDIA_TYPE,
                    PARTS_HEADER: "1",
                    **headers,
                },
            )
            context = ProtobufRequestContext(rpc_method=method, message=request, request=asked)
            response = self._send(context, stream=True)
            # Flower lets streams be silent for ever.
            asked.extensions["timeout"]["read"] = self._client.timeout.read
            try:
                response.raise_for_status()
                return read(response)
            finally:
                response.close()

        return self._retry_invoker.invoke(send) if self._retry_invoker else send()


def _frames_of(response: httpx.Response) -> list[bytes]:
    if response.headers.get("content-type") != PARTS_TYPE:
        raise httpx.RemoteProtocolError("an answer without parts")
    frames = Frames()
    found = list(chain.from_iterable(map(frames.feed, response.iter_raw())))
    if not frames.whole or not found:
        raise httpx.RemoteProtocolError("an answer that is not whole")
    return found


def _inflated(about: Any, tree: ObjectTree, contents: dict[str, bytes]) -> Message:
    """A reply; one that is damaged is an error in its place, and costs its site the round."""
    identifier = about.metadata.message_id
    own = {one.object_id: contents.get(one.object_id, b"") for one in iterate_object_tree(tree)}
    try:
        if not all(own.values()):
            raise ProtocolError("a reply must be complete")
        message = cast(Message, inflate_object_from_contents(identifier, own))
        message.metadata.__dict__["_message_id"] = identifier
        return message
    except Exception as error:  # bytes from outside break this parser in undocumented ways
        return _error(about.metadata, type(error).__name__)


def _error(about: Any, reason: str) -> Message:
    metadata = Metadata(
        run_id=about.run_id,
        message_id="",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        message_type=SYSTEM_MESSAGE_TYPE,
        group_id="",
        ttl=0,
        reply_to_message_id=about.reply_to_message_id,
        created_at=now().timestamp(),
    )
    return make_message(metadata=metadata, error=Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason))
