"""``make demo-clinic``: the whole of it with the journeys; always, that it skips with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import debian
import orthanc
import pytest
from journey import WHOLE

DEMO = Path(__file__).parent / "demo_clinic.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The program's names."""
    monkeypatch.setattr(sys, "path", [str(DEMO.parent), *sys.path])
    import demo_clinic

    return vars(demo_clinic)


def test_it_says_what_is_missing(
    demo: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(orthanc, "need", lambda *words: debian.need("no-such-program", *words[1:]))
    monkeypatch.setattr(debian.os, "geteuid", lambda: 1000)
    debian._install.cache_clear()
    monkeypatch.setattr(sys, "argv", ["demo_clinic", "--out", str(tmp_path / "out")])
    demo["main"]()  # type: ignore[operator]
    debian._install.cache_clear()
    said = capsys.readouterr().out
    assert "needs Orthanc and was skipped" in said and "orthanc-dicomweb" in said


@pytest.mark.integration
@pytest.mark.skipif(not WHOLE, reason="make journeys runs it")
def test_from_pacs_to_pacs(
    demo: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["demo_clinic", "--out", str(out), "--new", "2"])
    demo["main"]()  # type: ignore[operator]
    page = (out / "clinic.html").read_text("utf-8")
    assert page.count("<figure>") >= 2 and "Area" in page and "Not for diagnosis." in page
