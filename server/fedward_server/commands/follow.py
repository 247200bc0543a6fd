"""Follow a study's events across restarts of the service."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

from fedward.errors import ServiceError
from fedward_server.cli_profile import ApiClient

_AGAIN: Final = 1.0
_PATIENCE: Final = 120.0


def follow(client: ApiClient, path: str) -> Iterator[dict[str, Any]]:
    """Events as they come, each once, to the study's end.

    A service that answered once is waited for when it goes away, as in a restart.

    Parameters
    ----------
    client : ApiClient
        The API.
    path : str
        The events' own.

    Raises
    ------
    ServiceError
        It never answered, or does not come back within two minutes.
    """
    seen, lost = 0, 0.0
    while True:
        try:
            for event in client.lines(f"{path}?follow=true&after={seen}"):
                seen, lost = event["seq"], 0.0
                yield event
            return
        except ServiceError:
            lost = lost or time.monotonic()
            if not seen or time.monotonic() - lost > _PATIENCE:
                raise
            time.sleep(_AGAIN)
