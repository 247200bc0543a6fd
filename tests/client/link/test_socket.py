"""The socket between connector and trainer: whole packets, one connector, nothing else."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedward.errors import ConfigError, ProtocolError
from fedward_client.link import trainer_pb2 as pb
from fedward_client.link import trainer_pb2_grpc as rpc
from fedward_client.link.client import TrainerClient, TrainerGone, TrainerTaken
from fedward_client.link.messages import CHUNK, TrainerMessage, from_parts, to_parts
from fedward_client.link.service import serve
from fedward_client.link.state import LinkState


class EchoDesk:
    """Gives back what came."""

    def __init__(self) -> None:
        self.isolation: list[str] = []
        self.bad: list[str] = []
        self.left = threading.Event()

    def answer(self, what: str, packet: TrainerMessage) -> TrainerMessage:
        arrays = {name: value + 1 for name, value in packet.arrays.items()}
        return TrainerMessage("facts", {"what": what, **packet.record}, arrays)

    def garbage(self, error: ProtocolError) -> TrainerMessage:
        self.bad.append(error.rule)
        return TrainerMessage("refusal", {"rule": error.rule})

    def attached(self, isolation: str) -> None:
        self.isolation.append(isolation)

    def detached(self) -> None:
        self.left.set()

    def cancel(self, study: str) -> int:
        return len(study)

    def told(self, link: LinkState) -> None:
        self.link = link

    def status(self) -> dict[str, Any]:
        return {"state": "idle"}

    def wait_for_news(self, seconds: float) -> bool:
        return threading.Event().wait(min(seconds, 0.05))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[EchoDesk, Path]]:
    desk, path = EchoDesk(), tmp_path / "run" / "trainer.sock"
    end = serve(desk, path, most_bytes=64 << 20)
    yield desk, path
    end(1.0)
    assert not path.exists()


def test_large_tensors_cross_whole(served: tuple[EchoDesk, Path]) -> None:
    desk, path = served
    caller = TrainerClient(path, "1", "hidden")
    rng = np.random.default_rng(1)
    arrays = {
        "w": rng.normal(size=(1500, 1700)).astype(np.float32),
        "n": np.array(3),
        "empty": np.zeros((0, 4), np.float64),
        "turned": np.arange(12).reshape(3, 4).T,
    }
    got = caller.ask("train", TrainerMessage("order", {"round": 7}, arrays))
    assert got.record == {"what": "train", "round": 7}
    assert list(got.arrays) == list(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(got.arrays[name], value + 1)
        assert got.arrays[name].shape == value.shape
    assert caller.status() == {"state": "idle"}
    assert next(caller.progress()) == {"state": "idle"}
    assert caller.cancel("abc") == 3
    assert desk.isolation == ["hidden"]
    caller.close()


def test_one_connector_at_a_time(served: tuple[EchoDesk, Path]) -> None:
    desk, path = served
    first = TrainerClient(path, "1", "hidden")
    with pytest.raises(TrainerTaken):
        TrainerClient(path, "1", "hidden")
    channel = grpc.insecure_channel(f"unix:{path}")
    stub = rpc.TrainerStub(channel)
    for lease in ("", "0" * 32):
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Train(to_parts(TrainerMessage("order", {}, lease=lease))))
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError):
            stub.Status(pb.StatusRequest(lease=lease))
    channel.close()
    first.close()
    assert desk.left.wait(10)
    second = TrainerClient(path, "1", "hidden")
    assert second.ask("describe", TrainerMessage("order", {})).record["what"] == "describe"
    second.close()


def test_the_socket_is_for_its_owner(served: tuple[EchoDesk, Path]) -> None:
    _, path = served
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_living_socket_is_left_alone_and_a_dead_one_taken(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    end = serve(EchoDesk(), path, 1 << 20)
    with pytest.raises(ConfigError, match="in use"):
        serve(EchoDesk(), path, 1 << 20)
    end(1.0)
    child = os.fork()
    if not child:  # leaves a socket that nobody serves
        import socket

        socket.socket(socket.AF_UNIX).bind(str(path))
        os._exit(0)
    os.waitpid(child, 0)
    assert path.exists()
    serve(EchoDesk(), path, 1 << 20)(1.0)
    path.write_text("a file")
    with pytest.raises(ConfigError):
        serve(EchoDesk(), path, 1 << 20)
    assert path.read_text() == "a file"


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(TrainerGone):
        TrainerClient(tmp_path / "nothing.sock", "1", "hidden")


def test_a_trainer_that_ends_is_noticed(tmp_path: Path) -> None:
    end = serve(EchoDesk(), tmp_path / "t.sock", 1 << 20)
    caller = TrainerClient(tmp_path / "t.sock", "1", "hidden")
    end(0.2)
    assert caller.gone.wait(10)
    with pytest.raises(TrainerGone):
        caller.ask("train", TrainerMessage("order", {}))
    caller.close()


def _parts(change: Callable[[list[pb.Part]], Any]) -> Iterator[pb.Part]:
    made = list(to_parts(TrainerMessage("order", {"a": 1}, {"w": np.ones(CHUNK // 2)})))
    change(made)
    return iter(made)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts.clear(),
        lambda parts: parts.pop(0),
        lambda parts: parts.pop(),
        lambda parts: parts.reverse(),
        lambda parts: parts.append(pb.Part(chunk=b"more")),
        lambda parts: parts.insert(1, parts[0]),
        lambda parts: setattr(parts[1], "chunk", b"x" * CHUNK),
        lambda parts: setattr(parts[0].head, "record", "[1]"),
        lambda parts: setattr(parts[0].head, "record", "{" * 100_000),
        lambda parts: setattr(parts[0].head, "tensor_bytes", 1 << 40),
    ],
)
def test_a_damaged_packet_is_refused(change: Callable[[list[pb.Part]], Any]) -> None:
    with pytest.raises(ProtocolError):
        from_parts(_parts(change))


def test_bytes_that_are_no_tensors_are_refused() -> None:
    import hashlib

    junk = b"\x80\x04not tensors"
    head = pb.Head(kind="order", record="{}", tensor_bytes=len(junk))
    head.tensor_sha256 = hashlib.sha256(junk).digest()
    with pytest.raises(ProtocolError, match="safetensors"):
        from_parts([pb.Part(head=head), pb.Part(chunk=junk)])


def test_garbage_gets_a_refusal_and_the_service_goes_on(served: tuple[EchoDesk, Path]) -> None:
    desk, path = served
    caller = TrainerClient(path, "1", "hidden")
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub = rpc.TrainerStub(channel)
        answer = from_parts(stub.Train(iter([pb.Part(chunk=b"abc")])))
    assert answer.kind == "refusal"
    assert desk.bad
    assert caller.ask("describe", TrainerMessage("order", {})).kind == "facts"
    caller.close()


def test_the_connector_tells_how_its_link_is_and_nothing_else(
    served: tuple[EchoDesk, Path],
) -> None:
    desk, path = served
    caller = TrainerClient(path, "1", "hidden")
    caller.tell(LinkState(state="online", messages=3))
    assert (desk.link.state, desk.link.messages) == ("online", 3)
    channel = grpc.insecure_channel(f"unix:{path}")
    stub = rpc.TrainerStub(channel)
    lease = caller._lease
    for bad in (
        '{"state": "online", "more": 1}',
        '{"state": 7}',
        "[" * 9000,
        "nonsense",
        '{"state": "' + "x" * 600 + '"}',
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Tell(pb.TellRequest(lease=lease, link=bad), timeout=5)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError):
        stub.Tell(pb.TellRequest(lease="other", link='{"state": "online"}'), timeout=5)
    assert desk.link.state == "online"
    channel.close()
    caller.close()
