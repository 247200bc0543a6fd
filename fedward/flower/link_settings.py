"""Settings of a SuperLink process, apart from Flower: its parent need not import what it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LinkSettings:
    """What a SuperLink process needs to know.

    Attributes
    ----------
    host, port : str, int
        Where it listens for hospitals.
    certificate, key, ca : Path
        PEM files.
    database : Path
        Flower's own database.
    control_secret, runtime_secret : Path
        Files with this machine's secrets, readable by the service only.
    unauthenticated_connections, unauthenticated_connections_per_network : int
        See ``limits`` in ``server.toml``.
    unauthenticated_seconds : float
        The same.
    """

    host: str
    port: int
    certificate: Path
    key: Path
    ca: Path
    database: Path
    control_secret: Path
    runtime_secret: Path
    unauthenticated_connections: int = 256
    unauthenticated_connections_per_network: int = 64
    unauthenticated_seconds: float = 20.0

    def command(self) -> list[str]:
        """Arguments of the process."""
        return [
            part
            for name, value in vars(self).items()
            for part in (f"--{name.replace('_', '-')}", str(value))
        ]
