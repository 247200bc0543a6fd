"""Shell-style patterns over parameter names, matched without a regular expression.

A plan's patterns come from outside. :mod:`fnmatch` translates a pattern in quadratic time and hands
the result to a matcher that backtracks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class _Letters(NamedTuple):
    """One character of a name: within one of the ranges, or within none of them."""

    ranges: tuple[tuple[str, str], ...]
    outside: bool = False

    def fits(self, letter: str) -> bool:
        return any(low <= letter <= high for low, high in self.ranges) != self.outside


_ANY = _Letters((), outside=True)
_STAR = None


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern of ``*``, ``?``, ``[abc]``, ``[a-c]`` and ``[!abc]``.

    The rules are those of :func:`fnmatch.fnmatchcase`. Only the last ``*`` is ever taken back, so
    the time is at most the product of both lengths.
    """
    tokens = _tokens(pattern)
    place = token = 0
    star, resume = -1, 0
    while place < len(name):
        wanted = tokens[token] if token < len(tokens) else _Letters(())
        if wanted is _STAR:
            star, resume = token, place
            token += 1
        elif wanted.fits(name[place]):
            place, token = place + 1, token + 1
        elif star >= 0:
            resume += 1
            place, token = resume, star + 1
        else:
            return False
    return all(left is _STAR for left in tokens[token:])


@lru_cache(maxsize=256)
def _tokens(pattern: str) -> tuple[_Letters | None, ...]:
    found: list[_Letters | None] = []
    place, last_bracket = 0, pattern.rfind("]")
    while place < len(pattern):
        letter = pattern[place]
        if letter == "*":
            found.append(_STAR)
        elif letter == "?":
            found.append(_ANY)
        elif letter == "[" and (end := _end_of_set(pattern, place, last_bracket)) > 0:
            found.append(_set(pattern[place + 1 : end]))
            place = end
        else:
            found.append(_Letters(((letter, letter),)))
        place += 1
    return tuple(found)


def _end_of_set(pattern: str, start: int, last_bracket: int) -> int:
    """Where the set that begins at ``start`` closes; -1 where nothing closes it."""
    first = start + 1 + (pattern[start + 1 : start + 2] == "!")
    # A bracket that stands first is a member: []a] is the set of both.
    return pattern.find("]", first + 1) if first < last_bracket else -1


def _set(body: str) -> _Letters:
    outside = body.startswith("!")
    members, ranges, place = body[outside:], [], 0
    while place < len(members):
        spans = members[place + 1 : place + 2] == "-" and place + 2 < len(members)
        ranges.append((members[place], members[place + 2 * spans]))
        place += 1 + 2 * spans
    return _Letters(tuple(ranges), outside)
