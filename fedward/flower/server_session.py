"""Session of a run as its server application, over the SuperLink's Runtime API."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx
from flwr.common.constant import SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.runtime.tracing import RuntimeTracingInterceptor
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from fedward.errors import StudyError
from fedward.files import locked
from fedward.flower.control_client import ControlClient
from fedward.flower.grid import PackedGrid
from fedward.flower.runtime_client import RuntimeClient
from fedward.https import reason_of

_ACQUIRE: Final = "/flwr.proto.Runtime/AcquireTask"
_HEARTBEAT_SECONDS: Final = 15.0


class RunSession:
    """A run on the SuperLink and the grid over which its messages go.

    Parameters
    ----------
    link : Link
        The Control API.
    secret : bytes
        This machine's runtime secret.
    lock : Path
        What to guard so that one process at a time claims what it started; ``LOCK.lock`` is made.
    """

    def __init__(self, link: ControlClient, secret: bytes, lock: Path) -> None:
        self._link, self._stopped = link, threading.Event()
        with locked(lock):
            self.run_id, token = self._start(secret)
        self._http = HttpGrid(link.address, root_certificates=link.ca, token=token)
        known = [RuntimeTokenHttpInterceptor(token=token)]
        self._client = self._connect(known)
        # A SuperLink that is away for a moment does not end a round, as with Flower's own grid.
        self._courier = self._connect(known, make_simple_http_retry_invoker())
        self.grid = PackedGrid(self._http, self._courier)
        given = self._client.PullTaskInput(PullTaskInputRequest())
        run = run_from_proto(given.run)
        self._http.set_run(run)
        # Flower builds messages from the identity of the task that its process runs.
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, run.run_id
        TaskIdentity.node_id = self._http.node.node_id
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run-heartbeat")
        self._thread.start()

    def close(self, *, complete: bool) -> None:
        """End the run, as far as the SuperLink can be reached."""
        self._stopped.set()
        status = SubStatus.COMPLETED if complete else SubStatus.STOPPED
        with suppress(httpx.HTTPError):
            self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        with suppress(httpx.HTTPError):
            self._http.close()
        self._courier.close()
        self._client.close()

    def _start(self, secret: bytes) -> tuple[int, str]:
        run_id = self._link.start_run()
        auth = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({_ACQUIRE})
        )
        client = self._connect([auth])
        try:
            # What another process left behind when it was killed is older, and ended here.
            while token := self._acquire(client):
                if token[0] == run_id:
                    return token
                self._link.stop_run(token[0])
        finally:
            client.close()
        raise StudyError("a run that was started must be there to claim", fix="Start it again")

    def _acquire(self, client: RuntimeHttpClient) -> tuple[int, str] | None:
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        try:
            answer = client.AcquireTask(request)
        except httpx.HTTPError as error:
            raise StudyError(
                "the SuperLink must be reachable", value=reason_of(error), fix="See its log"
            ) from None
        return (int(answer.task.run_id), str(answer.token)) if answer.token else None

    def _connect(self, interceptors: list[Any], retry: RetryInvoker | None = None) -> RuntimeClient:
        return RuntimeClient.from_server_address(
            self._link.address,
            False,
            self._link.ca,
            [
                RuntimeTracingInterceptor(),
                RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                *interceptors,
            ],
            retry_invoker=retry,
        )

    def _beat(self) -> None:
        while not self._stopped.wait(_HEARTBEAT_SECONDS):
            with suppress(httpx.HTTPError):
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
