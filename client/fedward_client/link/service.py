"""The trainer's end of the socket: one connector at a time, nothing but orders."""

from __future__ import annotations

import json
import os
import secrets
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

import grpc

from fedward.errors import ConfigError, ProtocolError
from fedward_client.link import trainer_pb2 as pb
from fedward_client.link import trainer_pb2_grpc as rpc
from fedward_client.link.messages import TrainerMessage, from_parts, to_parts
from fedward_client.link.state import LinkState, parse_state

_PULSE_SECONDS: Final = 2.0
_OPTIONS: Final = (("grpc.max_receive_message_length", 4 << 20), ("grpc.so_reuseport", 0))


class RequestHandler(Protocol):
    """Who answers the orders."""

    def answer(self, what: str, packet: TrainerMessage) -> TrainerMessage:
        """Answer an order; a refusal is an answer too."""

    def garbage(self, error: ProtocolError) -> TrainerMessage:
        """What came was no order; note it, and give the refusal."""

    def attached(self, isolation: str) -> None:
        """A connector came and told what it found of the images."""

    def detached(self) -> None:
        """It left."""

    def cancel(self, study: str) -> int:
        """Give up a study's orders; how many."""

    def told(self, link: LinkState) -> None:
        """The connector told how its link is."""

    def status(self) -> dict[str, Any]:
        """What the connector may know."""

    def wait_for_news(self, seconds: float) -> bool:
        """Whether something changed within the time."""


class Service(rpc.TrainerServicer):
    """Serves one desk.

    Parameters
    ----------
    desk : Desk
        Who answers.
    most_bytes : int
        Of tensors in one order.
    """

    def __init__(self, desk: RequestHandler, most_bytes: int) -> None:
        self._desk, self._most = desk, most_bytes
        self._lease, self._lock = "", threading.Lock()
        self._ended = threading.Event()

    def end(self) -> None:
        """Let go of whoever is attached."""
        self._ended.set()

    def Attach(
        self, request: pb.AttachRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.Pulse]:
        """One connector at a time holds this open."""
        lease = secrets.token_hex(16)
        with self._lock:
            taken, self._lease = bool(self._lease), self._lease or lease
        if taken:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "another connector is attached")
        try:
            self._desk.attached(request.isolation)
            while context.is_active() and not self._ended.is_set():
                yield pb.Pulse(lease=lease)
                self._ended.wait(_PULSE_SECONDS)
        finally:
            with self._lock:
                # Before the next one may attach: what it tells must not be undone.
                self._desk.detached()
                self._lease = ""

    def Describe(self, parts: Iterator[pb.Part], context: Any) -> Iterator[pb.Part]:
        """What the site says of itself for a plan."""
        return self._answer("describe", parts, context)

    def Train(self, parts: Iterator[pb.Part], context: Any) -> Iterator[pb.Part]:
        """Train one round."""
        return self._answer("train", parts, context)

    def Evaluate(self, parts: Iterator[pb.Part], context: Any) -> Iterator[pb.Part]:
        """Measure a model."""
        return self._answer("evaluate", parts, context)

    def Progress(
        self, request: pb.ProgressRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.Report]:
        """What the trainer does, whenever that changes."""
        self._check(request.lease, context)
        while context.is_active() and not self._ended.is_set():
            yield self._report()
            self._desk.wait_for_news(_PULSE_SECONDS)

    def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelReply:
        """Give up a study's orders."""
        self._check(request.lease, context)
        return pb.CancelReply(cancelled=self._desk.cancel(request.study))

    def Status(self, request: pb.StatusRequest, context: Any) -> pb.Report:
        """What the connector may know."""
        self._check(request.lease, context)
        return self._report()

    def Tell(self, request: pb.TellRequest, context: Any) -> pb.TellReply:
        """How the connector's link is."""
        self._check(request.lease, context)
        try:
            self._desk.told(parse_state(request.link))
        except ProtocolError as error:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, error.rule)
        return pb.TellReply()

    def _report(self) -> pb.Report:
        return pb.Report(content=json.dumps(self._desk.status(), allow_nan=False))

    def _answer(
        self, what: str, parts: Iterator[pb.Part], context: grpc.ServicerContext
    ) -> Iterator[pb.Part]:
        try:
            packet = from_parts(parts, self._most)
        except ProtocolError as error:
            return to_parts(self._desk.garbage(error))
        self._check(packet.lease, context)
        return to_parts(self._desk.answer(what, packet))

    def _check(self, lease: str, context: grpc.ServicerContext) -> None:
        with self._lock:
            known = bool(lease) and secrets.compare_digest(lease, self._lease)
        if not known:
            _abort(context, grpc.StatusCode.PERMISSION_DENIED, "only the attached connector asks")


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError


def serve(
    desk: RequestHandler, path: Path, most_bytes: int, group: int | None = None
) -> Callable[[float], None]:
    """Serve a desk on a Unix socket.

    Parameters
    ----------
    desk : Desk
        Who answers.
    path : Path
        The socket; its folder is made for the owner (and the group) alone.
    most_bytes : int
        Of tensors in one order.
    group : int or None
        Group that may connect, where the connector runs as another user.

    Returns
    -------
    callable
        Ends the service; takes the seconds that calls may still take.

    Raises
    ------
    ConfigError
        The socket cannot be made, or somebody serves there already.
    """
    _clear(path, group)
    service = Service(desk, most_bytes)
    server = grpc.server(ThreadPoolExecutor(16, "socket"), options=_OPTIONS)
    rpc.add_TrainerServicer_to_server(service, server)
    before = os.umask(0o117 if group is not None else 0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError:
        raise ConfigError(
            "the trainer's socket must be free and its path short enough",
            fix="End the other trainer, or name another socket",
            where="trainer.socket",
        ) from None
    finally:
        os.umask(before)
    if group is not None and path.stat().st_gid != group:
        os.chown(path, -1, group)
    server.start()

    def end(seconds: float) -> None:
        service.end()
        server.stop(seconds).wait(seconds + 1)
        path.unlink(missing_ok=True)

    return end


def _clear(path: Path, group: int | None) -> None:
    """Make the folder; take a dead socket away, never a living one or a file."""
    try:
        path.parent.mkdir(mode=0o750 if group is not None else 0o700, parents=True, exist_ok=True)
        if group is not None:
            _let_in(path.parent, group)
        if path.exists() or path.is_symlink():
            _remove_dead(path)
    except OSError as error:
        raise ConfigError(
            "the trainer's socket must be writable",
            value=os.strerror(error.errno or 0),
            fix="Give its folder to the user that runs this",
            where="trainer.socket",
        ) from None


def _let_in(folder: Path, group: int) -> None:
    """The group may look into the folder; one that is so already may belong to another user."""
    now = folder.stat()
    if now.st_gid != group:
        os.chown(folder, -1, group)
    if now.st_mode & 0o050 != 0o050:
        folder.chmod(stat.S_IMODE(now.st_mode) | 0o050)


def _remove_dead(path: Path) -> None:
    alive = False
    if stat.S_ISSOCK(path.lstat().st_mode):
        with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError):
            probe.connect(str(path))
            alive = True
    else:
        alive = True
    if alive:
        raise ConfigError(
            "the trainer's socket must not be in use",
            fix="End the other trainer first",
            where="trainer.socket",
        )
    path.unlink()
