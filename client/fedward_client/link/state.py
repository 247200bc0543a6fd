"""How a connector's link to the aggregator is: in a file of its own, and told to the trainer."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedward.errors import ProtocolError

MOST_TEXT: Final = 500
CERTIFICATE_DAYS: Final = 30
"""Days before its end from which on a certificate is told of."""
_MOST_BYTES: Final = 8192
Text = Annotated[str, Field(max_length=MOST_TEXT)]


class LinkState(BaseModel):
    """What ``fedward-client status`` tells about the link; holds nothing secret.

    Attributes
    ----------
    state : str
        ``online``, or why not.
    since : float
        Seconds since the epoch at which that began.
    last_error, last_error_at : str, float
        What broke the link last, and when (seconds since the epoch).
    recovered_at : float
        When the link was online again after it; 0 while it is not.
    node_id, messages, bytes_up : str, int, int
        Which node the site is, and what passed.
    trainer : str
        ``attached`` or ``gone``.
    isolation : str
        What the connector found of the images.
    clock_seconds : int
        How far the aggregator's clock is ahead, where that had to be known.
    certificate_days : int or None
        Days for which the aggregator's certificate and its authority are still valid.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    state: Text = "starting"
    since: float = Field(default=0.0, allow_inf_nan=False)
    last_error: Text = ""
    last_error_at: float = Field(default=0.0, allow_inf_nan=False)
    recovered_at: float = Field(default=0.0, allow_inf_nan=False)
    node_id: Text = ""
    trainer: Text = "starting"
    isolation: Text = ""
    messages: int = Field(default=0, ge=0)
    bytes_up: int = Field(default=0, ge=0)
    clock_seconds: int = 0
    certificate_days: int | None = None


def link_file(folder: Path) -> Path:
    """Where a connector keeps the state of its link, in its own folder."""
    return folder / "link.json"


def write_state(path: Path, state: LinkState) -> None:
    """Write it whole; a full disk only means that it is not written."""
    part = path.with_suffix(".part")
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.write_text(state.model_dump_json())
        part.replace(path)


def touch(path: Path) -> None:
    """Say that the link is alive as it was."""
    with suppress(OSError):
        os.utime(path)


def read_state(path: Path) -> tuple[LinkState, float]:
    """The state, and how many seconds ago it was true.

    Raises
    ------
    ProtocolError
        There is none, or it is not readable.
    """
    try:
        age = time.time() - path.stat().st_mtime
        return parse_state(path.read_text()), age
    except (OSError, UnicodeDecodeError):
        raise ProtocolError(
            "the connector must have written how its link is",
            fix="Start it: fedward-client connector",
        ) from None


def parse_state(text: str) -> LinkState:
    """A state that a connector told.

    Raises
    ------
    ProtocolError
        It is none.
    """
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError
        value: Any = json.loads(text)
        return LinkState.model_validate(value)
    except (ValueError, RecursionError, ValidationError):
        raise ProtocolError(
            "the state of a link has known fields only",
            fix="Run the same Fedward release in both processes",
        ) from None
