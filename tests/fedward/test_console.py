"""How commands end where a package is missing, as it is in a container of another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from fedward.console import run_command


def test_a_missing_package_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedward-client", "--json"])

    def command(**_: object) -> None:
        __import__("a_package_of_another_image")

    with pytest.raises(SystemExit) as ended:
        run_command(command)
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert "a_package_of_another_image" in json.loads(told.out)["message"]
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    ("program", "module", "extra"),
    [
        ("fedward-client", "pydicom", "client"),
        ("fedward-client", "PIL.Image", "client"),
        ("fedward-client", "jinja2", "client"),
        ("fedward-server", "jinja2", "server"),
        ("fedward-server", "prometheus_client", "server"),
        ("fedward-simulate", "ray", "simulation"),
        ("fedward-simulate", "nibabel", "simulation"),
        ("fedward-simulate", "onnx", "export"),
    ],
)
def test_a_missing_package_of_an_extra_is_told_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    module: str,
    extra: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{program}"])

    def command(**_: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    with pytest.raises(SystemExit):
        run_command(command)
    assert f"`pip install 'fedward[{extra}]'`" in capsys.readouterr().err


def test_a_module_of_our_own_that_is_missing_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(**_: object) -> None:
        __import__("fedward_client.nowhere")

    with pytest.raises(ModuleNotFoundError):
        run_command(command)


WAITS = """
import threading, time
from fedward.console import stop_on_signals, wait_until

stop = threading.Event()
stop_on_signals(stop)
for _ in range(30):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("waits", flush=True)
wait_until(stop)
"""


def test_a_frozen_process_still_ends_on_the_signal_that_came_meanwhile() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waits\n"
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
