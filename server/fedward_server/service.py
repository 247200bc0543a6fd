"""The service as a process: operator API, health, and a runner for each study."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedward.startup import prepare

if __name__ == "__main__":
    prepare()  # before Flower and torch are imported

from fedward.console import log_to_stderr, stop_on_signals
from fedward.errors import ConfigError, FedwardError
from fedward.files import alone
from fedward.flower.control_client import ControlClient
from fedward_server.api.app import build_api
from fedward_server.api.health import Health
from fedward_server.config import ServerConfig, load_config
from fedward_server.dispatch import Dispatcher
from fedward_server.enrolment import Enrolment
from fedward_server.listen import ApiThread, check_tls, serve_health
from fedward_server.registry import open_registry
from fedward_server.setup import coordinator_fingerprint

_LOG = logging.getLogger("fedward.server")
# The one before may still be ending its runners.
_PATIENCE: Final = 20.0
_LOOK: Final = 0.5
_DAY: Final = 86400.0
_CERTIFICATE_DAYS: Final = 30


def serve(path: Path, stop: threading.Event) -> None:
    """Serve until stopped.

    Raises
    ------
    FedwardError
        The registry, a key or a port cannot be used, or another service uses the state folder.
    """
    config = load_config(path)
    log_to_stderr(config.server.log_level)
    os.environ["FLWR_HOME"] = str(config.server.state / "flwr")
    with alone(config.server.state, "service", _PATIENCE):
        registry, link = open_registry(config), _link(config)
        try:
            _serve(config, path, Enrolment(registry, link), stop)
        finally:
            registry.close()
            link.close()


def _serve(config: ServerConfig, path: Path, enrolment: Enrolment, stop: threading.Event) -> None:
    audit = enrolment.registry.audit
    found = Health(config, enrolment.registry, enrolment.link)
    health = serve_health(config, found, stop)
    try:
        api = ApiThread(config, build_api(config, enrolment, found), stop)
        try:
            for name, keep in (
                ("enrolment", enrolment.keep),
                ("audit", audit.keep),
                ("ready", lambda end: _tell_ready(config, found, end)),
                ("certificate", lambda end: _tell_certificate(found, end)),
            ):
                threading.Thread(target=keep, args=(stop,), daemon=True, name=name).start()
            Dispatcher(path, enrolment.registry).run(stop)
        finally:
            api.end()
            audit.write_unknown()
    finally:
        health.stop(1)


def _tell_ready(config: ServerConfig, found: Health, stop: threading.Event) -> None:
    """Say once that a study could run, and where hospitals and operators find this aggregator."""
    while not found.ready:
        if stop.wait(_LOOK):
            return
    _LOG.info(
        "ready: hospitals connect to port %d, operators to %s; coordinator %s",
        config.sites.port,
        config.api_url,
        coordinator_fingerprint(config),
    )


def _tell_certificate(found: Health, stop: threading.Event) -> None:
    """Say once a day, weeks before, that the certificate ends."""
    while True:
        with suppress(FedwardError):  # health tells what is wrong with the file
            if (hours := found.hours_to_certificate) > 0:
                _LOG.warning(
                    "by this machine's clock the certificate begins in %d hours; set the clock",
                    math.ceil(hours),
                )
            if (days := found.certificate_days) < _CERTIFICATE_DAYS:
                _LOG.warning("the certificate ends in %d days; hospitals refuse it then", days)
        if stop.wait(_DAY):
            return


def _link(config: ServerConfig) -> ControlClient:
    check_tls(config)
    try:
        secret = config.control_secret.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            "this machine's secrets must be readable",
            value=error.strerror,
            where="server.keys",
            fix="Restore them from a backup with keys",
        ) from None
    return ControlClient(config.superlink_address, config.tls.ca.read_bytes(), secret)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description="The aggregator's service.")
    parser.add_argument("--config", type=Path, required=True)
    path = parser.parse_args().config
    log_to_stderr()
    stop = threading.Event()
    stop_on_signals(stop)
    try:
        serve(path, stop)
    except FedwardError as error:
        _LOG.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
