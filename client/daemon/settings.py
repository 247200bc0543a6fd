"""The parts of ``site.toml`` that the daemon needs: the aggregator, and the two processes."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from client.section import Place, Section

_MOST_PORT: Final = 65535


def _real_port(address: str) -> str:
    if not 1 <= int(address.rpartition(":")[2]) <= _MOST_PORT:
        raise ValueError(f"a port lies in 1 to {_MOST_PORT}; ask the coordinator for it")
    return address


def _real_proxy(proxy: str) -> str:
    """A proxy, whose password is never shown."""
    with suppress(ValueError):
        found = urlsplit(proxy)
        known = found.scheme in ("http", "https") and bool(found.hostname)
        if not proxy or (known and found.port != 0 and not re.search(r"\s", proxy)):
            return proxy
    raise ValueError("a proxy is written http://host:port; ask who runs the network here")


Address = Annotated[
    str, Field(pattern=r"^[^\s/\"\\]+:[0-9]{1,5}$", max_length=260), AfterValidator(_real_port)
]
Mebibytes = Annotated[int, Field(ge=1, le=4096)]


class ServerSection(Section):
    """The aggregator, and the process that talks to it."""

    address: Address = Field(description="host and port of the aggregator, `host:port`")
    ca: Place = Field(description="certificate authority of the aggregator, PEM")
    state: Place = Field(
        default=Path("connector"),
        description="the connector's own folder: the site's key, and messages in hand; it must lie "
        "outside datasets and the site's state",
    )
    proxy: Annotated[str, AfterValidator(_real_proxy)] = Field(
        default="",
        description="HTTP proxy, `http://host:port`; without it that of the environment "
        "(`HTTPS_PROXY`, `NO_PROXY`)",
    )
    user: str = Field(
        default="",
        description="user that the connector runs as when the daemon is started by root",
    )
    max_download_mib: Mebibytes = Field(default=1024, description="largest message taken, MiB")
    retry_seconds: float = Field(
        default=60.0, gt=0.0, le=3600.0, description="longest pause before the link is tried again"
    )
    idle_seconds: float = Field(
        default=20.0,
        gt=0.0,
        le=60.0,
        description="longest time that a question to the aggregator is held open while there is "
        "nothing to do, at most 25; for proxies that end quiet connections sooner",
    )


class TrainerSection(Section):
    """The process that reads the images."""

    socket: Place = Field(
        default=Path("run/trainer.sock"),
        description="Unix socket between the two processes; its folder must lie outside datasets "
        "and the site's state",
    )
    group: str = Field(
        default="", description="group that may connect to the socket; without it, the owner alone"
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="where to train"
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="CPU threads, and processes that read images; 0: all cores",
    )
    physical_batch: int = Field(default=64, ge=1, description="images on the device at once")
    allow_networked_trainer: bool = Field(
        default=False,
        description="train although the trainer has a network; status and audit then shout it",
    )
    allow_unconfined_connector: bool = Field(
        default=False,
        description="carry out orders although the connector can read images; status and audit "
        "then shout it",
    )
    watchdog_seconds: float = Field(
        default=20.0,
        ge=2.0,
        le=3600.0,
        description="longest time in which no thread of the trainer gets to run; then it is ended "
        "and started again, and the order that it had in hand is refused from then on",
    )
