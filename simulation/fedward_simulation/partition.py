"""Divide one dataset among sites, by patient: as the data lies, or with a made skew."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedward.errors import DataError
from fedward.tasks.base import Floats, Ints
from fedward_client.data.sample import SPLITS, Sample

# Made partitions: which patient goes to which site, alike or with a skew.

DRAWS = 1000
# Patients that a site should have at least; fewer only where there are too few in all.
ENOUGH = 10

Label = tuple[int, ...]
Groups = dict[Hashable, list["Patient"]]


@dataclass(frozen=True)
class Patient:
    """What a division goes by.

    Attributes
    ----------
    key : str
        Patient key of the samples.
    label : tuple of int or None
        The label that most of the patient's images carry; the higher one of two as frequent.
    split : str or None
        The part of a division that the data brings.
    """

    key: str
    label: Label | None
    split: str | None


def assign(samples: Sequence[Sample], rule: Partition, sites: int, seed: int) -> dict[str, int]:
    """Give each patient the number of a site, from 0.

    Raises
    ------
    DataError
        There are too few patients or no labels, or none of 1000 divisions gave each site enough.
    """
    patients = _patients(samples)
    if not 0 < sites <= len(patients):
        fix = f"Choose 1 to {len(patients)}, the patients there are"
        raise partition_error("each site needs a patient of its own", sites, fix)
    _check(patients, rule, sites)
    random = np.random.default_rng(seed)
    for _ in range(DRAWS):
        site_of = _draw(patients, rule, sites, random)
        if _fair(patients, site_of, sites):
            return site_of
    found = f"{len(patients)} patients for {sites} sites"
    fix = "Raise ALPHA, lower K or the number of sites, or bring more patients"
    must = f"each site needs patients in each part, and {DRAWS} draws failed"
    raise partition_error(must, found, fix)


def _patients(samples: Sequence[Sample]) -> list[Patient]:
    images: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        images[sample.patient].append(sample)
    return [Patient(key, _label(of), _split(of)) for key, of in sorted(images.items())]


def _label(images: Sequence[Sample]) -> Label | None:
    seen = Counter(image.label for image in images if image.label is not None)
    return max(seen, key=lambda label: (seen[label], label), default=None)


def _split(images: Sequence[Sample]) -> str | None:
    return min((i.split for i in images if i.split), key=SPLITS.index, default=None)


def _check(patients: Sequence[Patient], rule: Partition, sites: int) -> None:
    if rule.kind in ("dirichlet", "shards") and any(p.label is None for p in patients):
        fix = "Masks and boxes are no labels: choose iid, quantity:ALPHA, folders or column:NAME"
        raise partition_error(f"{rule.kind} divides by label, so every patient needs one", fix=fix)
    if rule.shards is not None and sites * rule.shards > len(patients):
        fix = f"Lower K to {len(patients) // sites} or less"
        raise partition_error("each shard needs a patient", f"{sites * rule.shards} shards", fix)


def _fair(patients: Sequence[Patient], site_of: dict[str, int], sites: int) -> bool:
    enough = max(1, min(ENOUGH, len(patients) // (3 * sites)))
    everyone = _per_site(patients, site_of, sites)
    parts = _group(patients, lambda p: p.split).values()
    return min(everyone) >= enough and all(
        min(_per_site(part, site_of, sites)) > 0 for part in parts if len(part) >= sites
    )


def _per_site(patients: Sequence[Patient], site_of: dict[str, int], sites: int) -> list[int]:
    seen = Counter(site_of[p.key] for p in patients)
    return [seen[site] for site in range(sites)]


def _group(patients: Sequence[Patient], by: Callable[[Patient], Hashable]) -> Groups:
    groups: Groups = defaultdict(list)
    for patient in patients:
        groups[by(patient)].append(patient)
    return groups


def _draw(
    patients: Sequence[Patient], rule: Partition, sites: int, random: np.random.Generator
) -> dict[str, int]:
    shuffled = [patients[i] for i in random.permutation(len(patients))]
    if rule.shards is not None:
        return _deal(shuffled, sites, rule.shards, random)
    site_of: dict[str, int] = {}
    kinds = _group(shuffled, lambda p: p.label if rule.kind == "dirichlet" else None)
    for kind in kinds.values():
        shares = _shares(rule.alpha, sites, random)
        for part in _group(kind, lambda p: p.split).values():
            site_of.update(zip((p.key for p in part), _cut(len(part), shares), strict=True))
    return site_of


def _shares(alpha: float | None, sites: int, random: np.random.Generator) -> Floats:
    if alpha is None:
        return np.full(sites, 1 / sites)
    return random.dirichlet(np.full(sites, alpha))


def _cut(n: int, shares: Floats) -> list[int]:
    """The site of each of ``n`` patients in a row, cut in these shares."""
    ends = np.rint(np.cumsum(shares)[:-1] * n)
    places: list[int] = np.searchsorted(ends, np.arange(n), side="right").tolist()
    return places


def _deal(
    shuffled: Sequence[Patient], sites: int, each: int, random: np.random.Generator
) -> dict[str, int]:
    """Sort by label, cut into ``sites * each`` shards, deal ``each`` of them to every site."""
    owner: Ints = random.permutation(sites * each) // each
    site_of: dict[str, int] = {}
    for part in _group(shuffled, lambda p: p.split).values():
        by_label = sorted(part, key=lambda p: p.label or ())
        shards = np.array_split(np.arange(len(part)), sites * each)
        for site, shard in zip(owner.tolist(), shards, strict=True):
            site_of.update({by_label[i].key: site for i in shard})
    return site_of


# How a partition is written: ``folders``, ``iid``, ``dirichlet:0.5`` and so on.

Kind = Literal["folders", "iid", "dirichlet", "shards", "quantity", "column"]
FORMS = "folders, iid, dirichlet:ALPHA, shards:K, quantity:ALPHA or column:NAME"


@dataclass(frozen=True)
class Partition:
    """How patients are divided among sites; see :func:`parse_partition`.

    Attributes
    ----------
    kind : str
        The first word.
    alpha : float or None
        Concentration of the Dirichlet distribution: small is uneven.
    shards : int or None
        Shards that each site takes.
    column : str or None
        Column of the label table whose values are the sites.
    """

    kind: Kind
    alpha: float | None = None
    shards: int | None = None
    column: str | None = None


def parse_partition(text: str) -> Partition:
    """Read ``folders``, ``iid``, ``dirichlet:0.5``, ``shards:2``, ``quantity:1``, ``column:A``.

    Raises
    ------
    DataError
        It is none of these, or its number is not above 0.
    """
    how, colon, value = text.partition(":")
    match how, colon:
        case (("folders" | "iid"), ""):
            return Partition(how)
        case (("dirichlet" | "quantity"), ":"):
            return Partition(how, alpha=_above_zero(text, value))
        case "shards", ":":
            return Partition(how, shards=_whole(text, value))
        case "column", ":" if value.strip():
            return Partition(how, column=value.strip())
    raise _unknown("a partition must have a known form", text)


def _above_zero(text: str, value: str) -> float:
    try:
        alpha = float(value)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise _unknown("ALPHA must be a number above 0", text)
    return alpha


def _whole(text: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and int(value[:9]) > 0 and len(value) < 9):
        raise _unknown("K must be a whole number above 0", text)
    return int(value)


def _unknown(rule: str, text: str) -> DataError:
    return partition_error(rule, text, f"Write {FORMS}")


def partition_error(rule: str, value: object = None, fix: str = "") -> DataError:
    """The error for a partition that cannot be made."""
    return DataError(rule, value=value, fix=fix, where="partition")


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
