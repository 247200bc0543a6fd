"""Whether a study could run now, and figures for Prometheus."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from fedward.errors import FedwardError
from fedward.flower.control_client import ControlClient
from fedward_server.certificates import read_facts
from fedward_server.config import ServerConfig
from fedward_server.registry import Registry

_FRESH: Final = 2.0
T = TypeVar("T")


class Recent(Generic[T]):
    """A value that is computed at most once in two seconds, and by one caller at a time.

    Who asks meanwhile gets the last one: anybody may ask for health and figures, and looking takes
    long where a part is away.

    Parameters
    ----------
    compute : callable
        Gives the value.
    """

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute, self._lock = compute, threading.Lock()
        self._found: tuple[float, T] | None = None

    def get(self) -> T:
        """The value."""
        found = self._found
        if found is not None and time.monotonic() - found[0] <= _FRESH:
            return found[1]
        if found is not None and not self._lock.acquire(blocking=False):
            return found[1]
        if found is None:
            self._lock.acquire()
        try:
            if self._found is None or self._found is found:
                self._found = (time.monotonic(), self._compute())
            return self._found[1]
        finally:
            self._lock.release()


class Health:
    """Looks at everything that a study needs.

    Parameters
    ----------
    config, registry, link : ServerConfig, Registry, Link
        The aggregator's parts.
    """

    def __init__(self, config: ServerConfig, registry: Registry, link: ControlClient) -> None:
        self._config, self._registry, self._link = config, registry, link
        self._seen = Recent(self._look)

    def find(self) -> dict[str, str]:
        """Part to "ok" or what is wrong; at most two seconds old, or being looked at now."""
        return self._seen.get()

    def _look(self) -> dict[str, str]:
        return {
            "database": self._try(self._registry.studies.list),
            "superlink": self._try(self._link.nodes),
            "disk": self._disk(),
            **self._certificate(),
        }

    @property
    def ready(self) -> bool:
        """Whether a study could run."""
        return all(text == "ok" for text in self.find().values())

    def _disk(self) -> str:
        free = shutil.disk_usage(self._config.server.state).free
        return "ok" if free >= self._config.limits.free_bytes else f"{free >> 20} MiB free"

    @property
    def certificate_days(self) -> int:
        """Whole days until certificate or authority end; negative afterwards.

        Raises
        ------
        ConfigError
            They cannot be read.
        """
        tls = self._config.tls
        return min(read_facts(path).days_left for path in (tls.certificate, tls.ca))

    @property
    def hours_to_certificate(self) -> float:
        """Hours until certificate and authority begin; above 0 where this clock is behind.

        Raises
        ------
        ConfigError
            They cannot be read.
        """
        tls = self._config.tls
        begins = max(read_facts(path).begins for path in (tls.certificate, tls.ca))
        return (begins - datetime.now(UTC)).total_seconds() / 3600

    def _certificate(self) -> dict[str, str]:
        """What is wrong with the certificate; nothing while it is valid."""
        try:
            days = self.certificate_days
            if (hours := self.hours_to_certificate) > 0:
                return {"certificate": f"begins in {hours:.0f} hours by this clock; set it (NTP)"}
        except FedwardError as error:
            return {"certificate": error.rule}
        if days >= 0:
            return {}
        return {"certificate": f"ended {-days} days ago; fedward-server certificate renew"}

    @staticmethod
    def _try(call: Any) -> str:
        try:
            call()
        except FedwardError as error:
            return error.rule
        except Exception as error:  # a database driver's own
            return type(error).__name__
        return "ok"


def health_router(health: Health, registry: Registry, link: ControlClient) -> APIRouter:
    """The calls that need no token."""
    router = APIRouter(tags=["health"])
    figures = Recent(lambda: _figures(health, registry, link))

    @router.get("/healthz")
    def alive() -> dict[str, str]:
        """The service answers."""
        return {"status": "ok"}

    @router.get("/readyz")
    def ready() -> JSONResponse:
        """A study could run: SuperLink, database and disk are fine."""
        return JSONResponse(
            {"ready": health.ready, "parts": health.find()}, 200 if health.ready else 503
        )

    @router.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Figures in Prometheus' format."""
        return Response(figures.get(), media_type="text/plain; version=0.0.4")

    return router


def _figures(health: Health, registry: Registry, link: ControlClient) -> bytes:
    found = CollectorRegistry()
    ready = Gauge("fedward_ready", "1 when a study could run", registry=found)
    ready.set(health.ready)
    with suppress(FedwardError):
        days = Gauge("fedward_certificate_days", "until the certificate ends", registry=found)
        days.set(health.certificate_days)
    studies = Gauge("fedward_studies", "studies by state", ["state"], registry=found)
    for state, count in Tally(one.state for one in registry.studies.list()).items():
        studies.labels(state).set(count)
    rounds = Gauge("fedward_study_rounds", "finished rounds", ["study"], registry=found)
    for one in registry.studies.list("submitted", "running", "paused"):
        rounds.labels(one.id).set(one.round)
    online = Gauge("fedward_site_online", "1 when a site is connected", ["site"], registry=found)
    if health.find()["superlink"] == "ok":
        nodes = {node.node_id: node.status for node in link.nodes()}
        for site in registry.sites.list():
            online.labels(site.name).set(nodes.get(site.node_id or 0) == "online")
    return bytes(generate_latest(found))
