"""Client of the SuperLink's Control API: enrol hospitals and start runs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedward.errors import StudyError
from fedward.flower.batch_middleware import CONTROL_HEADER
from fedward.https import reason_of

# A run needs a bundle; this one holds no code, and nobody fetches it.
_BUNDLE: Final = {
    "pyproject.toml": b"""[project]
name = "fedward"
version = "1.0.0"
description = "A study; its plan travels as data."
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "fedward"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "fedward_server.app:app"
clientapp = "fedward_client.app:app"
""",
    "LICENSE": b"No code in here.\n",
}


@dataclass(frozen=True)
class Node:
    """An enrolled hospital as the SuperLink sees it.

    Attributes
    ----------
    node_id : int
        Its number.
    status : str
        ``online``, ``offline``, ``registered`` (never seen) or ``unregistered``.
    last_seen : str
        The last sign of life, ISO 8601, or "".
    public_key : bytes
        As :func:`stored_key` has it.
    """

    node_id: int
    status: Literal["online", "offline", "registered", "unregistered"]
    last_seen: str
    public_key: bytes = b""


class ControlClient:
    """The SuperLink's Control API.

    Parameters
    ----------
    address : str
        ``host:port``.
    ca : bytes
        PEM of the certificate authority.
    secret : bytes
        This machine's control secret.
    """

    def __init__(self, address: str, ca: bytes, secret: bytes) -> None:
        self.address, self.ca = address, ca
        self._client = ControlHttpClient.from_server_address(
            address,
            False,
            ca,
            [RuntimeVersionHttpInterceptor(component_name="flwr"), _Secret(secret)],
        )

    def register(self, public_key: bytes, name: str) -> int:
        """Enrol a hospital's key (PEM, NIST curve); gives its node id.

        Raises
        ------
        StudyError
            The SuperLink refuses the key, or cannot be reached.
        """
        request = RegisterNodeRequest(public_key=stored_key(public_key), name=name)
        return int(self._call("RegisterNode", request).node_id)

    def remove(self, node_id: int) -> None:
        """Cut a hospital off: its key is no longer known.

        Raises
        ------
        StudyError
            There is no such node, or the SuperLink cannot be reached.
        """
        self._call("UnregisterNode", UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> list[Node]:
        """All hospitals that were ever enrolled."""
        answer = self._call("ListNodes", ListNodesRequest())
        return [
            Node(one.node_id, one.status, _last_seen(one, answer.now), one.public_key)
            for one in answer.nodes_info
            if one.status
        ]

    def start_run(self) -> int:
        """Start a Flower run for a study; gives its id."""
        content, _ = build_fab_from_files(_BUNDLE)
        answer = self._call("StartRun", StartRunRequest(fab=Fab(content=content)))
        if not answer.run_id:
            raise StudyError("the SuperLink must start a run", fix="See its log")
        return int(answer.run_id)

    def stop_run(self, run_id: int) -> None:
        """End a run; messages of it that wait are dropped. A run that has ended stays so."""
        try:
            self._call("StopRun", StopRunRequest(run_id=run_id))
        except StudyError:
            return

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def _call(self, name: str, request: Any) -> Any:
        try:
            return getattr(self._client, name)(request)
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            raise StudyError(
                "the SuperLink must accept the call",
                value=f"{name}: {known.message if known else error.response.status_code}",
                fix="See the SuperLink's log",
            ) from None
        except httpx.HTTPError as error:
            raise StudyError(
                "the SuperLink must be reachable",
                value=reason_of(error),
                fix="Start the service; see its log",
            ) from None


class _Secret:
    """Shows the control secret with each call."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret.decode("ascii")

    def intercept(self, context: Any, call_next: Any) -> httpx.Response:
        context.request.headers[CONTROL_HEADER] = self._secret
        response: httpx.Response = call_next(context)
        return response


def _last_seen(node: Any, now: str) -> str:
    """Now, for one that is there; else when it went, or when its last sign of life ran out."""
    if node.status == "online":
        return now
    if node.last_deactivated_at or not node.online_until:
        return str(node.last_deactivated_at or node.last_activated_at)
    return datetime.fromtimestamp(node.online_until, UTC).isoformat()


def stored_key(pem: bytes) -> bytes:
    """A hospital's public key (PEM, NIST curve) as the SuperLink stores it.

    Raises
    ------
    StudyError
        It is no such key.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    try:
        key = load_pem_public_key(pem)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise StudyError(
            "a hospital's key must be a public key on a NIST curve, as PEM",
            fix="Use the file that `fedward-client enrol` made",
        )
    return public_key_to_bytes(key)
