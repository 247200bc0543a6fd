"""The models of finished studies that a hospital may use: the shared one, and its own."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedward.errors import ModelError, OutputError, PolicyError, StudyError
from fedward.files import write_private
from fedward.integrity import about_model, check_model
from fedward.plan.schema import Plan
from fedward.signing import verify_model
from fedward.tensors import digest
from fedward_client.policy.settings import PolicySection

Which = Literal["shared", "own"]
WHICH: Final[tuple[Which, ...]] = ("shared", "own")
_FOLDER: Final = "models"


@dataclass(frozen=True)
class KeptModel:
    """One file.

    Attributes
    ----------
    study, name : str
        Id of the study, and the name in its plan.
    which : str
        The model that all hospitals have, or the one of this hospital.
    plan_hash, sha256 : str
        Of the plan, and of the file.
    bytes : int
        Of the file.
    """

    study: str
    name: str
    which: Which
    plan_hash: str
    sha256: str
    bytes: int


class KeptModels:
    """Models in a folder that only the site reads, one folder for each study.

    Parameters
    ----------
    state : Path
        The site's state folder.
    """

    def __init__(self, state: Path) -> None:
        self._folder = state / _FOLDER

    def keep(
        self, study: str, plan: Plan, which: Which, arrays: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write a model; one that is there is replaced.

        The file names its study and holds its plan, so that it can be used by itself.

        Raises
        ------
        OutputError
            There is no room.
        """
        about = about_model(study, plan, which)
        whole = {name: np.asarray(value, order="C") for name, value in arrays.items()}
        self._write(study, which, save(whole, about))

    def add(self, model: Path, policy: PolicySection, study: str | None = None) -> KeptModel:
        """Keep a model that somebody brought, after it was verified as one of a study.

        Parameters
        ----------
        model : Path
            The file that the aggregator delivered.
        policy : PolicySection
            Knows which coordinators the site accepts.
        study : str, optional
            Id of the study that it must be of.

        Raises
        ------
        ModelError
            It is not signed, or is none of the plan's network, or of another study.
        PolicyError
            The site does not accept its coordinator.
        StudyError
            Another model of the study is kept here.
        OutputError
            There is no room.
        """
        from fedward.models.finished import open_finished  # brings torch

        opened = open_finished(model)
        if study not in (None, opened.study):
            raise ModelError(
                "a model must be of the study that was asked for",
                value=opened.study,
                fix="Ask the coordinator for the other file, or name this study",
                where="--from",
            )
        coordinator = verify_model(opened.about, opened.arrays)
        if not policy.accepts(coordinator):
            raise PolicyError(
                "a model must come from a coordinator that policy.coordinators accepts",
                value=coordinator,
                fix="Compare the fingerprint with the coordinator's, and add it",
                where="policy.coordinators",
            )
        opened.build()  # its arrays are the network's
        for one in self.all():
            if (one.study, one.which) == (opened.study, "shared"):
                kept = open_finished(self._path(one.study, "shared"))
                if digest(kept.arrays) != digest(opened.arrays):
                    raise StudyError(
                        "a study has one shared model",
                        value=f"another one of {one.study} is kept",
                        fix="Ask the coordinator which is right, and remove the kept one first",
                    )
        # The very bytes, whose SHA-256 the study's model card names.
        self._write(opened.study, "shared", model.read_bytes())
        check_model(self._path(opened.study, "shared"), opened.sha256)
        return self.find(opened.study, "shared")

    def all(self) -> list[KeptModel]:
        """Every model, in the order of the studies' ids."""
        paths = sorted(self._folder.glob("*/*.safetensors"))
        return [self._read(path) for path in paths if path.stem in WHICH]

    def find(self, study: str, which: Which) -> KeptModel:
        """The model of a study.

        Raises
        ------
        StudyError
            There is no such model.
        """
        found = {one.which: one for one in self.all() if one.study == study}
        if which not in found:
            told = ", ".join(sorted(found)) or "none"
            raise StudyError(
                "a model must be kept here",
                value=f"{which} of {study}; kept of it: {told}",
                fix="See fedward-client model list",
            )
        return found[which]

    def path(self, study: str, which: Which | None) -> Path:
        """The file of a study's model; of none named, the hospital's own where there is one.

        Raises
        ------
        StudyError
            There is no such model.
        """
        if which is None:
            kept = {one.which for one in self.all() if one.study == study}
            which = "own" if "own" in kept else "shared"
        return self._path(study, self.find(study, which).which)

    def export(self, study: str, which: Which, out: Path) -> KeptModel:
        """Copy a model to a file.

        Raises
        ------
        StudyError
            There is no such model.
        OutputError
            The file is there already, or cannot be written.
        """
        found = self.find(study, which)
        if out.exists():
            raise OutputError(
                "an export replaces no file", value=out.name, fix="Choose another --out"
            )
        # Whole or not at all, and for its owner only: it was made of patients' images.
        write_private(out, self._path(study, which).read_bytes())
        check_model(out, found.sha256)
        return found

    def remove(self, study: str) -> int:
        """Remove all models of a study; gives how many there were.

        Raises
        ------
        StudyError
            None is kept.
        """
        found = [one for one in self.all() if one.study == study]
        if not found:
            raise StudyError(
                "a model must be kept here", value=study, fix="See fedward-client model list"
            )
        shutil.rmtree(self._of(study))
        return len(found)

    def _write(self, study: str, which: Which, content: bytes) -> None:
        try:
            folder = self._of(study)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                "the state folder must be writable",
                value=error.strerror,
                fix="Check space and rights of the state folder",
            ) from None
        write_private(self._path(study, which), content)

    def _path(self, study: str, which: Which) -> Path:
        return self._of(study) / f"{which}.safetensors"

    def _of(self, study: str) -> Path:
        # An id is checked by the protocol; here it comes from a command line too.
        return self._folder / hashlib.sha256(study.encode()).hexdigest()[:32]

    @staticmethod
    def _read(path: Path) -> KeptModel:
        try:
            with safe_open(path, framework="numpy") as file:
                about = dict(file.metadata() or {})
            with path.open("rb") as content:
                sha256 = hashlib.file_digest(content, "sha256").hexdigest()
            return KeptModel(
                study=about["study"],
                name=str(json.loads(about["plan"])["study"]["name"]),
                which=path.stem,  # type: ignore[arg-type]
                plan_hash=about["plan_sha256"],
                sha256=sha256,
                bytes=path.stat().st_size,
            )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise OutputError(
                "a kept model must be readable",
                value=type(error).__name__,
                fix="Remove the damaged file from the folder `models` of the state folder",
            ) from None
