"""A finished study's model as one file: the network's arrays, and the plan that made them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fedward.errors import ModelError
from fedward.integrity import unreadable
from fedward.models.arrays import Arrays, from_arrays, load_model
from fedward.models.registry import build_model
from fedward.plan.load import from_canonical, plan_hash
from fedward.plan.schema import Plan


@dataclass(frozen=True)
class FinishedModel:
    """A model that can be used.

    Attributes
    ----------
    study : str
        The study's id; of a simulation, the name in its plan.
    which : str
        "shared" or "own".
    plan : Plan
        How it was made, and what its input must be.
    plan_sha256, sha256 : str
        Of the plan, and of the file.
    arrays : mapping
        Its arrays by name.
    about : mapping
        All that the file says of itself.
    """

    study: str
    which: str
    plan: Plan
    plan_sha256: str
    sha256: str
    arrays: Arrays
    about: Mapping[str, str]

    @property
    def synthetic(self) -> bool:
        """Whether the file says that it was trained on synthetic images."""
        return self.about.get("synthetic") == "true"

    def build(self) -> nn.Module:
        """The network with its weights, in evaluation mode, on the CPU.

        Raises
        ------
        ModelError
            The arrays are not those of the plan's network.
        """
        network = build_model(self.plan, 0)
        from_arrays(network, self.arrays)
        return network.eval()


def open_finished(path: Path) -> FinishedModel:
    """Read a model that a study delivered.

    Parameters
    ----------
    path : Path
        A safetensors file with :func:`fedward.integrity.about_model` in its metadata. A file of an
        earlier release names the hash of its plan alone: the plan is then read from ``plan.json``
        beside it.

    Raises
    ------
    ModelError
        The file cannot be read, or tells of no plan, or of another one than its hash is of.
    SchemaError
        The plan needs a newer release.
    """
    arrays, about = load_model(path)
    text = about.get("plan") or _beside(path)
    plan = from_canonical(text)
    told, found = about.get("plan_sha256", ""), plan_hash(plan)
    if told != found:
        raise ModelError(
            "a model's plan must have the SHA-256 that the file names",
            value=f"{found[:12]}…, not {told[:12] or 'none'}…",
            fix="Fetch the model again; the file or plan.json beside it is another one",
        )
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(error) from error
    return FinishedModel(
        study=about.get("study", plan.study.name),
        which=about.get("which", "shared"),
        plan=plan,
        plan_sha256=found,
        sha256=sha256,
        arrays=arrays,
        about=about,
    )


def _beside(path: Path) -> str:
    try:
        return path.with_name("plan.json").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise ModelError(
            "a model must come with its plan",
            value=path.name,
            fix="Deliver it again with this release, or put the study's plan.json beside it",
        ) from None
