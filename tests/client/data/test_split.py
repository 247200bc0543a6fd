"""Division by patient: never across, the same every time, in the asked-for shares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.errors import DataError
from fedward.plan.schema import Split
from fedward_client.data.sample import SPLITS
from fedward_client.data.split import split_by_patient

ROOT = str(Path(__file__).parents[3])
IDS = st.text(min_size=1, max_size=6)


@st.composite
def cohorts(draw):
    patients = draw(st.lists(IDS, min_size=1, max_size=60))
    n = len(patients)
    given_ = draw(st.lists(st.sampled_from([None, *SPLITS]), min_size=n, max_size=n))
    strata = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    shares = draw(st.tuples(st.floats(0, 0.49), st.floats(0, 0.49)))
    split = Split(
        validation=shares[0],
        test=shares[1],
        seed=draw(st.integers(0, 99)),
        given=draw(st.booleans()),
    )
    return patients, given_, split, strata


def parts_of(patients, result):
    return {name: {patients[i] for i in result[name]} for name in SPLITS}


def attempt(patients, given_, split, strata):
    try:
        return split_by_patient(patients, given_, split, strata)
    except DataError as error:
        alone = len(set(patients)) == 1
        held_out = {p for p, g in zip(patients, given_, strict=True) if g in ("test", "validation")}
        assert alone or (split.given and held_out == set(patients)), str(error)
        return None


@given(cohorts())
@settings(deadline=None, max_examples=200)
def test_every_image_once_no_patient_twice_someone_to_train_on(cohort):
    patients, *_ = cohort
    result = attempt(*cohort)
    if result is None:
        return
    together = np.concatenate([result[name] for name in SPLITS])
    assert sorted(together) == list(range(len(patients)))
    assert all(array.dtype == np.int64 for array in result.values())
    parts = parts_of(patients, result)
    assert sum(len(p) for p in parts.values()) == len(set(patients))
    assert parts["train"]


@given(cohorts(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=200)
def test_the_order_of_the_images_does_not_matter(cohort, random):
    patients, given_, split, strata = cohort
    order = list(range(len(patients)))
    random.shuffle(order)
    one = attempt(patients, given_, split, strata)
    shuffled = [[values[i] for i in order] for values in (patients, given_, strata)]
    other = attempt(shuffled[0], shuffled[1], split, shuffled[2])
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert parts_of(patients, one) == parts_of(shuffled[0], other)


@given(
    n=st.integers(3, 200),
    validation=st.floats(0, 0.45),
    test=st.floats(0, 0.45),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=200)
def test_shares_and_classes(n, validation, test, seed):
    patients = [f"p{i}" for i in range(n)]
    strata = [i % 3 for i in range(n)]
    result = split_by_patient(
        patients, [None] * n, Split(validation=validation, test=test, seed=seed), strata
    )
    for name, share in (("validation", validation), ("test", test)):
        count = len(result[name])
        assert (count > 0) == (share > 0)
        assert abs(count - n * share) <= 1
        # Systematic sampling gives each class its share within one, or two for the second draw.
        for stratum in range(3):
            own = sum(strata[i] == stratum for i in result[name])
            assert abs(own - count * strata.count(stratum) / n) <= 2


def test_other_seeds_divide_otherwise():
    patients = [f"p{i}" for i in range(100)]
    results = [
        tuple(split_by_patient(patients, [None] * 100, Split(seed=s))["test"]) for s in range(5)
    ]
    assert len(set(results)) == 5


def test_the_same_in_a_process_with_another_hash_seed():
    program = (
        "from fedward_client.data.split import split_by_patient as s\n"
        "from fedward.plan.schema import Split\n"
        "p=[f'p{i}' for i in range(40)]\n"
        "print(s(p,[None]*40,Split(),[i%2 for i in range(40)])['test'].tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ROOT},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_given_parts_are_used_and_a_divided_patient_goes_to_the_test():
    patients = ["a", "a", "b", "c", "d"]
    given_ = ["train", "test", "validation", "train", "train"]
    result = split_by_patient(patients, given_, Split(given=True))
    assert {k: v.tolist() for k, v in result.items()} == {
        "test": [0, 1],
        "validation": [2],
        "train": [3, 4],
    }


def test_given_parts_are_ignored_unless_the_plan_wants_them():
    patients = [f"p{i}" for i in range(10)]
    plain = split_by_patient(patients, [None] * 10, Split())
    told = split_by_patient(patients, ["test"] * 10, Split())
    assert all((plain[k] == told[k]).all() for k in SPLITS)


def test_a_part_that_the_data_lacks_is_taken_from_training():
    patients = [f"p{i}" for i in range(20)]
    given_ = ["test"] * 5 + ["train"] * 15
    result = split_by_patient(patients, given_, Split(given=True, validation=0.2, test=0.5))
    assert result["test"].tolist() == [0, 1, 2, 3, 4]
    assert len(result["validation"]) == 3


def test_two_patients_leave_one_to_train_on():
    result = split_by_patient(["a", "b"], [None, None], Split())
    assert [len(result[k]) for k in SPLITS] == [1, 0, 1]


def test_one_patient_cannot_be_divided():
    with pytest.raises(DataError, match="at least two patients") as caught:
        split_by_patient(["SECRET"] * 9, [None] * 9, Split())
    assert "SECRET" not in str(caught.value)
    whole = split_by_patient(["a"], [None], Split(validation=0.0, test=0.0))
    assert whole["train"].tolist() == [0]


def test_nobody_left_to_train_on():
    with pytest.raises(DataError, match="patients to train on"):
        split_by_patient(["a", "b"], ["test", "validation"], Split(given=True))
