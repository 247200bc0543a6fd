"""The ready studies that ship with the package."""

from __future__ import annotations

from pathlib import Path

from fedward.errors import PlanError

# In a wheel they lie in the package, in a checkout in its top-level folder.
_FOLDERS = (Path(__file__).parent / "studies", Path(__file__).parents[1] / "studies")


def shipped_study(name: str) -> Path:
    """Find a ready study by its name.

    Parameters
    ----------
    name : str
        Such as ``pneumonia`` or ``demo/classification``.

    Raises
    ------
    PlanError
        There is no such study; the message lists those that there are.
    """
    for folder in _FOLDERS:
        if (plan := folder / f"{name}.toml").is_file():
            return plan
    known = sorted({plan.stem for folder in _FOLDERS for plan in folder.glob("*.toml")})
    raise PlanError(
        "a plan is a readable TOML file, or the name of a ready study",
        value=name,
        fix=f"Check its name; ready studies are {', '.join(known)}",
    )


def plan_file(text: str) -> Path:
    """The file of a plan that a command line names: a path, or a ready study's name."""
    path = Path(text)
    return path if path.exists() or path.suffix or path.name != text else shipped_study(text)
