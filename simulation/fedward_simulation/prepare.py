"""The simulated hospitals' images: each hospital's own frozen cohort."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from fedward.errors import ConfigError, DataError, PlanError
from fedward.plan.schema import Plan
from fedward_client.cohort.training import Preparers, cache_folder, prepare_cohort
from fedward_client.config import SiteConfig
from fedward_client.data.sample import PreparedSite
from fedward_client.secret import site_secret
from fedward_simulation.options import Options

Note = Callable[[str], None]


def check_count(plan: Plan, sites: int) -> None:
    """Hold the number of hospitals against the plan.

    Raises
    ------
    PlanError
        The plan needs more hospitals.
    """
    if sites < plan.participation.sites:
        raise PlanError(
            "the plan needs more sites than the data give",
            value=f"{sites} of {plan.participation.sites}",
            fix="Lower participation.sites, or bring more sites",
            where="participation.sites",
        )


def frozen_sites(plan: Plan, options: Options, crew: Preparers, note: Note) -> list[PreparedSite]:
    """The latest frozen cohort of each hospital, every byte of it verified.

    Raises
    ------
    ConfigError
        A configuration is broken, a dataset has to be named, or two hospitals share a name.
    DataError
        A cohort has changed, is not there, or cannot serve the plan; the message names the site.
    PlanError
        The plan needs more hospitals.
    """
    found = [hospital.configured() for hospital in options.hospitals]
    _check_different([config.site.name for config, _ in found])
    check_count(plan, len(found))
    return [_frozen(config, dataset, plan, crew, note) for config, dataset in found]


def _check_different(names: Sequence[str]) -> None:
    double = [name for name, count in Counter(names).items() if count > 1]
    if double:
        raise ConfigError(
            "the sites of a study must have different names",
            value=double[0],
            fix="Give each site.toml a name of its own",
            where="site.name",
        )


def _frozen(
    config: SiteConfig, dataset: str, plan: Plan, crew: Preparers, note: Note
) -> PreparedSite:
    try:
        return prepare_cohort(
            config,
            dataset,
            "latest",
            plan,
            secret=site_secret(config.site.state),
            cache=cache_folder(config),
            crew=crew,
            note=note,
        )
    except DataError as error:
        where = f"{config.site.name}, {error.where or dataset}"
        raise DataError(error.rule, value=error.value, fix=error.fix, where=where) from None
