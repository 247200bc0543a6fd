"""The page about what is read of DICOM: it is what a run over the test files says."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from fedward.rule_codes import REASONS
from tools.docs import dicom

PAGE = Path(__file__).parents[3] / "docs" / "dicom.md"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise OSError("this test needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.integration
def test_the_page_is_what_a_run_says():
    written = PAGE.read_text("utf-8")
    if dicom.versions() not in written:
        pytest.skip("written with other versions of the packages")
    assert written == dicom.page(), "run make docs"


def test_the_page_has_every_kind_of_storage_and_only_known_reasons():
    text = PAGE.read_text("utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert set(re.findall(r"`([^`]+)` \d", text)) <= REASONS
    named = {row[0].strip("| ") for row in rows}
    for syntax in (
        "Deflated Explicit VR Little Endian",
        "Explicit VR Big Endian",
        "RLE Lossless",
        "JPEG Baseline (Process 1)",
        "JPEG-LS Lossless Image Compression",
        "JPEG 2000 Image Compression",
    ):
        assert syntax in named
    assert sum(int(row[-2]) for row in rows if len(row) == 3 and row[-2].isdigit()) > 200
