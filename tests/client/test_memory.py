"""Freed memory that stays for what comes next."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE_FAULTS = """
import resource, sys
exec(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    images = [bytearray(b"x") * (12 << 20) for _ in range(4)]
    del images
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
TUNED = "from fedward_client.worker_pool import tune_malloc; tune_malloc(64 << 20)"
TRAINER = "from fedward_client.training.runtime import Runtime; Runtime().enter()"


def faults(before: str) -> int:
    command = [sys.executable, "-c", PAGE_FAULTS, before]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_asked_for_once_also_by_a_trainer() -> None:
    pages = (48 << 20) // resource.getpagesize()
    assert faults("") > 10 * pages
    assert faults(TUNED) < 2 * pages
    assert faults(TRAINER) < 2 * pages
