"""The simulated hospitals' images: one dataset divided, or each hospital's own frozen cohort."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from client.cohort.training import Preparers, cache_folder, prepare_cohort
from client.config import SiteConfig, load_config
from client.data.preprocess import Means, prepare
from client.data.read import DatasetSpec, read_dataset
from client.data.types import PreparedSite
from client.secret import site_secret
from fedward.errors import ConfigError, DataError, PlanError
from fedward.plan.schema import Plan
from fedward.protocol import SITE_NAME
from simulation.options import Hospital, Options
from simulation.partition import parse_partition, partition
from simulation.pool import cores

Note = Callable[[str], None]


def divided_sites(
    plan: Plan, options: Options, crew: Preparers, note: Note
) -> tuple[list[PreparedSite], dict[str, int]]:
    """One dataset divided among hospitals, and what was left out of it by reason.

    Raises
    ------
    DataError
        The data cannot be read or divided, or nothing of a hospital can be used.
    PlanError
        The plan needs more hospitals.
    """
    data = options.data or Path()
    how = parse_partition(options.partition)
    folders: Literal["none", "folders"] = "folders" if how.kind == "folders" else "none"
    note("reading the data")
    dataset = read_dataset(DatasetSpec(data, options.format, folders), plan.task)
    count = options.sites or plan.participation.sites
    parts = partition(dataset.samples, options.partition, count, options.seed)
    _check_names(parts)
    _check_count(plan, len(parts))
    synthetic = (data / "synthetic.json").is_file()
    room = None if options.cache_gib is None else round(options.cache_gib * (1 << 30))
    means, sites = Means(cores(), crew, room), []
    for name, samples in parts.items():
        note(f"preparing {name}: {len(samples)} images")
        site = prepare(name, samples, plan, options.out / "cache", means)
        sites.append(replace(site, synthetic=synthetic or site.synthetic))
    return sites, dict(Counter(one.reason for one in dataset.left_out))


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if not re.fullmatch(SITE_NAME, name):
            raise DataError(
                "a site's name has letters, digits, blanks, `.`, `_` or `-`, 64 at most",
                value=name, fix="Rename the folder or the column's value", where="--partition",
            )  # fmt: skip


def _check_count(plan: Plan, sites: int) -> None:
    if sites < plan.participation.sites:
        raise PlanError(
            "the plan needs more sites than the data give",
            value=f"{sites} of {plan.participation.sites}",
            fix="Lower participation.sites, or bring more sites", where="participation.sites",
        )  # fmt: skip


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
    found = [_configured(hospital) for hospital in options.hospitals]
    _check_different([config.site.name for config, _ in found])
    _check_count(plan, len(found))
    return [_frozen(config, dataset, plan, crew, note) for config, dataset in found]


def _configured(hospital: Hospital) -> tuple[SiteConfig, str]:
    config = load_config(hospital.config, datasets_here=False)
    if hospital.dataset:
        config.present(hospital.dataset)
        return config, hospital.dataset
    if len(config.datasets) > 1:
        raise ConfigError(
            "a site with several datasets needs one of them named",
            value=", ".join(sorted(config.datasets)),
            fix="Give --site site.toml:DATASET", where=config.site.name,
        )  # fmt: skip
    name = next(iter(config.datasets))
    config.present(name)
    return config, name


def _check_different(names: Sequence[str]) -> None:
    double = [name for name, count in Counter(names).items() if count > 1]
    if double:
        raise ConfigError(
            "the sites of a study must have different names", value=double[0],
            fix="Give each site.toml a name of its own", where="site.name",
        )  # fmt: skip


def _frozen(
    config: SiteConfig, dataset: str, plan: Plan, crew: Preparers, note: Note
) -> PreparedSite:
    try:
        return prepare_cohort(
            config, dataset, "latest", plan, secret=site_secret(config.site.state),
            cache=cache_folder(config), crew=crew, note=note,
        )  # fmt: skip
    except DataError as error:
        where = f"{config.site.name}, {error.where or dataset}"
        raise DataError(error.rule, value=error.value, fix=error.fix, where=where) from None
