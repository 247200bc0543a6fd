"""Lines of keys in a TOML text."""

from __future__ import annotations

import pytest

from fedward.toml_lines import TomlLines

TEXT = '''# a plan
version = 1

[study]
name = "x"  # [not a table]
note = """
[task]
kind = 3
"""

[task.inner]
"odd key" = [
  1,
  2,
]
point = {x = 1, y = 2}
a.b = 3

[[stages]]
name = "one"

[[stages]]
name = "two"
[stages.more]
deep = true
'''


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("version", 2),
        ("study", 4),
        ("study.name", 5),
        ("study.note", 6),
        ("study.missing", 4),
        ("task.inner.odd key", 12),
        ("task.inner.point.y", 16),
        ("task.inner.a.b", 17),
        ("stages.0.name", 20),
        ("stages.1", 22),
        ("stages.1.name", 23),
        ("stages.1.more.deep", 25),
        ("nowhere", None),
    ],
)
def test_each_key_has_its_line(where: str, line: int | None) -> None:
    assert TomlLines(TEXT).of(where) == line


def test_what_follows_a_very_long_value_has_no_line() -> None:
    text = "a = 1\nb = [\n" + "1,\n" * 5000 + "]\nc = 1\n"
    lines = TomlLines(text)
    assert lines.of("a") == 1 and lines.of("c") is None
