"""What a first study is about: flags, answers, and what the data tell by themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import click
import typer

from fedward.console import say
from fedward.errors import DataError
from fedward.tasks.registry import DRAFTED
from fedward_client.data.readers.registry import Format
from fedward_client.data.survey import Survey, survey

_Answer = TypeVar("_Answer")


def settle(
    data: Path | None,
    *,
    task: str,
    classes: str,
    label_column: str,
    patient_column: str,
    patient_folder: int,
    format: Format | None,
) -> Survey:
    """What the data are for, by flags, else as asked on a terminal, else as they seem.

    Raises
    ------
    DataError
        The data are not there, or neither a flag nor they tell what they are for.
    """
    place = data or _ask(
        None, "--data", lambda: Path(typer.prompt("Folder (or npz file) of images"))
    )
    found = survey(place, format, label_column)
    kind = task or _ask(found.kind, "--task", lambda: _choose("Task", found.kind))
    if kind != found.kind:
        found = replace(found, kind=kind, classes=())
    names = tuple(part.strip() for part in classes.split(",") if part.strip())
    if not names:
        names = _ask(found.classes, "--classes", lambda: _list_of(found), _hint(found))
    words = {word: name for word, name in found.labels.words.items() if name in names}
    labels = replace(found.labels, words=words)
    if patient_column:
        labels = replace(labels, patient_column=patient_column)
    folder = patient_folder or (0 if patient_column else found.patient_folder)
    return replace(found, classes=names, labels=labels, patient_folder=folder)


def _ask(known: _Answer | None, option: str, ask: Callable[[], _Answer], hint: str = "") -> _Answer:
    """The user's answer, what is known being the default; without a terminal what is known."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return ask()
    if known:
        return known
    raise DataError(
        "a first study needs to be told what the data do not tell",
        value=hint or None,
        fix=f"Give {option}, or run it on a terminal, where it asks",
        where=option,
    )


def _choose(what: str, known: str) -> str:
    kinds = click.Choice([*DRAFTED])
    return str(typer.prompt(what, default=known or None, type=kinds))


def _list_of(found: Survey) -> tuple[str, ...]:
    default = ", ".join(found.classes) or None
    if not default and found.seen:
        say(_hint(found))
    text = typer.prompt("Classes in label order, commas between", default=default)
    return tuple(part.strip() for part in str(text).split(",") if part.strip())


def _hint(found: Survey) -> str:
    if not found.seen:
        return ""
    return f"the table has the columns {', '.join(found.seen)}; --label-column names the label's"
