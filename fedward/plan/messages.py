"""Turn pydantic's validation errors into messages with rule and next step."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedward.errors import FedwardError, PlanError
from fedward.rule_codes import RuleCode, plan_key

_TYPES = {
    "string_type": ("must be text", "Write it in quotes"),
    "string_unicode": ("must be valid Unicode text", "Remove the lone surrogate"),
    "int_type": ("must be a whole number", "Write it without quotes and without a point"),
    "float_type": ("must be a number", "Write it without quotes"),
    "finite_number": ("must be a finite number", "Write a number other than nan and inf"),
    "bool_type": ("must be true or false", "Write one of them without quotes"),
    "tuple_type": ("must be a list", "Put it in square brackets"),
    "dict_type": ("must be a table", "Write it as a [section]"),
    "model_type": ("must be a table", "Write it as a [section]"),
    "extra_forbidden": (
        "this key is not known",
        "Remove it, or see the reference page for its name",
    ),
    "missing": ("this key is required", "Add it"),
    "too_short": ("must have at least {min_length} entries", "Add what is missing"),
    "too_long": ("must have at most {max_length} entries", "Remove what is too much"),
    "string_too_short": ("must have at least {min_length} characters", "Write it out"),
    "string_too_long": ("must have at most {max_length} characters", "Shorten it"),
    "string_pattern_mismatch": ("must match the pattern {pattern}", "Change its characters"),
    "greater_than": ("must be greater than {gt}", "Raise it"),
    "greater_than_equal": ("must be at least {ge}", "Raise it"),
    "less_than": ("must be less than {lt}", "Lower it"),
    "less_than_equal": ("must be at most {le}", "Lower it"),
    "literal_error": ("must be {expected}", "Choose one of them"),
}
_WITHOUT_VALUE = {"missing", "value_error"}
_UNION_TAGS = {"float", "int"}


def plan_error(error: ValidationError) -> FedwardError:
    """The first thing that is wrong in a plan, and how many more there are."""
    return schema_error(error, PlanError)


def schema_error(error: ValidationError, kind: type[FedwardError]) -> FedwardError:
    """The same as an error of another kind."""
    errors = error.errors()
    first, more = errors[0], len({_where(one) for one in errors}) - 1
    rule, fix = _rule(first)
    if more:
        fix = f"{fix}. {more} more to mend after this one"
    where = _where(first)
    about: dict[str, Any] = {}
    if kind is PlanError:
        about = {"code": RuleCode.PLAN_KEY, "values": {"key": plan_key(where)}}
    return kind(rule, value=_value(first), fix=fix, where=where, **about)


def _value(first: ErrorDetails) -> str | None:
    if first["type"] in _WITHOUT_VALUE:
        return None
    found = first["input"]
    if first["type"] != "plan_rule":
        return _short(found)
    # The input is all that the rule is about, the value one key of it.
    for part in _within(first):
        found = found.get(part) if isinstance(found, dict) else None
    return None if found is None else _short(found)


def _within(first: ErrorDetails) -> list[str]:
    """The way from a rule's input to the key that it names."""
    loc, parts = [str(part) for part in first["loc"]], _where(first).split(".")
    return parts[len(loc) :] if parts[: len(loc)] == loc else parts


def _rule(first: ErrorDetails) -> tuple[str, str]:
    context = {key: _plain(item) for key, item in (first.get("ctx") or {}).items()}
    if first["type"] in _TYPES:
        rule, fix = _TYPES[first["type"]]
        return rule.format_map(context), fix
    rule, cut, fix = first["msg"].removeprefix("Value error, ").rpartition("; ")
    return (rule, fix[:1].upper() + fix[1:]) if cut else (fix, "Change the value")


def _plain(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _where(first: ErrorDetails) -> str:
    stated = (first.get("ctx") or {}).get("where")
    if stated:
        return str(stated)
    parts = [str(part) for part in first["loc"]]
    if len(parts) > 1 and parts[-1] in _UNION_TAGS:  # pydantic names the member of the union
        parts.pop()
    return ".".join(parts)


def _short(value: object) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except RecursionError:
        text = "a deep nest"
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."
