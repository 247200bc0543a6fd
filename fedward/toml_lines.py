"""On which line of a TOML text a key stands; ``tomllib`` does not tell."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

_HEADER: Final = re.compile(r"\s*(\[\[?)[^\[\]]+\]\]?\s*(#.*)?$")
_LONGEST: Final = 200  # lines of one value; what follows a longer one is not looked for


class TomlLines:
    """Lines of the keys and tables of a valid TOML text.

    Parameters
    ----------
    text : str
        The text.
    """

    def __init__(self, text: str) -> None:
        self._lines: dict[str, int] = {}
        table: tuple[str, ...] = ()
        entries: Counter[tuple[str, ...]] = Counter()
        for number, statement in _statements(text):
            found = tomllib.loads(statement)
            if header := _HEADER.match(statement):
                table = _indexed(max(_paths(found), key=len), entries, header[1] == "[[")
                self._lines.setdefault(".".join(table), number)
                continue
            for path in _paths(found):
                self._lines.setdefault(".".join((*table, *path)), number)

    def of(self, where: str) -> int | None:
        """The line of a key, as errors write it (``stages.0.rounds``).

        Of one that is not there, the line of its table.
        """
        parts = where.split(".")
        for length in range(len(parts), 0, -1):
            if line := self._lines.get(".".join(parts[:length])):
                return line
        return None


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each header and each key with its value, with the number of its first line."""
    lines, first = text.splitlines(), 0
    for last in range(len(lines)):
        statement = "\n".join(lines[first : last + 1])
        try:
            made = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            if last - first >= _LONGEST:
                return
            continue  # the value goes on in the next line
        if made:
            yield first + 1, statement
        first = last + 1


def _paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Each key within a value; tables in a list are not entered, but for those of a header."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from _paths(inner, (*path, key))


def _indexed(
    path: tuple[str, ...], entries: Counter[tuple[str, ...]], another: bool
) -> tuple[str, ...]:
    """A header's path with the place of each table that is one of a list."""
    made: tuple[str, ...] = ()
    for place, part in enumerate(path):
        made = (*made, part)
        last = place == len(path) - 1
        if last and another:
            entries[made] += 1
        if count := entries[made]:
            made = (*made, str(count - 1))
    return made
