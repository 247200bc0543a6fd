"""Can these images serve this plan: each question answered both ways, each figure worked out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fedward.dp.accounting import calibrate
from fedward.models import build_model, describe
from fedward_client.cohort.check import (
    Cost,
    Room,
    activation_bytes,
    check_plan,
    cost_findings,
    prepared_bytes,
    privacy_finding,
    training_bytes,
)
from fedward_client.config import DatasetSection
from fedward_client.data.channels import ChannelImage, Part
from fedward_client.data.prepare import prepare
from fedward_client.data.sample import Image, LeftOut, Sample

RNG = np.random.default_rng(0)
PRIVATE = {"mechanism": "dp-sgd", "epsilon": 8.0, "delta": 1e-3, "clipping_norm": 1.0}


def chests(patients=40, images=1, side=20, low=0.0):
    made = []
    for k in range(patients * images):
        values = (low + RNG.random((1, side, side))).astype(np.float32)
        made.append(
            Sample(f"p{k // images}", lambda v=values: Image(v, (1.0, 1.0)), (k // images % 2,))
        )
    return made


@pytest.fixture
def dataset(tmp_path):
    return DatasetSection(root=tmp_path, task="classification", classes=("no", "yes"))


@pytest.fixture
def checked(tmp_path, dataset, make_plan):
    def run(
        samples, dataset=dataset, modality="", measure=False, left_out=(), every=False, **changes
    ):
        plan = make_plan(**{"split": {"given": False}, **changes})
        words = [modality] * len(samples)
        made = check_plan(
            "chest",
            "",
            dataset,
            samples,
            words,
            plan,
            Room(tmp_path, "cpu"),
            measure=measure,
            every=every,
            left_out=left_out,
        )
        return made, {one.name: one for one in made.findings}

    return run


def test_what_fits_is_said_to_fit(checked):
    made, found = checked(chests())
    assert made.can_serve
    assert {one.status for one in made.findings if one.name != "privacy"} == {"pass"}
    assert made.patients == {"train": 28, "validation": 4, "test": 8}
    assert made.patients_by_class == {"no": 20, "yes": 20}
    assert found["privacy"].status == "warn" and made.privacy is None
    assert all(one.fix for one in made.findings if one.status != "pass")


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"task": {"classes": ["yes", "no"]}}, "classes", "order"),
        ({"task": {"classes": ["no", "maybe"]}}, "classes", "plan's names"),
        ({"task": {"multi_label": True}, "training": {"loss": "bce"}}, "task", "another dataset"),
        (
            {
                "preprocessing": {"size": [1024, 8]},
                "model": {"name": "densenet121", "channels": None},
            },
            "model",
            "larger",
        ),
        ({"participation": {"minimum_patients": 41}}, "patients", "more patients"),
    ],
)
def test_what_does_not_fit_fails_with_a_next_step(checked, changes, name, words):
    made, found = checked(chests(), **changes)
    assert not made.can_serve
    assert found[name].status == "fail" and words in found[name].fix


def test_what_the_reader_left_out_is_counted(checked):
    left_out = [LeftOut("no image", "DOE"), LeftOut("no image", "a"), LeftOut("no mask", "b")]
    made, found = checked(chests(), left_out=left_out)
    assert made.can_serve
    assert (found["left out"].status, found["left out"].found) == (
        "warn",
        "no image: 2, no mask: 1",
    )
    assert "left out" not in checked(chests())[1]


def test_modalities_that_the_plan_refuses_are_left_out(checked):
    made, found = checked(chests(), modality="MR", task={"modality": ["CT"]})
    assert found["modality"].status == "fail" and not made.can_serve
    made, found = checked(chests(), modality="CT", task={"modality": ["CT"]})
    assert found["modality"].status == "pass" and made.can_serve


def test_a_dataset_without_anything_usable_cannot_serve(checked):
    made, found = checked([], modality="CT", task={"modality": ["CT"]})
    assert not made.can_serve
    assert found["samples"].status == "fail" and "report" in found["samples"].fix
    assert checked(chests())[1]["samples"].status == "pass"


def test_the_sites_own_minimum_counts_too(checked, dataset):
    strict = dataset.model_copy(update={"minimum_patients": 41})
    _, found = checked(chests(), dataset=strict)
    assert found["patients"].status == "fail"
    assert found["patients of each class"].status == "warn"
    _, found = checked([s for s in chests() if s.label == (0,)])
    assert found["patients of each class"].status == "fail"
    assert "yes" in found["patients of each class"].fix


def test_small_images_and_a_window_beside_them_are_warned_of(checked):
    made, found = checked(chests(side=12), preprocessing={"window": [100.0, 200.0]})
    assert found["image size"].found.startswith("16 of 16")
    assert found["image size"].status == found["window"].status == "warn"
    assert made.can_serve
    spaced = {"spacing": [2.0, 2.0]}  # 20 pixels of 1 mm are 10 of 2 mm
    assert checked(chests(), preprocessing=spaced)[1]["image size"].status == "warn"


def test_the_budget_is_what_the_accountant_says(make_plan):
    plan = make_plan(privacy=PRIVATE)
    one, budget = privacy_finding(plan, 28, 40)
    mechanism = calibrate(plan, 28)
    assert one.status == "pass"
    assert budget.noise_multiplier == mechanism.noise_multiplier
    assert (budget.sampling_rate, budget.steps) == (8 / 28, 2 * 4)  # ceil(28 / 8) a round
    assert 0.95 * 8 <= budget.epsilon <= 8
    # Independently, by another accountant's bound.
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(budget.noise_multiplier, budget.sampling_rate, budget.steps)]
    assert budget.epsilon <= accountant.get_epsilon(1e-3) <= 1.5 * budget.epsilon
    loose, _ = privacy_finding(make_plan(privacy=PRIVATE | {"delta": 0.1}), 28, 40)
    assert loose.status == "warn" and "delta" in loose.fix
    whole, _ = privacy_finding(make_plan(privacy=PRIVATE | {"sampling_rate": 1.0}), 28, 40)
    assert whole.status == "warn" and "sampling_rate" in whole.fix


def test_bytes_are_worked_out(make_plan):
    plan = make_plan()
    assert prepared_bytes(plan, 40) == 40 * (16 * 16 * 4 + 8)
    p = describe(plan).parameters
    # Weights, gradients, two moments of AdamW, a batch of eight.
    assert training_bytes(plan, 8) == 4 * (p + p + 2 * p + 8 * 256)
    private = make_plan(privacy=PRIVATE, training={"optimizer": "sgd"})
    # A gradient of each of the eight images and their sum; one number of SGD's.
    assert training_bytes(private, 8) == 4 * (p + 9 * p + p + 8 * 256)


def test_a_machine_without_room_fails():
    cost = Cost(
        prepared_bytes=10**9,
        free_disk_bytes=10**8,
        parameters=1,
        training_bytes=10**10,
        memory_bytes=10**9,
        device="cpu",
        steps=100,
        seconds_per_step=2.0,
        seconds=200.0,
    )
    found = {one.name: one for one in cost_findings(cost)}
    assert found["disk"].status == found["memory"].status == "fail"
    assert "3 min" in found["time"].found and "1 GB" in found["disk"].found


@pytest.mark.integration
@pytest.mark.parametrize("private", [False, True])
def test_time_comes_from_real_steps(checked, private):
    more = {"privacy": PRIVATE} if private else {}
    made, found = checked(chests(), measure=True, **more)
    cost = made.cost
    assert cost.steps == 2 * (4 if private else round(28 / 8))
    assert cost.seconds == pytest.approx(cost.steps * cost.seconds_per_step)
    assert 0 < cost.seconds_per_step < 5
    assert found["time"].status == "pass"


@pytest.mark.integration
def test_stages_are_timed_each(checked):
    stages = [
        {"name": "head", "rounds": 1, "learning_rate": 0.1, "train": ["fc*"]},
        {"name": "all", "rounds": 2, "learning_rate": 0.1},
    ]
    training = {"rounds": None, "learning_rate": None}
    made, _ = checked(chests(), measure=True, stages=stages, training=training)
    assert made.cost.steps == 3 * round(28 / 8) and made.cost.seconds > 0
    stages[0]["train"] = ["head*"]
    made, found = checked(chests(), stages=stages, training=training)
    assert found["model"].status == "fail" and "fc" in found["model"].fix


def test_masks_are_looked_at(checked, tmp_path):
    lungs = DatasetSection(root=tmp_path, task="segmentation", classes=("lung", "heart"))
    image = Image(RNG.random((1, 20, 20)).astype(np.float32), (1.0, 1.0))
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 1
    samples = [Sample(f"p{k}", lambda: image, mask=lambda: mask) for k in range(20)]
    samples[0] = Sample("p0", lambda: image, mask=lambda: mask[:-1])
    made, found = checked(
        samples,
        dataset=lungs,
        task={"kind": "segmentation", "classes": ["lung", "heart"]},
        model={"name": "unet", "channels": [4, 8]},
        training={"loss": "dice_ce"},
        metrics={"report": ["dice"], "primary": "dice"},
    )
    assert found["masks"].status == "warn" and "heart" in found["masks"].fix
    assert "shape of mask differs: 1" in found["preprocessing"].found
    assert "resize = true in [datasets.NAME.masks]" in found["preprocessing"].fix
    assert made.cost.prepared_bytes == 20 * (256 * 4 + 256)


def test_a_check_says_how_many_images_it_did_not_try_and_tries_all_where_asked(checked):
    samples = chests()
    spoilt = [place for place in range(len(samples)) if place % 5 == 4]
    for place in spoilt:
        samples[place] = Sample(f"p{place}", lambda: Image(np.full((1, 1, 1), np.nan)), (0,))
    some = checked(samples)[1]["preprocessing"].found
    assert some.endswith("; 24 of 40 were not tried, --all tries each")
    assert " of 16 images that were tried could be prepared" in some
    found = checked(samples, every=True)[1]
    told = found["preprocessing"].found
    assert told.startswith("32 of 40 images that were tried could be prepared; ")
    assert "not tried" not in told and sum(map(int, re.findall(r": (\d+)", told))) == len(spoilt)
    assert "of 32 are smaller" in found["image size"].found
    few = checked(chests(patients=12))[1]["preprocessing"].found
    assert few == "12 of 12 images that were tried could be prepared"


def corners(lesions):
    """Volumes of 24 x 24 x 24 mm, each with a lesion of 2 mm that begins at a corner."""
    made = []
    for k, corner in enumerate(lesions):
        values, mask = RNG.random((1, 24, 24, 24)).astype(np.float32), np.zeros((24,) * 3, np.uint8)
        mask[tuple(slice(c, c + 2) for c in corner)] = 1
        made.append(
            Sample(
                f"p{k}",
                lambda v=values: Image(v, (1.0, 1.0, 1.0)),
                mask=lambda m=mask: m,
            )
        )
    return made


def test_foreground_that_the_plan_cuts_off_is_told_with_settings_that_keep_it(
    checked, tmp_path, make_plan
):
    lesions = [(11, 11, 11), (3, 11, 11), (0, 0, 0), (11, 20, 2)]
    dataset = DatasetSection(
        root=tmp_path, task="segmentation", dimensions=3, classes=("lesion",), minimum_patients=1
    )
    changes = {
        "task": {"kind": "segmentation", "dimensions": 3, "classes": ["lesion"]},
        "model": {"name": "unet"},
        "training": {"loss": "dice_ce"},
        "metrics": {"report": ["dice"], "primary": "dice"},
    }

    def ask(**preprocessing):
        plan = changes | {"preprocessing": {"size": [16, 16, 16], **preprocessing}}
        return checked(corners(lesions), dataset=dataset, **plan)[1]

    found = ask(spacing=[1.0, 1.0, 1.0])["foreground"]
    assert found.status == "warn"
    assert found.found.startswith("2 of 4 masks lose all") and "; 3 lose some" in found.found
    assert "size = [24, 24, 24]" in found.fix and "spacing = [1.5, 1.5, 1.5]" in found.fix
    assert "foreground" not in ask(spacing=[1.5, 1.5, 1.5])
    assert "foreground" not in ask(spacing=[1.0, 1.0, 1.0], size=[24, 24, 24])
    assert "foreground" not in ask(resize="fit")
    plan = make_plan(
        split={"given": False},
        **changes | {"preprocessing": {"size": [16, 16, 16], "spacing": [1.0, 1.0, 1.0]}},
    )
    assert prepare("st-mary", corners(lesions), plan).cut == 2


def test_a_patch_is_held_against_the_sizes_of_the_images(checked, tmp_path):
    places = [(11, 11, 11), (3, 11, 11), (0, 0, 0), (11, 20, 2)]
    dataset = DatasetSection(
        root=tmp_path, task="segmentation", dimensions=3, classes=("lesion",), minimum_patients=1
    )

    def ask(side):
        return checked(
            corners(places),
            dataset=dataset,
            measure=side == 16,
            task={"kind": "segmentation", "dimensions": 3, "classes": ["lesion"]},
            model={"name": "unet", "channels": [4, 8]},
            training={"loss": "dice_ce"},
            metrics={"report": ["dice"], "primary": "dice"},
            preprocessing={"size": [side] * 3, "patch": {}},
        )

    made, found = ask(16)
    assert found["image size"].status == "pass"
    assert "0 of 4 are smaller than a patch of 16 x 16 x 16" in found["image size"].found
    assert made.cost.prepared_bytes == 4 * 24**3 * (4 + 1 + 1)  # pixels and two masks
    assert made.cost.seconds is not None
    _, found = ask(32)
    assert found["image size"].status == "warn"
    assert "4 fit into one patch" in found["image size"].found
    assert "smaller preprocessing.size" in found["image size"].fix


def test_what_a_step_keeps_of_its_images_is_what_autograd_keeps(make_plan):
    plan = make_plan(
        task={"kind": "segmentation", "dimensions": 3, "classes": ["lesion"]},
        preprocessing={"size": [32, 32, 32]},
        model={"name": "unet"},
        training={"loss": "dice_ce"},
        metrics={"report": ["dice"], "primary": "dice"},
    )
    model, found = build_model(plan, seed=0).train(), {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(4, 1, 32, 32, 32)).sum()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = sum(size for place, size in found.items() if place not in weights)
    assert activation_bytes(plan, 4) == pytest.approx(real, rel=0.05)
    assert activation_bytes(plan, 1) == pytest.approx(real / 4, rel=0.05)
    assert real > 5 * training_bytes(plan, 4) - 16 * describe(plan).parameters


def test_images_without_a_spacing_are_told_where_the_plan_resamples(checked):
    def chest(k):
        values = RNG.random((1, 20, 20)).astype(np.float32)
        return lambda: Image(values, (1.0, 1.0), measured=k % 2 > 0)

    samples = [Sample(f"p{k}", chest(k), (k // 2 % 2,)) for k in range(12)]
    found = checked(samples, preprocessing={"spacing": [1.0, 1.0]})[1]["spacing"]
    assert found.status == "warn" and found.found.startswith("6 of 12 images state no spacing")
    assert "spacing" not in checked(samples)[1]


AGE = {"name": "age", "kind": "number", "unit": "years", "range": [0, 100], "missing": True}


@pytest.mark.parametrize(
    ("own", "ages", "status", "words"),
    [
        ({"age": {"unit": "years"}}, ["50", "", "60", "70"], "pass", "given: 30, missing: 10"),
        ({"AGE": {}}, ["50"] * 4, "warn", "states no unit"),
        ({"age": {"unit": "years"}}, ["500", "50", "50", "50"], "warn", "plan's range: 10"),
        ({"age": {"unit": "years"}}, ["600"] * 4, "fail", "plan's range: 40"),
        ({"age": {"unit": "months"}}, ["600"] * 4, "fail", "here it is in months"),
        ({"age": {"unit": "years"}}, None, "fail", "the frozen cohort has none"),
        ({}, ["50"] * 4, "fail", "does not give it"),
    ],
)
def test_each_column_of_the_plan_s_table_is_looked_at(checked, dataset, own, ages, status, words):
    samples = [
        replace(sample, columns={"age": ages[k % 4]} if ages else {})
        for k, sample in enumerate(chests())
    ]
    dataset = dataset.model_validate({**dataset.model_dump(exclude_defaults=True), "table": own})
    made, found = checked(samples, dataset, table={"column": [AGE]}, measure=status == "pass")
    assert found["column age"].status == status
    assert words in found["column age"].found
    assert made.can_serve == (status != "fail")
    assert not made.can_serve or made.cost.training_bytes


FLAIR, POST = {"name": "flair"}, {"name": "post", "missing": "drop"}
OWN = {"flair": {"plane": 0}, "post": {"plane": 1, "missing": "gone"}}


@pytest.mark.parametrize(
    ("own", "lacking", "channels", "status", "words"),
    [
        (OWN, (), [FLAIR, POST], "pass", "flair: 40, post: 40; 0 are left out"),
        (OWN, ("post",), [FLAIR, POST], "warn", "flair: 40, post: 30; 0 are left out"),
        (OWN, ("flair",), [FLAIR, POST], "warn", "flair: 30, post: 40; 10 are left out"),
        (OWN, ("flair", "post"), [FLAIR, {"name": "t2"}], "fail", "the plan t2"),
        ({}, (), [FLAIR, POST], "warn", "taken for flair, post, in this order"),
    ],
)
def test_the_channels_of_a_dataset_are_counted(
    checked, dataset, own, lacking, channels, status, words
):
    samples = []
    for k, sample in enumerate(chests()):
        values = RNG.random((2, 20, 20)).astype(np.float32)
        read = KnownImage(values.tobytes())
        names = [n for n in ("flair", "post") if k % 4 or n not in lacking]
        parts = tuple(Part(name, read, OWN[name]["plane"]) for name in names)
        load = ChannelImage(parts) if own else read
        samples += [replace(sample, load=load)] if parts else []
    dataset = dataset.model_validate({**dataset.model_dump(exclude_defaults=True), "channels": own})
    made, found = checked(
        samples, dataset, preprocessing={"channels": 2, "channel": channels}, measure=True
    )
    assert found["channels"].status == status
    assert words in found["channels"].found
    assert made.can_serve == (status != "fail")
    assert not made.can_serve or made.cost.seconds > 0


@dataclass(frozen=True)
class KnownImage:
    content: bytes

    def __call__(self):
        return Image(np.frombuffer(self.content, np.float32).reshape(2, 20, 20), (1.0, 1.0))
