"""What the file of a model says of itself, and its digest; imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from fedward.errors import ModelError
from fedward.plan.load import canonical, plan_hash
from fedward.plan.schema import Plan


def about_model(study: str, plan: Plan, which: Literal["shared", "own"]) -> dict[str, str]:
    """The metadata with which a model's file can be used by itself.

    Parameters
    ----------
    study : str
        The study's id.
    plan : Plan
        How the model was made.
    which : str
        Whether it is the model of all hospitals, or one hospital's own.
    """
    return {
        "study": study,
        "which": which,
        "plan": canonical(plan),
        "plan_sha256": plan_hash(plan),
    }


def check_model(path: Path, sha256: str) -> str:
    """Make sure that a model file is whole.

    Parameters
    ----------
    path : Path
        The file.
    sha256 : str
        Its SHA-256; "" where an earlier release kept none. Then only its length is checked.

    Returns
    -------
    str
        The SHA-256 that it has.

    Raises
    ------
    ModelError
        It is missing, cut off, or another one.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not sha256:
            with safe_open(path, framework="numpy"):
                pass
    except (OSError, SafetensorError) as error:
        raise unreadable(error) from error
    if sha256 and found != sha256:
        raise ModelError(
            f"the model file must have SHA-256 {sha256[:12]}…",
            value=f"{found[:12]}…",
            fix="It was damaged or replaced since it was written; restore it from a backup",
        )
    return found


def unreadable(error: Exception) -> ModelError:
    """The error of a file that is missing or no safetensors file."""
    return ModelError(
        "the model file must be a readable safetensors file",
        value=type(error).__name__,
        fix="Check that it was written completely",
    )
