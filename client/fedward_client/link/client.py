"""The connector's end of the socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc

from fedward.errors import FedwardError
from fedward.rule_codes import RuleCode
from fedward_client.link import trainer_pb2, trainer_pb2_grpc
from fedward_client.link.messages import TrainerMessage, from_parts, to_parts
from fedward_client.link.state import LinkState

_PATIENCE: Final = 10.0
_OPTIONS: Final = (("grpc.max_receive_message_length", 4 << 20),)


class TrainerGone(FedwardError):
    """The trainer does not answer on its socket; it may come back."""


class TrainerTaken(FedwardError):
    """Another connector is attached."""


class TrainerClient:
    """An attached connector's way to the trainer.

    Parameters
    ----------
    path : Path
        The socket.
    version : str
        The connector's release.
    isolation : str
        What the connector found when it tried to read the datasets.

    Raises
    ------
    TrainerGone
        Nobody answers.
    TrainerTaken
        Another connector is attached.
    """

    def __init__(self, path: Path, version: str, isolation: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{path}", options=_OPTIONS)
        self._stub = trainer_pb2_grpc.TrainerStub(self._channel)
        self.gone = threading.Event()
        request = trainer_pb2.AttachRequest(version=version, isolation=isolation)
        self._pulses = self._stub.Attach(request)
        try:
            with _translated():
                self._lease = next(self._pulses).lease
        except FedwardError:
            self._channel.close()
            raise
        threading.Thread(target=self._follow, daemon=True, name="trainer-pulse").start()

    def ask(self, what: str, packet: TrainerMessage) -> TrainerMessage:
        """Send an order and wait for its answer, however long that takes.

        Raises
        ------
        TrainerGone
            The trainer ended before it answered.
        """
        call = {
            "describe": self._stub.Describe,
            "train": self._stub.Train,
            "evaluate": self._stub.Evaluate,
        }[what]
        sent = TrainerMessage(packet.kind, packet.record, packet.arrays, self._lease)
        with _translated():
            return from_parts(call(to_parts(sent)), unpacked=False)

    def status(self) -> dict[str, Any]:
        """What the trainer does.

        Raises
        ------
        TrainerGone
            It does not answer.
        """
        with _translated():
            report = self._stub.Status(
                trainer_pb2.StatusRequest(lease=self._lease), timeout=_PATIENCE
            )
        return dict(json.loads(report.content))

    def progress(self) -> Iterator[dict[str, Any]]:
        """What the trainer does, whenever that changes, until it ends."""
        with _translated():
            for report in self._stub.Progress(trainer_pb2.ProgressRequest(lease=self._lease)):
                yield dict(json.loads(report.content))

    def tell(self, link: LinkState) -> None:
        """Say how the link to the aggregator is.

        Raises
        ------
        TrainerGone
            It does not answer.
        """
        request = trainer_pb2.TellRequest(lease=self._lease, link=link.model_dump_json())
        with _translated():
            self._stub.Tell(request, timeout=_PATIENCE)

    def cancel(self, study: str) -> int:
        """Give up a study's orders; how many there were."""
        request = trainer_pb2.CancelRequest(lease=self._lease, study=study)
        with _translated():
            return int(self._stub.Cancel(request, timeout=_PATIENCE).cancelled)

    def close(self) -> None:
        """Detach."""
        self._pulses.cancel()
        self._channel.close()

    def _follow(self) -> None:
        with suppress(grpc.RpcError, ValueError):
            for _ in self._pulses:
                continue
        self.gone.set()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except StopIteration:
        raise TrainerGone(
            "the trainer must run", fix="Start it; see its log", code=RuleCode.TRAINER_GONE
        ) from None
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else None
        if code == grpc.StatusCode.ALREADY_EXISTS:
            raise TrainerTaken(
                "a trainer serves one connector", fix="End the other connector"
            ) from None
        raise TrainerGone(
            "the trainer must answer on its socket",
            value=code.name if code else None,
            fix="Start it; see its log",
            code=RuleCode.TRAINER_GONE,
        ) from None
