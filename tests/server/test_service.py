"""The service's process is there at once: it builds no network, and loads nothing that does."""

from __future__ import annotations

import subprocess
import sys


def test_the_operators_api_loads_no_torch() -> None:
    code = "import sys, server.service; print('torch' in sys.modules, 'monai' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["False", "False"]
