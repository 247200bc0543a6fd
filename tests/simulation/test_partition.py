"""Dividing a dataset among sites: what must hold for every rule, and what each one is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.errors import DataError
from fedward_client.data.sample import Image, Sample, SplitName
from fedward_simulation.partition import Partition, parse_partition, partition

FORMS = "folders, iid, dirichlet:ALPHA, shards:K, quantity:ALPHA or column:NAME"
MADE = ("iid", "dirichlet:0.5", "dirichlet:5", "shards:2", "quantity:1")


def no_image() -> Image:
    raise DataError("a division must not read images")


def sample(patient: int, label: int | None = 0, site: str = "", **more: object) -> Sample:
    flags = None if label is None else (label,)
    return Sample(f"p{patient:04}", no_image, label=flags, site=site, **more)  # type: ignore[arg-type]


def dataset(patients: int, seed: int = 0, labels: bool = True, given: bool = False) -> list[Sample]:
    """One to three images a patient, three patients in ten of class 1."""
    random = np.random.default_rng(seed)
    parts: tuple[SplitName, ...] = ("train", "train", "train", "validation", "test")
    return [
        sample(p, int(p // 5 % 10 < 3) if labels else None, split=parts[p % 5] if given else None)
        for p in range(patients)
        for _ in range(random.integers(1, 4))
    ]


def patients_of(samples: Sequence[Sample]) -> set[str]:
    return {s.patient for s in samples}


@pytest.mark.parametrize("how", MADE)
@given(patients=st.integers(60, 200), sites=st.integers(1, 5), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_every_image_once_and_no_patient_twice(
    how: str, patients: int, sites: int, seed: int
) -> None:
    samples = dataset(patients, seed)
    found = partition(samples, how, sites, seed)
    assert list(found) == [f"site-{i + 1}" for i in range(sites)]
    together = [s for of in found.values() for s in of]
    assert Counter(map(id, together)) == Counter(map(id, samples))
    assert sum(len(patients_of(of)) for of in found.values()) == patients
    assert min(len(patients_of(of)) for of in found.values()) >= min(10, patients // (3 * sites))


@pytest.mark.parametrize("how", MADE)
def test_same_seed_same_division_whatever_the_order(how: str) -> None:
    samples = dataset(100)
    first = partition(samples, how, 4, 7)
    again = partition(samples[::-1], how, 4, 7)
    assert {k: patients_of(v) for k, v in first.items()} == {
        k: patients_of(v) for k, v in again.items()
    }
    other = partition(samples, how, 4, 8)
    assert any(patients_of(first[site]) != patients_of(other[site]) for site in first)


@pytest.mark.parametrize("how", MADE)
def test_a_given_division_reaches_every_site_in_the_same_shares(how: str) -> None:
    found = partition(dataset(400, given=True), how, 4, 3)
    for samples in found.values():
        parts = Counter({s.patient: s.split for s in samples}.values())
        share = {part: n / parts.total() for part, n in parts.items()}
        assert share["train"] == pytest.approx(0.6, abs=0.12)
        assert share["validation"] == pytest.approx(0.2, abs=0.1)
        assert share["test"] == pytest.approx(0.2, abs=0.1)


def shares_of_one(found: dict[str, tuple[Sample, ...]]) -> list[float]:
    return [float(np.mean([s.label == (1,) for s in of])) for of in found.values()]


def sizes(found: dict[str, tuple[Sample, ...]]) -> list[int]:
    return [len(patients_of(of)) for of in found.values()]


def test_the_smaller_alpha_the_more_labels_differ() -> None:
    samples = dataset(600)
    spread = {
        how: np.mean([np.std(shares_of_one(partition(samples, how, 4, seed))) for seed in range(8)])
        for how in ("dirichlet:0.3", "dirichlet:3", "iid")
    }
    assert spread["dirichlet:0.3"] > 2 * spread["dirichlet:3"] > 2 * spread["iid"]


def test_dirichlet_shares_have_the_variance_of_the_distribution() -> None:
    """A site's share of a class has mean 1/n and variance (n - 1) / (n^2 (n alpha + 1))."""
    samples = [sample(p, p % 2) for p in range(1000)]
    alpha, sites = 5.0, 4
    shares = np.concatenate(
        [
            np.array([sum(s.label == (1,) for s in of) for of in found.values()]) / 500
            for found in (partition(samples, f"dirichlet:{alpha}", sites, i) for i in range(60))
        ]
    )
    wanted = (sites - 1) / (sites**2 * (sites * alpha + 1))
    assert shares.mean() == pytest.approx(0.25)
    assert shares.var() == pytest.approx(wanted, rel=0.3)


def test_iid_sites_are_equally_large_and_alike() -> None:
    found = partition(dataset(601), "iid", 4, 0)
    assert max(sizes(found)) - min(sizes(found)) <= 1
    assert shares_of_one(found) == pytest.approx([0.3] * 4, abs=0.1)


def test_quantity_changes_sizes_and_not_labels() -> None:
    found = partition(dataset(900, labels=True), "quantity:1", 4, 1)
    assert max(sizes(found)) > 2 * min(sizes(found))
    assert shares_of_one(found) == pytest.approx([0.3] * 4, abs=0.12)


def test_one_shard_each_gives_sites_of_one_class() -> None:
    samples = [sample(p, p // 50) for p in range(200)]
    found = partition(samples, "shards:1", 4, 5)
    assert sizes(found) == [50] * 4
    assert sorted({s.label for s in of} == {(k,)} for k, of in enumerate(found.values()))
    assert {frozenset(s.label for s in of) for of in found.values()} == {
        frozenset([(k,)]) for k in range(4)
    }


def test_the_label_of_a_patient_is_that_of_most_images() -> None:
    samples = [sample(p, label) for p in range(40) for label in (p % 2, p % 2, 1 - p % 2)]
    found = partition(samples, "shards:1", 2, 0)
    assert {frozenset(int(p[1:]) % 2 for p in patients_of(of)) for of in found.values()} == {
        frozenset([0]),
        frozenset([1]),
    }


def test_folders_and_columns_keep_their_names() -> None:
    samples = [
        sample(p, 0, site=("north", "south")[p % 2], columns={"scanner": f"type-{p % 3}"})
        for p in range(12)
        for _ in range(2)
    ]
    by_folder = partition(samples, "folders", 9, 0)
    assert {k: len(v) for k, v in by_folder.items()} == {"north": 12, "south": 12}
    by_column = partition(samples, "column:scanner", 9, 0)
    assert {k: len(v) for k, v in by_column.items()} == {"type-0": 8, "type-1": 8, "type-2": 8}
    with pytest.raises(DataError, match=r"must have the column .*Choose one of scanner"):
        partition(samples, "column:colour", 2, 0)


def test_natural_sites_need_every_patient_in_just_one() -> None:
    with pytest.raises(DataError, match=r"needs a sub-folder .*1 without"):
        partition([sample(1, site="north"), sample(2)], "folders", 2, 0)
    with pytest.raises(DataError, match=r"must share one sub-folder .*1 do not"):
        partition([sample(1, site="north"), sample(1, site="south")], "folders", 2, 0)
    partly = [sample(1, columns={"scanner": "a"}), sample(2, columns={"scanner": ""})]
    with pytest.raises(DataError, match="needs a value of `scanner`"):
        partition(partly, "column:scanner", 2, 0)
    with pytest.raises(DataError, match="Give a label table"):
        partition([sample(1)], "column:scanner", 2, 0)


@pytest.mark.parametrize("how", ["dirichlet:1", "shards:2"])
def test_segmentation_cannot_be_divided_by_label(how: str) -> None:
    with pytest.raises(
        DataError, match=r"divides by label.*Masks and boxes are no labels: choose iid"
    ):
        partition(dataset(50, labels=False), how, 3, 0)


@pytest.mark.parametrize("how", ["iid", "quantity:2"])
def test_segmentation_can_be_divided_otherwise(how: str) -> None:
    assert len(partition(dataset(50, labels=False), how, 3, 0)) == 3


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(DataError, match="a patient of its own"):
        partition(dataset(3), "iid", 4, 0)
    with pytest.raises(DataError, match="a patient of its own"):
        partition(dataset(3), "iid", 0, 0)
    with pytest.raises(DataError, match="there must be images"):
        partition([], "iid", 2, 0)
    with pytest.raises(DataError, match=r"each shard needs a patient .*Lower K to 2 or less"):
        partition(dataset(8), "shards:3", 4, 0)
    with pytest.raises(DataError, match=r"1000 draws failed.*Raise ALPHA"):
        partition(dataset(40), "dirichlet:0.001", 8, 0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("folders", Partition("folders")),
        ("iid", Partition("iid")),
        ("dirichlet:0.5", Partition("dirichlet", alpha=0.5)),
        ("dirichlet:1e1", Partition("dirichlet", alpha=10.0)),
        ("quantity:2", Partition("quantity", alpha=2.0)),
        ("shards:3", Partition("shards", shards=3)),
        ("column:scanner", Partition("column", column="scanner")),
        ("column:a:b", Partition("column", column="a:b")),
    ],
)
def test_every_form_is_read(text: str, wanted: Partition) -> None:
    assert parse_partition(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "x", "IID", "iid:", "iid:2", "folders:a", "dirichlet", "dirichlet:", "dirichlet:x"]
    + ["dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:inf", "quantity:", "shards"]
    + [
        "shards:0",
        "shards:-1",
        "shards:1.5",
        "shards:x",
        "shards:²",
        "column",
        "column:",
        "column: ",
    ],
)
def test_other_text_is_refused_with_the_allowed_forms(text: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_partition(text)
    assert caught.value.where == "partition"
    assert FORMS in str(caught.value)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(parse_partition(text), Partition)
    except DataError as error:
        assert FORMS in str(error)
