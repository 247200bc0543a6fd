"""How the site's officer asks a running trainer; imports nothing that takes time."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final

from client.config import SiteConfig
from fedward.errors import ConfigError, FedwardError

_SECONDS: Final = 30.0


def admin_socket(config: SiteConfig) -> Path:
    """Where a site's officer talks to the trainer."""
    return config.site.state / "admin.sock"


def ask(path: Path, command: str, **arguments: Any) -> dict[str, Any]:
    """Ask a running trainer.

    Raises
    ------
    ConfigError
        None runs.
    FedwardError
        What it answered, with its exit code.
    """
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(_SECONDS)
            link.connect(str(path))
            link.sendall(json.dumps({"command": command, "arguments": arguments}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(link.makefile("rb").readline())
    except (OSError, ValueError):
        raise ConfigError(
            "the daemon must run", fix="Start it with `fedward-client run`; only its owner may ask"
        ) from None
    if "error" in answer:
        raise _error(*answer["error"])
    return answer


def _error(name: str, rule: str, value: str, fix: str, where: str, code: int) -> FedwardError:
    from fedward import errors

    kind = getattr(errors, name, FedwardError)
    made: FedwardError = kind(rule, value=value or None, fix=fix, where=where)
    made.exit_code = code
    return made
