"""Colours: one set for light, one for dark, both readable."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from fedward_server.report.charts import COLOURS, looks
from fedward_server.report.page import render
from fedward_server.results import StudyResults

CSS = (
    resources.files("fedward_server.report").joinpath("templates", "report.css").read_text("utf-8")
)


def _themes() -> dict[str, dict[str, str]]:
    light, dark, paper = (
        dict(re.findall(r"(--[a-z0-9-]+):\s*(#[0-9a-f]{3,6})\b", block))
        for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    )
    return {"light": light, "dark": {**light, **dark}, "print": {**light, **paper}}


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_and_lines_stand_out(theme: str) -> None:
    # WCAG 2.2: 4.5 to 1 for text, 3 to 1 for what a picture is made of.
    colours = _themes()[theme]
    for name in ("--ink", "--muted", "--warn"):
        for ground in ("--paper", "--ground", "--soft"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert _contrast(colours["--mark-ink"], colours["--mark"]) >= 4.5
    assert _contrast("#221b00", colours["--synthetic"]) >= 7
    series = set(COLOURS.values()) - {"--ink", "--muted", "--line", "--paper", "--warn"}
    assert len(series) == 7
    for name in series:
        assert _contrast(colours[name], colours["--paper"]) >= 3, name


def test_every_colour_of_a_chart_follows_the_theme(
    classification: StudyResults, segmentation: StudyResults
) -> None:
    html = render([classification, segmentation])
    themes = _themes()
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", html)) - {"--series"} <= set(themes["light"])
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert not re.findall(r"#[0-9a-f]{6}\b", drawing)
    assert themes["light"]["--ink"] != themes["dark"]["--ink"]


def test_arms_differ_in_more_than_colour(classification: StudyResults) -> None:
    drawn = [look for look in looks(classification).values() if not look.thin]
    assert len({look.symbol for look in drawn}) == len(drawn)
    assert len({look.variable for look in drawn}) == len(drawn)
