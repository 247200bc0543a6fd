"""Let a policy that was edited hold for the next order, without a restart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedward.errors import FedwardError
from fedward_client.config import SiteConfig, load_config

_LOG = logging.getLogger("fedward.trainer")
_LOOK_SECONDS: Final = 2.0


def watch_policy(
    path: Path,
    use: Callable[[SiteConfig], None],
    wrong: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Look at ``site.toml`` until stopped, and use its policy when it has changed.

    Parameters
    ----------
    path : Path
        The file.
    use : callable
        Takes the new configuration; of it the policy alone may change in a running trainer.
    wrong : callable
        Hears why the file cannot be used, and "" when it can again. The policy stays as it was.
    stop : threading.Event
        Ends it.
    """
    seen = _state(path)
    while not stop.wait(_LOOK_SECONDS):
        now = _state(path)
        if now == seen:
            continue
        seen = now
        try:
            use(load_config(path, datasets_here=False))
            wrong("")
        except FedwardError as error:  # of the file, or of the audit log that must hear of it
            _LOG.warning("site.toml was changed and cannot be used: %s", error)
            wrong(str(error))


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
