"""The service's process: there at once, alone on its state folder, and ended when it is deaf."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedward.errors import ConfigError, OutputError, ServiceError
from fedward.files import alone
from fedward_server.config import ServerConfig, load_config
from fedward_server.listen import ApiThread
from fedward_server.service import serve
from fedward_server.setup import SetupResult

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture
def made(made: SetupResult) -> SetupResult:
    """An aggregator on ports of its own."""
    text = made.config.read_text()
    for old, port in zip((9443, 9444, 9445), free_ports(), strict=True):
        text = text.replace(str(old), str(port))
    made.config.write_text(text)
    return made


def write(made: SetupResult, old: str, new: str) -> None:
    text = made.config.read_text()
    assert old in text
    made.config.write_text(text.replace(old, new))


@contextlib.contextmanager
def running(made: SetupResult) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "fedward_server.service", "--config", str(made.config)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_port(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.05)
    raise AssertionError("nobody listens")


def test_the_operators_api_loads_no_torch() -> None:
    code = (
        "import sys, fedward_server.service; print('torch' in sys.modules, 'monai' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_state_folder_is_held_by_one(tmp_path: Path) -> None:
    with alone(tmp_path, "service"):
        second = alone(tmp_path, "service", patience=0.3)
        with pytest.raises(ServiceError, match="one aggregator at a time"), second:
            pass
        with alone(tmp_path, "run"):
            pass
    with alone(tmp_path, "service"):
        pass
    nowhere = alone(tmp_path / "none", "run")
    with pytest.raises(OutputError, match="state folder must be writable"), nowhere:
        pass


def test_who_ends_soon_is_waited_for(tmp_path: Path) -> None:
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with alone(tmp_path, "service"):
            held.set()
            go.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    threading.Timer(0.3, go.set).start()
    with alone(tmp_path, "service", patience=10):
        pass
    thread.join()


def test_a_second_service_on_the_same_folder_serves_nothing(
    made: SetupResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedward_server.service._PATIENCE", 0.2)
    config = load_config(made.config)
    with running(made):
        wait_for_port(config.api.port)
        # Other ports, as in a copy of the configuration: the folder is what counts.
        for old, port in zip(
            (config.sites.port, config.api.port, config.api.health_port), free_ports(), strict=True
        ):
            write(made, str(old), str(port))
        with pytest.raises(ServiceError, match="one aggregator at a time"):
            serve(made.config, threading.Event())
        command = [sys.executable, "-m", "fedward_server.cli", "run", "--config", str(made.config)]
        with alone(config.server.state, "run"):
            done = subprocess.run(
                command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
            )
        assert done.returncode == 25
        assert "one aggregator at a time" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("which", ["port", "health_port"])
def test_a_taken_port_ends_the_service_with_its_key(
    made: SetupResult, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedward_server.service.log_to_stderr", lambda level: None)
    port = getattr(load_config(made.config).api, which)
    with socket.socket() as taken:
        # As gRPC opens its ports, so that others may share them.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ServiceError, match=f"api.{which}: a port"):
            serve(made.config, threading.Event())
    assert "api" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("name", ["tls/server.crt", "tls/ca.crt", "keys/control.secret"])
def test_the_service_tells_what_it_lacks_in_one_line(made: SetupResult, name: str) -> None:
    path = made.config.parent / name
    path.unlink()
    if path.suffix == ".crt":
        path.write_text("no certificate")
    with running(made) as process:
        _, told = process.communicate(timeout=60)
    assert process.returncode == ConfigError.exit_code
    assert "Restore them" in told and "Traceback" not in told


def test_a_deaf_service_ends(config: ServerConfig) -> None:
    port = free_ports()[0]
    config = config.model_copy(update={"api": config.api.model_copy(update={"port": port})})
    stop = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    api = ApiThread(config, app, stop)
    wait_for_port(port)
    assert not stop.is_set()
    api._server.should_exit = True
    assert stop.wait(10)
    with pytest.raises(ServiceError, match="operator API must go on"):
        api.end()


def test_the_log_says_as_much_as_the_configuration_wants(
    made: SetupResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(made, 'log_level = "info"', 'log_level = "error"')
    stop = threading.Event()
    stop.set()
    logger = logging.getLogger("fedward")
    kept = (logger.handlers, logger.propagate, logger.level)
    try:
        serve(made.config, stop)
        assert logger.level == logging.ERROR
    finally:
        logger.handlers, logger.propagate = kept[0], kept[1]
        logger.setLevel(kept[2])
