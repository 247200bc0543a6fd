"""Escape text from other sources for display.

A site's name, a refusal, a label in an image's header: whoever wrote it may have put in sequences
that move a terminal's cursor, rename its window, hide or reorder text (ECMA-48 control functions;
Unicode Standard Annex 9, "Trojan Source", doi:10.48550/arXiv.2111.00169).
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import AfterValidator

# C0 but tab and line feed, DEL and C1; marks, embeddings, overrides and isolates of direction;
# line and paragraph separators; invisible letters and tags; halves of surrogate pairs.
UNSAFE: Final = (
    r"\u115f\u1160\u3164\uffa0\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f"
)
_UNSAFE: Final = re.compile(f"[{UNSAFE}]")


def printable(text: str) -> str:
    """The text with each unsafe character written as an escape, such as ``\\x1b``."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_json(text: str) -> str:
    """The same within a JSON text, whose strings stay what they are."""
    return _UNSAFE.sub(_json_escape, text)


def _json_escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def _all_printable(text: str) -> str:
    if printable(text) != text:
        raise ValueError("a text must hold no control, direction or invisible characters")
    return text


Printable = Annotated[str, AfterValidator(_all_printable)]
"""A text of a message, refused where something in it is unsafe."""
