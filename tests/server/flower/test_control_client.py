"""What the SuperLink says of its nodes, in the words of ``site list``."""

from __future__ import annotations

from types import SimpleNamespace

from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo

from fedward.flower.control_client import ControlClient

NOW = "2026-05-01T12:00:00+00:00"
CAME = "2026-05-01T08:00:00+00:00"
WENT = "2026-05-01T11:00:00+00:00"


def seen(**more: object) -> str:
    node = NodeInfo(node_id=1, last_activated_at=CAME, **more)  # type: ignore[arg-type]
    answer = ListNodesResponse(nodes_info=[node], now=NOW)
    link = ControlClient.__new__(ControlClient)
    link._client = SimpleNamespace(ListNodes=lambda request: answer)  # type: ignore[assignment]
    return link.nodes()[0].last_seen


def test_a_site_was_last_seen_when_it_went_and_not_when_it_came() -> None:
    assert seen(status="online") == NOW
    assert seen(status="offline", last_deactivated_at=WENT) == WENT
    assert seen(status="offline", online_until=1777633200.0) == WENT
    assert seen(status="offline") == CAME
