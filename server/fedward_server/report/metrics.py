"""Read and write ``metrics.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedward.errors import OutputError
from fedward.files import write_text
from fedward_server.results import StudyResults


def write_metrics(results: StudyResults | Sequence[StudyResults], path: Path) -> None:
    """Write the results of one study, or of several under ``studies``.

    The file has sorted keys and no NaN or infinity: such a figure is null. It is written whole or
    not at all.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    studies = [results] if isinstance(results, StudyResults) else list(results)
    dumped = [_finite(study.model_dump(mode="json")) for study in studies]
    value = dumped[0] if len(dumped) == 1 else {"studies": dumped}
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_metrics(path: Path) -> list[StudyResults]:
    """Read the results of one or several studies back.

    A null where the schema wants a number (a diverged loss) reads as NaN.

    Raises
    ------
    OutputError
        The file cannot be read or is not such a file.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError("metrics must be readable JSON", value=path.name) from error
    several = isinstance(value, dict) and set(value) == {"studies"}
    studies = value["studies"] if several else [value]
    if not isinstance(studies, list):
        raise OutputError("`studies` must be a list", value=path.name)
    return [_study(study, path.name) for study in studies]


def _study(value: Any, name: str) -> StudyResults:
    try:
        return _validate(value)
    except ValidationError as error:
        if not _put_nan(value, error):
            raise _refusal(error, name) from None
    return _validate(value)


def _validate(value: Any) -> StudyResults:
    # From JSON, since the records inside are strict and only there take a list for a tuple.
    return StudyResults.model_validate_json(json.dumps(value))


def _put_nan(value: Any, error: ValidationError) -> bool:
    """Put NaN where a required number is null; whether that was all that was wrong."""
    places = [one["loc"] for one in error.errors() if _is_null_number(one)]
    if len(places) != error.error_count():
        return False
    for *parents, key in places:
        table = value
        for parent in parents:
            table = table[parent]
        table[key] = math.nan
    return True


def _is_null_number(error: Any) -> bool:
    return error["type"] == "float_type" and error["input"] is None


def _refusal(error: ValidationError, name: str) -> OutputError:
    first = error.errors(include_url=False)[0]
    return OutputError(
        f"metrics must follow their schema: {first['msg']}",
        value=name,
        fix="See docs/metrics.md",
        where=".".join(str(part) for part in first["loc"]),
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
