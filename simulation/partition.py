"""Divide one dataset among sites, by patient: as the data lies, or with a made skew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from client.data.types import Sample
from simulation.rule import Partition, parse_partition, partition_error
from simulation.skew import assign

__all__ = ["Partition", "parse_partition", "partition"]

# Not of the table: how a reader says that images are made up.
_INTERNAL = "synthetic"

Sites = dict[str, tuple[Sample, ...]]


def partition(samples: Sequence[Sample], how: str, sites: int, seed: int) -> Sites:
    """Divide samples among sites; all images of a patient go to one site.

    Parameters
    ----------
    samples : sequence of Sample
        The whole dataset.
    how : str
        ``folders``: by the sub-folder; ``column:NAME``: by a column of the label table;
        ``iid``: alike; ``dirichlet:ALPHA``: each class in other shares (Hsu et al., 2019);
        ``shards:K``: K runs of the patients sorted by label (McMahan et al., 2017);
        ``quantity:ALPHA``: alike but of unequal size (Li et al., 2022).
    sites : int
        Number of sites to make; ``folders`` and ``column`` have as many as there are.
    seed : int
        Same seed, same division, whatever the order of the samples.

    Returns
    -------
    dict
        Site name to its samples, in the order given. Made sites are ``site-1``, ``site-2``, ...
        A division that the data brings is kept: each part of it is cut in the same shares.

    Raises
    ------
    DataError
        The text is no known partition, the data lacks what it needs, or no division among 1000
        gave each site a share of the patients.
    """
    rule = parse_partition(how)
    if not samples:
        raise partition_error("there must be images to divide", fix="Check what was left out")
    if rule.kind == "folders":
        return _natural(samples, lambda sample: sample.site, "sub-folder of a hospital")
    if rule.kind == "column":
        _check_column(samples, rule.column or "")
        name = rule.column or ""
        return _natural(samples, lambda sample: sample.columns.get(name, ""), f"value of `{name}`")
    site_of = assign(samples, rule, sites, seed)
    made: dict[str, list[Sample]] = {f"site-{i + 1}": [] for i in range(sites)}
    for sample in samples:
        made[f"site-{site_of[sample.patient] + 1}"].append(sample)
    return {site: tuple(found) for site, found in made.items()}


def _natural(samples: Sequence[Sample], name: Callable[[Sample], str], what: str) -> Sites:
    places: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        places[sample.patient].add(name(sample))
    if homeless := sum("" in at for at in places.values()):
        fix = "Complete the data, or choose another partition"
        raise partition_error(f"every patient needs a {what}", f"{homeless} without", fix)
    if astray := sum(len(at) > 1 for at in places.values()):
        fix = "Give different patients different ids, or choose another partition"
        raise partition_error(f"a patient's images must share one {what}", f"{astray} do not", fix)
    by_site: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_site[name(sample)].append(sample)
    return {site: tuple(by_site[site]) for site in sorted(by_site)}


def _check_column(samples: Sequence[Sample], name: str) -> None:
    known = {column for sample in samples for column in sample.columns}
    if name not in known:
        known.discard(_INTERNAL)
        fix = (
            f"Choose one of {', '.join(sorted(known))}"
            if known
            else "Give a label table with columns"
        )
        raise partition_error("the label table must have the column", name, fix)
