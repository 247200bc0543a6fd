"""The simulated hospitals: prepared data and warm trainers, found by a node's place."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Context

from fedward.errors import DataError
from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan
from fedward_client.data.sample import SPLITS, PreparedSite
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer

_WARM_PLANS = 2


class SimulatedSites:
    """All hospitals of a simulation.

    Parameters
    ----------
    sites : sequence of PreparedSite
        In the order of the nodes' partition ids.
    runtime : Runtime
        How each trainer may use the machine.
    """

    def __init__(self, sites: Sequence[PreparedSite], runtime: Runtime) -> None:
        self.sites, self.runtime = list(sites), runtime
        self._warm: dict[str, OrderedDict[str, Trainer]] = {}

    def name(self, context: Context) -> str:
        """The hospital behind a node."""
        return self._site(context).name

    def trainer(self, context: Context, plan: Plan) -> Trainer:
        """Its trainer for a plan; the last few stay warm."""
        return self.trainer_of(self._site(context), plan)

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        """A hospital's trainer for a plan."""
        warm = self._warm.setdefault(site.name, OrderedDict())
        key = plan_hash(plan)
        if key not in warm:
            warm[key] = Trainer(plan, site, self.runtime)
            while len(warm) > _WARM_PLANS:
                warm.popitem(last=False)
        return warm[key]

    def by_name(self) -> Mapping[str, PreparedSite]:
        """The hospitals by name."""
        return {site.name: site for site in self.sites}

    def _site(self, context: Context) -> PreparedSite:
        place = int(context.node_config["partition-id"])
        if not 0 <= place < len(self.sites):
            raise DataError("a node must stand for one of the sites", value=place)
        return self.sites[place]


def pool_sites(sites: Sequence[PreparedSite], name: str = "pooled") -> PreparedSite:
    """All patients of all hospitals as one site, each in the part where its hospital has it."""
    images = np.concatenate([site.images for site in sites])
    starts = np.cumsum([0] + [len(site.images) for site in sites[:-1]])
    people = np.cumsum([0] + [int(site.patients.max()) + 1 for site in sites[:-1]])
    return PreparedSite(
        name=name,
        images=images,
        targets=np.concatenate([site.targets for site in sites]),
        patients=np.concatenate(
            [site.patients + base for site, base in zip(sites, people, strict=True)]
        ),
        split={
            part: np.concatenate(
                [site.split[part] + start for site, start in zip(sites, starts, strict=True)]
            )
            for part in SPLITS
        },
        spacing=np.concatenate([site.spacing for site in sites]),
        synthetic=any(site.synthetic for site in sites),
        images_are_patients=any(site.images_are_patients for site in sites),
    )


def digest_of_sites(sites: Sequence[PreparedSite]) -> str:
    """SHA-256 over the sites' images, targets, patients and divisions."""
    total = hashlib.sha256()
    for site in sites:
        total.update(f"{site.name}:{site.images.shape}".encode())
        parts = (site.images, site.targets, site.patients, *site.split.values())
        for array in parts:
            total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
