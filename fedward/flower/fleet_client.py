"""Client of the SuperLink's Fleet API: a hospital's node, as the connector uses it.

Stock Flower ends its process when the link breaks and starts another per message; here the link is
an object that fails with an error, and is made again.
"""

from __future__ import annotations

import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
)
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedward.errors import FedwardError, ProtocolError
from fedward.flower.framing import (
    PARTS_HEADER,
    PARTS_TYPE,
    WAIT_HEADER,
    Frames,
    frame,
    object_frame,
    read_object,
)
from fedward.https import reason_of, restrict_responses, tls_context, why_untrusted

HEARTBEAT_SECONDS: Final = 10.0
_ACTIVATION_FAILED: Final = 2004
_RUN_OVER: Final = frozenset({2007, 2008, 18})
_UPLOAD_SECONDS: Final = 60.0
_MOST_OBJECTS: Final = 200_000
# Of an answer, beside the bytes of a message's part.
_ENVELOPE: Final = 1 << 20
_CLOCK_SECONDS: Final = 2.0


class LinkDown(FedwardError):
    """The aggregator cannot be reached now; later it may."""


class LinkRefused(FedwardError):
    """The aggregator does not know this site's key (any more), or this clock is wrong."""


class LeaseHeld(FedwardError):
    """The aggregator thinks that this site is connected already; that lapses."""


class RunOver(FedwardError):
    """The run that a message belongs to has ended."""


class Unreadable(ProtocolError):
    """A message came that cannot be read; ``envelope`` says which, so that it can be refused."""

    def __init__(self, error: ProtocolError, envelope: Message) -> None:
        super().__init__(error.rule, value=error.value, fix=error.fix, where=error.where)
        self.envelope = envelope


class _Client(FleetHttpClient):
    """Flower's client of the Fleet API, and a call that moves a message with all its parts."""

    @contextmanager
    def whole(
        self, path: str, method: str, request: Any, body: Iterator[bytes], headers: dict[str, str]
    ) -> Iterator[httpx.Response]:
        """Post a body; gives the answer while it comes in."""
        asked = self._client.build_request(
            "POST",
            f"{self._base_url}/v1/fleet/{path}",
            content=body,
            headers={
                "content-type": PROTOBUF_MEDIA_TYPE,
                "accept": PROTOBUF_MEDIA_TYPE,
                PARTS_HEADER: "1",
                **headers,
            },
        )
        context = ProtobufRequestContext(f"/flwr.proto.Fleet/{method}", request, asked)
        response = self._send(context, stream=True)
        # Flower lets streams be silent for ever.
        asked.extensions["timeout"]["read"] = self._client.timeout.read
        try:
            response.raise_for_status()
            yield response
        finally:
            response.close()


class FleetClient:
    """A node's connection.

    Parameters
    ----------
    address : str
        ``host:port``.
    ca : bytes
        PEM of the authority that the aggregator's certificate comes from.
    key : EllipticCurvePrivateKey
        The site's.
    most_bytes : int
        Of one message; more is not taken.
    """

    def __init__(
        self, address: str, ca: bytes, key: ec.EllipticCurvePrivateKey, most_bytes: int
    ) -> None:
        self._public, self._most = public_key_to_bytes(key.public_key()), most_bytes
        self._signing = _Signing(key)
        self._client = _Client(
            f"https://{address}",
            verify=tls_context(ca),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperNode"), self._signing],
        )
        restrict_responses(self._client._client, most_bytes + _ENVELOPE)
        self.certificate_ends: float | None = None
        self._client._client.event_hooks["response"].append(self._note_certificate)
        self.node = Node()

    def _note_certificate(self, response: httpx.Response) -> None:
        """Until when the aggregator's certificate is valid, seconds since the epoch."""
        stream = response.extensions.get("network_stream")
        tls = stream.get_extra_info("ssl_object") if stream else None
        given = tls.getpeercert() if tls else None
        if self.certificate_ends is None and given:
            self.certificate_ends = float(ssl.cert_time_to_seconds(str(given["notAfter"])))

    @property
    def clock_seconds(self) -> float:
        """How far the aggregator's clock is ahead of this one, as far as that had to be known."""
        return self._signing.ahead.total_seconds()

    def activate(self, known_as: int = 0) -> int:
        """Come online; gives the node's id.

        Parameters
        ----------
        known_as : int
            The id from an earlier connection. Whoever was killed is still online for the
            aggregator; with the id, a heartbeat takes the place over at once.

        Raises
        ------
        LinkDown, LinkRefused, LeaseHeld
            It cannot, now or at all.
        """
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_SECONDS)
        try:
            self.node = Node(node_id=int(self._call("ActivateNode", request).node_id))
        except LeaseHeld:
            if not known_as:
                raise
            self.node = Node(node_id=known_as)
            self.beat()
        return int(self.node.node_id)

    def beat(self) -> None:
        """Say that the site is there.

        Raises
        ------
        LinkDown, LinkRefused
            The aggregator does not hear it, or does not know it.
        """
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_SECONDS)
        if not self._call("SendNodeHeartbeat", request).success:
            raise LinkRefused("the aggregator must know this site", fix="Enrol the site again")

    def pull(self, seconds: float = 0.0) -> Message | None:
        """The next message for this site, or None; it comes again until it is confirmed.

        Parameters
        ----------
        seconds : float
            How long the aggregator may hold the question while it has none; at most
            :data:`fedward.flower.framing.LONGEST_WAIT`.

        Raises
        ------
        Unreadable
            It is too large or damaged, and comes again until it is confirmed.
        RunOver
            Its run ended meanwhile.
        LinkDown, LinkRefused
            The connection broke.
        """
        request = PullMessagesRequest(node=self.node)
        with (
            _translated(),
            self._client.whole(
                "pull-messages",
                "PullMessages",
                request,
                iter([request.SerializeToString()]),
                {WAIT_HEADER: f"{seconds:.3f}"},
            ) as response,
        ):
            parts = _frames_of(response)
            answer = PullMessagesResponse.FromString(next(parts))
            if not answer.messages_list:
                return None
            envelope, wanted = _announced(answer)
            try:
                return self._received(envelope, wanted, parts)
            except ProtocolError as error:
                raise Unreadable(error, envelope) from None

    def _received(self, envelope: Message, wanted: list[str], parts: Iterator[bytes]) -> Message:
        if len(wanted) > _MOST_OBJECTS:
            raise ProtocolError("a message has a bounded number of parts", value=len(wanted))
        contents, total = dict[str, bytes](), 0
        for identifier, content in map(read_object, parts):
            # A part that is still on its way to the aggregator comes empty.
            contents[identifier] = content or self._object(identifier, envelope.metadata.run_id)
            total += len(contents[identifier])
            if total > self._most:
                raise ProtocolError(
                    f"a message has at most {self._most} bytes", fix="Raise server.max_download_mib"
                )
        if not contents.keys() >= set(wanted):
            raise LinkDown("a message must come whole", fix="Nothing; it comes again")
        return _inflated(envelope.metadata.message_id, contents)

    def confirm(self, message: Message) -> None:
        """Say that a message is safe here, and need not come again.

        Raises
        ------
        LinkDown, LinkRefused
            The connection broke.
        """
        about = message.metadata
        request = ConfirmMessageReceivedRequest(
            node=self.node, run_id=about.run_id, message_object_id=about.message_id
        )
        with suppress(RunOver):
            self._call("ConfirmMessageReceived", request)

    def push(self, reply: Message) -> int:
        """Send a reply; gives the bytes that went.

        Raises
        ------
        RunOver
            Nobody waits for it any more.
        LinkDown, LinkRefused
            The connection broke; it may be sent again.
        """
        self._date(reply)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        sent = 0
        with no_object_id_recompute():
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )

            def body() -> Iterator[bytes]:
                nonlocal sent
                yield from frame(request.SerializeToString())
                for identifier, one in objects.items():
                    content = one.deflate()
                    sent += len(content)
                    yield from object_frame(identifier, content)

            with (
                _translated(),
                self._client.whole(
                    "push-messages", "PushMessages", request, body(), {}
                ) as response,
            ):
                response.read()
        return sent

    def close(self) -> None:
        """Sign off, as far as anybody listens."""
        try:
            self._call("DeactivateNode", DeactivateNodeRequest(node_id=self.node.node_id))
        except FedwardError:
            return
        finally:
            self._client.close()

    def drop(self) -> None:
        """Let go of the sockets without signing off."""
        self._client.close()

    def _date(self, reply: Message) -> None:
        """Date a reply by the aggregator's clock; by another one it may seem to be too late."""
        about = reply.metadata
        ends = about.created_at + about.ttl
        about.created_at = (now() + self._signing.ahead).timestamp()
        about.ttl = ends - about.created_at

    def _object(self, identifier: str, run: int) -> bytes:
        request = PullObjectRequest(node=self.node, run_id=run, object_id=identifier)
        end, pause = time.monotonic() + _UPLOAD_SECONDS, 0.005
        while time.monotonic() < end:
            answer = self._call("PullObject", request)
            if answer.object_available:
                return bytes(answer.object_content)
            if not answer.object_found:
                break
            # The message is announced before its parts have arrived at the aggregator.
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        raise RunOver("a message must be complete", fix="Wait for the next one")

    def _call(self, name: str, request: Any) -> Any:
        with _translated():
            return getattr(self._client, name)(request)


class _Signing:
    """Signs each call as Flower's node does, but by the aggregator's clock where this one is off.

    The signed time is what keeps a call from being sent again by others, and only the aggregator
    looks at it. So its clock is the one that counts.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key, self._public = key, b64encode(public_key_to_bytes(key.public_key())).decode()
        self.ahead = timedelta(0)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Sign and send; once more where the aggregator's answer shows that the clocks differ."""
        response = self._signed(context, call_next)
        if response.status_code == httpx.codes.UNAUTHORIZED and self._learn(response):
            response = self._signed(context, call_next)
        return response

    def _signed(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        time_ = (now() + self.ahead).isoformat()
        signature = b64encode(sign_message(self._key, time_.encode("ascii"))).decode("ascii")
        context.request.headers.update(
            {
                FLEET_HTTP_PUBLIC_KEY_HEADER: self._public,
                TIMESTAMP_HEADER: time_,
                FLEET_HTTP_SIGNATURE_HEADER: signature,
            }
        )
        return call_next(context)

    def _learn(self, response: httpx.Response) -> bool:
        """Whether the clocks differ more than was known."""
        try:
            ahead = parsedate_to_datetime(response.headers.get("date", "")) - now()
            known, self.ahead = self.ahead, ahead
            return abs((ahead - known).total_seconds()) > _CLOCK_SECONDS
        except (ValueError, TypeError, OverflowError):
            return False


def serialize_envelope(message: Message) -> bytes:
    """What a reply to a message needs, as bytes for a file."""
    return bytes(message_to_proto(remove_content_from_message(message)).SerializeToString())


def reply_to(sealed: bytes, content: RecordDict) -> Message:
    """A reply to a message that was sealed.

    Raises
    ------
    ProtocolError
        The bytes are no message.
    """
    try:
        envelope = message_from_proto(MessageProto.FromString(sealed))
    except Exception as error:
        raise ProtocolError("a kept message must be readable", value=type(error).__name__) from None
    return Message(content, reply_to=envelope)


def _announced(answer: Any) -> tuple[Message, list[str]]:
    """The message that waits, still without content, and the names of its parts."""
    try:
        envelope = message_from_proto(answer.messages_list[0])
        tree = answer.message_object_trees[0]
        return envelope, [part.object_id for part in iterate_object_tree(tree)]
    except Exception as error:  # an aggregator that is none sends anything
        raise LinkDown(
            "the aggregator must announce messages as Flower does",
            value=type(error).__name__,
            fix="Tell its operator",
        ) from None


def _frames_of(response: httpx.Response) -> Iterator[bytes]:
    """The frames of an answer, as they come in.

    Raises
    ------
    LinkDown
        It has none, or breaks off.
    """
    frames, found = Frames(), 0
    if response.headers.get("content-type") == PARTS_TYPE:
        for piece in response.iter_raw():
            for content in frames.feed(piece):
                found += 1
                yield content
    if not found or not frames.whole:
        raise LinkDown(
            "the aggregator must answer whole", fix="Run the same Fedward release on both ends"
        )


def _inflated(identifier: str, contents: dict[str, bytes]) -> Message:
    try:
        message = inflate_object_from_contents(identifier, contents)
    except Exception as error:  # bytes from outside break this parser in undocumented ways
        raise ProtocolError("a message must be readable", value=type(error).__name__) from None
    if not isinstance(message, Message):
        raise ProtocolError("a message must be a message", value=type(message).__name__)
    message.metadata.__dict__["_message_id"] = identifier
    return message


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise _meaning(error.response) from None
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        httpx.StreamError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        if why := why_untrusted(error):
            raise LinkDown(
                "the aggregator's certificate must be valid, for its name and by this clock",
                value=why[0],
                fix=why[1],
            ) from None
        raise LinkDown(
            "the aggregator must be reachable",
            value=reason_of(error),
            fix="Check network, proxy and certificate with `fedward-client doctor`",
        ) from None


def _meaning(response: httpx.Response) -> FedwardError:
    known = FlowerError.from_json(response.text)
    code = int(known.code) if known else 0
    if code == _ACTIVATION_FAILED:
        return LeaseHeld("a site connects once", fix="Wait until the old connection lapses")
    if response.status_code in (401, 403) and not code:
        return LinkRefused(
            "the aggregator must know this site's key, and both clocks must agree",
            value=response.status_code,
            fix="Send the public key to the coordinator, set the clock",
        )
    if code in _RUN_OVER:
        return RunOver("the run must go on", fix="Nothing; the reply is not needed")
    return LinkDown(
        "the aggregator must accept the call", value=code or response.status_code, fix="Wait"
    )
