"""The known word that somebody may have meant by one that is not known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_SHORTEST = 3  # letters of the beginning of a word that may stand for it


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is spelled most like this one, or that it abbreviates; "" without one.

    Parameters
    ----------
    word : str
        What was written; case and separators do not matter.
    known : iterable of str
        What could have been meant.

    Examples
    --------
    >>> nearest("lr", ["rounds", "learning_rate"])
    'learning_rate'
    """
    written, plain = _plain(word), {_plain(one): one for one in known}
    if close := difflib.get_close_matches(written, plain, n=1, cutoff=0.6):
        return plain[close[0]]
    for one in plain.values():
        parts = [part for part in re.split(r"[^a-z0-9]+", one.lower()) if part]
        if len(parts) > 1 and written == "".join(part[0] for part in parts):
            return one
        if len(written) >= _SHORTEST and any(part.startswith(written) for part in parts):
            return one
    return ""


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())
