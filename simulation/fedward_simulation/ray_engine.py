"""Flower's own simulation engine, for a Ray cluster, with the same apps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import ServerApp
from numpy.lib.npyio import NpzFile

from fedward.errors import DeviceError, ProtocolError
from fedward.flower import identity
from fedward.startup import prepare
from fedward_client.app import client_app
from fedward_client.data.sample import SPLITS, PreparedSite
from fedward_client.data.volumes import Volumes, load, save
from fedward_client.link.messages import TrainerMessage
from fedward_client.policy.settings import PolicySection
from fedward_client.training.runtime import Runtime
from fedward_simulation.pool import cores
from fedward_simulation.sites import SimulatedSites

_SETTINGS = {
    # Ray's 15 leaves its workers next to nothing of a machine that does other things.
    "RAY_worker_niceness": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


class StoredSites:
    """Simulated hospitals that an actor opens from disk, so that no image travels to it.

    Parameters
    ----------
    folder : Path
        Where :func:`store_sites` put them; every machine of the cluster must see it.
    names : sequence of str
        Hospitals in the order of partition ids.
    runtime : Runtime
        How each trainer may use the machine.
    policy : PolicySection or None
        Of each hospital, see :class:`fedward_simulation.sites.SimulatedSites`.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        runtime: Runtime,
        policy: PolicySection | None = None,
    ) -> None:
        self.folder, self.names, self.runtime, self.policy = folder, list(names), runtime, policy

    def answer(self, context: Context, what: str, order: TrainerMessage) -> TrainerMessage:
        """Answer an order as the hospital behind a node, whose trainer is warm in an actor."""
        return self._opened().answer(context, what, order)

    def garbage(self, context: Context, error: ProtocolError) -> TrainerMessage:
        """Refuse what was no order."""
        return self._opened().garbage(context, error)

    def _opened(self) -> SimulatedSites:
        key = (self.folder, tuple(self.names))
        if key not in _OPEN:
            sites = [
                load_site(self.folder / f"site-{place}", name)
                for place, name in enumerate(self.names)
            ]
            _OPEN[key] = SimulatedSites(sites, self.runtime, self.policy)
        return _OPEN[key]


_OPEN: dict[tuple[Path, tuple[str, ...]], SimulatedSites] = {}


def store_sites(sites: Sequence[PreparedSite], folder: Path) -> None:
    """Write prepared sites where actors can map them."""
    for place, site in enumerate(sites):
        target = folder / f"site-{place}"
        target.mkdir(parents=True, exist_ok=True)
        save(target / "images.npy", site.images)
        volumes = site.volumes
        if volumes is not None:
            save(target / "targets.npy", site.targets)
            save(target / "truth.npy", volumes.truth)
            np.savez(target / "volumes.npz", sides=volumes.sides, marked=volumes.marked)
        facts: dict[str, Any] = {f"split_{part}": site.split[part] for part in SPLITS}
        if site.table is not None:
            facts["table"] = site.table
        np.savez(
            target / "rest.npz",
            targets=site.targets if volumes is None else np.empty(0),
            patients=site.patients,
            spacing=site.spacing,
            synthetic=np.array(site.synthetic),
            images_are_patients=np.array(site.images_are_patients),
            reasons=np.array(sorted(site.left_out), dtype=str),
            counts=np.array([site.left_out[key] for key in sorted(site.left_out)], dtype=np.int64),
            **facts,
        )


def load_site(folder: Path, name: str) -> PreparedSite:
    """Open a stored site; its images stay on disk until they are used."""
    rest: NpzFile
    volumes = None
    if (folder / "volumes.npz").exists():
        with np.load(folder / "volumes.npz", allow_pickle=False) as rest:
            volumes = Volumes(load(folder / "truth.npy"), rest["sides"], rest["marked"])
    with np.load(folder / "rest.npz", allow_pickle=False) as rest:
        return PreparedSite(
            name=name,
            images=load(folder / "images.npy"),
            targets=rest["targets"] if volumes is None else load(folder / "targets.npy"),
            patients=rest["patients"],
            split={part: rest[f"split_{part}"] for part in SPLITS},
            spacing=rest["spacing"],
            left_out=dict(zip(rest["reasons"].tolist(), rest["counts"].tolist(), strict=True)),
            synthetic=bool(rest["synthetic"]),
            images_are_patients=bool(rest["images_are_patients"]),
            volumes=volumes,
            table=rest.get("table"),
        )


def start_ray() -> None:
    """Start Ray on this machine's cores; once more where its node was too slow.

    Ray gives its node thirty seconds, which a busy machine may need for its imports alone.

    Raises
    ------
    DeviceError
        It does not start.
    """
    import ray

    if ray.is_initialized():
        return
    # Ray would end this process at SIGTERM with nothing written.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # What the actors import lies where this process found it.
    environment = {
        "env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)},
        "worker_process_setup_hook": f"{prepare.__module__}.{prepare.__name__}",
    }
    for last in (False, True):
        try:
            ray.init(
                num_cpus=cores(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                runtime_env=environment,
            )
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)
            return
        except Exception as error:  # Ray has no error of its own for this
            ray.shutdown()
            if last:
                raise DeviceError(
                    "Ray must start on this machine",
                    value=type(error).__name__,
                    fix="End other programs, or use --engine local",
                    where="--engine",
                ) from None


def run_ray(
    app: ServerApp,
    sites: Sequence[PreparedSite],
    runtime: Runtime,
    cache: Path,
    stop: threading.Event,
    policy: PolicySection | None = None,
) -> None:
    """Run a server application on Ray: as many actors side by side as cores or GPUs allow."""
    os.environ.update({key: os.environ.get(key, value) for key, value in _SETTINGS.items()})
    identity.disable_telemetry()
    from flwr.simulation import run_simulation

    folder = (cache / "ray").resolve()
    store_sites(sites, folder)
    on_gpu = runtime.torch_device.type == "cuda"
    stored = StoredSites(
        folder, [site.name for site in sites], replace(runtime, cache=cache.resolve()), policy
    )
    resources: dict[str, Any] = {
        "num_cpus": float(runtime.threads),
        "num_gpus": 1.0 if on_gpu else 0.0,
    }
    start_ray()
    try:
        run_simulation(
            server_app=app,
            client_app=client_app(stored),
            num_supernodes=len(sites),
            backend_config={"client_resources": resources},
        )
    except KeyboardInterrupt:
        stop.set()
        raise
