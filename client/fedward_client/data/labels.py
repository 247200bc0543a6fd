"""Map labels of a folder, a table or an array to the plan's classes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedward import rule_codes
from fedward.plan.schema import Task

FLAGS = {"0": 0, "0.0": 0, "false": 0, "no": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1}
_INTEGER = re.compile(r"\d{1,4}(\.0+)?")


def class_index(value: str, task: Task) -> int:
    """The index of a class given by its name (any case) or its number.

    Raises
    ------
    DataError
        "no label" when it is empty, "unknown class" when the plan does not know it.
    """
    text = value.strip()
    if not text:
        raise rule_codes.unusable(rule_codes.NO_LABEL)
    names = [name.lower() for name in task.classes]
    if text.lower() in names:
        return names.index(text.lower())
    if _INTEGER.fullmatch(text) and int(float(text)) < len(names):
        return int(float(text))
    raise rule_codes.unusable(rule_codes.UNKNOWN_CLASS)


def label_of_value(value: str, task: Task) -> tuple[int, ...]:
    """The label that one text gives; a multi-label task may list several with ``|`` or ``;``."""
    if not task.multi_label:
        return (class_index(value, task),)
    return flags({class_index(part, task) for part in re.split(r"[|;]", value)}, task)


def label_of_row(row: Mapping[str, str], task: Task) -> tuple[int, ...]:
    """The label of a table row, whose column names are in lower case.

    A column per class is used for a multi-label task, `label` otherwise, and each serves where
    the other is missing.
    """
    names = [name.lower() for name in task.classes]
    by_class = all(name in row for name in names)
    if "label" in row and not (task.multi_label and by_class):
        return label_of_value(row["label"], task)
    if not by_class:
        raise rule_codes.unusable(rule_codes.NO_LABEL)
    return label_of_flags([_flag(row[name]) for name in names], task)


def label_of_flags(values: list[int], task: Task) -> tuple[int, ...]:
    """The label that a 0/1 flag per class gives; exactly one must be set unless multi-label."""
    if len(values) != len(task.classes) or not set(values) <= {0, 1}:
        raise rule_codes.unusable(rule_codes.UNKNOWN_CLASS)
    if task.multi_label:
        return tuple(values)
    if sum(values) != 1:
        raise rule_codes.unusable(rule_codes.CONFLICTING if any(values) else rule_codes.NO_LABEL)
    return (values.index(1),)


def flags(indices: set[int], task: Task) -> tuple[int, ...]:
    """A 0/1 flag per class."""
    return tuple(int(k in indices) for k in range(len(task.classes)))


def _flag(text: str) -> int:
    if not text.strip():
        raise rule_codes.unusable(rule_codes.NO_LABEL)
    if text.strip().lower() not in FLAGS:
        raise rule_codes.unusable(rule_codes.UNKNOWN_CLASS)
    return FLAGS[text.strip().lower()]
