"""Made partitions: which patient goes to which site, alike or with a skew."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from client.data.types import SPLITS, Sample
from fedward.metrics.checks import Floats, Ints
from simulation.rule import Partition, partition_error

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
        fix = "Segmentation has no labels: choose iid, quantity:ALPHA, folders or column:NAME"
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
