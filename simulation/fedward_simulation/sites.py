"""The simulated hospitals: prepared data, warm trainers and services, found by a node's place."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
from flwr.app import Array, ArrayRecord, Context

from fedward.errors import DataError, ProtocolError
from fedward.plan.load import plan_hash
from fedward.plan.schema import Plan
from fedward.tasks.base import Counts
from fedward.tasks.registry import counts_from_arrays
from fedward_client.data.sample import SPLITS, PreparedSite, joined_tables
from fedward_client.data.volumes import joined, let_go
from fedward_client.egress.disclosure import release
from fedward_client.egress.gate import Gate
from fedward_client.link.messages import TrainerMessage
from fedward_client.policy.settings import PolicySection
from fedward_client.training.evaluate import Answers
from fedward_client.training.runtime import Runtime
from fedward_client.training.trainer import Trainer
from fedward_simulation.site_service import (
    SimulatedContexts,
    SimulatedService,
    exact,
    has_noise,
    limits_of,
    open_policy,
)

SITE_STATE = "site-state"
_WARM_PLANS = 2


class SimulatedSites:
    """All hospitals of a simulation.

    Parameters
    ----------
    sites : sequence of PreparedSite
        In the order of the nodes' partition ids.
    runtime : Runtime
        How each trainer may use the machine.
    policy : PolicySection, optional
        Of each hospital; without one everything is allowed, and figures are exact.

    Attributes
    ----------
    gate : type of Gate
        What everything that leaves a hospital passes through.
    """

    gate: ClassVar[type[Gate]] = Gate

    def __init__(
        self,
        sites: Sequence[PreparedSite],
        runtime: Runtime,
        policy: PolicySection | None = None,
    ) -> None:
        self.sites, self.runtime = list(sites), runtime
        self.policy = policy or exact(open_policy())
        self._warm: dict[str, OrderedDict[str, Trainer]] = {}
        self._services: dict[int, OrderedDict[str, SimulatedService]] = {}

    def answer(self, context: Context, what: str, order: TrainerMessage) -> TrainerMessage:
        """Answer an order as the hospital behind a node."""
        # A worker may end, or be another the next time: what a site keeps stands in the context.
        service = self._service(context, order)
        held = context.state.array_records.get(SITE_STATE)
        before = service.kept = {n: array.numpy() for n, array in (held or {}).items()}
        made = service.answer(what, order)
        if service.kept is not before:
            arrays = {name: Array(value) for name, value in service.kept.items()}
            context.state[SITE_STATE] = ArrayRecord(arrays)
        return made

    def garbage(self, context: Context, error: ProtocolError) -> TrainerMessage:
        """Refuse what was no order."""
        return self._service(context, TrainerMessage("order", {})).garbage(error)

    def trainer_of(self, site: PreparedSite, plan: Plan) -> Trainer:
        """A hospital's trainer for a plan; the last few stay warm."""
        warm = self._warm.setdefault(site.name, OrderedDict())
        key = plan_hash(plan)
        if key not in warm:
            warm[key] = Trainer(plan, site, self.runtime)
            while len(warm) > _WARM_PLANS:
                warm.popitem(last=False)
        return warm[key]

    def forget(self, site: PreparedSite, plan: Plan) -> None:
        """Make a hospital's trainer anew the next time."""
        self._warm.get(site.name, OrderedDict()).pop(plan_hash(plan), None)

    def released(self, plan: Plan, answers: Answers) -> Counts | None:
        """Counts of a model's answers, as the hospitals' policy lets them leave; None: not at all.

        Where the policy adds noise they are exact: only what is sent has noise.
        """
        counts, limits = answers.exact(), limits_of(self.policy, plan)
        if has_noise(limits):
            return counts
        made, _ = release(counts, limits)
        return counts_from_arrays(plan.task, made) if any(a.any() for a in made.values()) else None

    def by_name(self) -> Mapping[str, PreparedSite]:
        """The hospitals by name."""
        return {site.name: site for site in self.sites}

    def _service(self, context: Context, order: TrainerMessage) -> SimulatedService:
        """The service of the hospital behind a node for the plan that an order names."""
        place = int(context.node_config["partition-id"])
        if not 0 <= place < len(self.sites):
            raise DataError("a node must stand for one of the sites", value=place)
        site, key = self.sites[place], str(order.record.get("plan_hash", ""))
        services = self._services.setdefault(place, OrderedDict())
        if key not in services:
            services[key] = SimulatedService(
                SimulatedContexts(site, self.policy, self.gate),
                partial(self.trainer_of, site),
                partial(self.forget, site),
            )
            while len(services) > _WARM_PLANS:
                services.popitem(last=False)
        return services[key]


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
        table=joined_tables([site.table for site in sites]),
        volumes=joined([site.volumes for site in sites if site.volumes is not None]),
    )


def digest_of_sites(sites: Sequence[PreparedSite]) -> str:
    """SHA-256 over the sites' images, targets, patients, divisions and tables."""
    total = hashlib.sha256()
    for site in sites:
        total.update(f"{site.name}:{site.images.shape}".encode())
        parts = (site.images, site.targets, site.patients, *site.split.values(), site.table)
        for array in parts:
            if array is None:
                continue
            for one in array if array.dtype == object else (array,):
                total.update(np.ascontiguousarray(one).data)
            let_go(array)
    return total.hexdigest()
