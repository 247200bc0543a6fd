"""``docs/strategies.md``, from the strategies' entries: ``python -m tools.docs.strategies``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from fedward.strategies import STRATEGIES, Setting, StrategySpec

_TEMPLATE = Path(__file__).with_name("strategies_template.md")


def strategies_page() -> str:
    """The text of ``docs/strategies.md``."""
    text = _TEMPLATE.read_text("utf-8")
    return text.replace("{strategies}", "\n".join(_lines()).strip())


def _lines() -> Iterator[str]:
    for spec in STRATEGIES.values():
        yield from (f"## `{spec.name}`", "", spec.description, "", *_facts(spec))
        if spec.settings:
            yield from ("| setting | default | meaning |", "|---|---|---|")
            yield from (_row(name, setting) for name, setting in spec.settings.items())
        else:
            yield "No settings."
        yield ""


def _facts(spec: StrategySpec) -> Iterator[str]:
    if spec.kept:
        yield f"A site keeps {' and '.join(spec.kept.values())}."
    if spec.sent:
        yield f"Besides its update it sends {' and '.join(spec.sent.values())}."
    if spec.sent and spec.private:
        yield "This follows from the update: with differential privacy it costs nothing more."
    if not spec.private:
        yield "It does not go with differential privacy."
    if spec.by_figures:
        yield (
            "It reads [figures that evaluations release](#weights-that-follow-the-figures): "
            "nothing more leaves a site."
        )
    if spec.kept or spec.sent or spec.by_figures:
        yield ""


def _row(name: str, setting: Setting) -> str:
    default = "required" if setting.default is None else f"{setting.default:g}"
    return f"| `{name}` | {default} | {setting.meaning} |"


if __name__ == "__main__":
    sys.stdout.write(strategies_page())
