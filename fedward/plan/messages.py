"""Turn pydantic's validation errors into messages with rule and next step."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, TypeGuard, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from fedward.errors import FedwardError, PlanError, together
from fedward.rule_codes import RuleCode, plan_key
from fedward.suggest import nearest
from fedward.toml_lines import TomlLines

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
_MOST = 100  # errors with suggestions: no message tells more
_FEW = 2  # tables with a key, among which one can guess
_RULE = "plan_rule"
_WITHOUT_VALUE = {"missing", "value_error"}
_UNION_TAGS = {"float", "int"}
_Model = TypeVar("_Model", bound=BaseModel)


def rule_error(rules: Iterable[tuple[str, str]]) -> PydanticCustomError:
    """What a validator raises for broken rules between keys: each key, and its rule with fix."""
    return PydanticCustomError(_RULE, "{rules}", {"rules": list(rules)})


def validated(
    model: type[_Model], content: dict[str, Any], kind: type[FedwardError], text: str = ""
) -> _Model:
    """The content of a file as a model.

    Parameters
    ----------
    model : type
        What the content must be.
    content : dict
        Nested dictionaries.
    kind : type
        Of the error.
    text : str
        The TOML text of the content, for the lines of errors.

    Raises
    ------
    FedwardError
        It breaks rules; the message tells all of them.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        found = schema_errors(error, kind, model)
        known = {one.where for one in found}
        beyond = _beyond_unknown_keys(error, kind, model, content)
        found += [one for one in beyond if one.where not in known]
        raise together(found, lines(text)) from None


def _beyond_unknown_keys(
    error: ValidationError, kind: type[FedwardError], model: type[_Model], content: dict[str, Any]
) -> list[FedwardError]:
    """What else is wrong once unknown keys have the name that was meant, or are gone."""
    unknown = [one["loc"] for one in error.errors() if one["type"] == "extra_forbidden"]
    if len(unknown) > _MOST:
        return []
    try:
        model.model_validate(_mended(content, unknown, model))
    except RecursionError:
        return []
    except ValidationError as second:
        return schema_errors(second, kind, model) if unknown else []
    return []


def _mended(content: dict[str, Any], unknown: Iterable[tuple[Any, ...]], model: Any) -> Any:
    mended = copy.deepcopy(content)
    for *path, key in unknown:
        inner: Any = mended
        for part in path:
            inner = inner[part]
        value = inner.pop(key)
        if near := _meant(model, (*path, key))[0]:
            inner.setdefault(near, value)
    return mended


def lines(text: str) -> Callable[[str], int | None] | None:
    """From a key to its line, where there is a text."""
    return TomlLines(text).of if text else None


def schema_errors(
    error: ValidationError, kind: type[FedwardError], model: type[BaseModel]
) -> list[FedwardError]:
    """Each rule that is broken, with suggestions from the model's keys and words.

    Of very many only the first ones have suggestions: to look for a word takes time, and a text
    from outside may hold any number of them.
    """
    return [
        _error(one, kind, model if place < _MOST else None)
        for place, one in enumerate(_different(error.errors()))
    ]


def _different(errors: Iterable[ErrorDetails]) -> list[ErrorDetails]:
    """One error for each key, of several rules between keys each."""
    found: dict[tuple[str, str], ErrorDetails] = {}
    for error in errors:
        for one in _each_rule(error):
            found.setdefault((_where(one), one["msg"] if one["type"] == _RULE else ""), one)
    return list(found.values())


def _each_rule(error: ErrorDetails) -> Iterator[ErrorDetails]:
    """One error for each broken rule between keys; pydantic knows one a table."""
    if error["type"] != _RULE:
        yield error
        return
    for where, rule in (error.get("ctx") or {})["rules"]:
        yield {**error, "msg": rule, "ctx": {"where": where} if where else {}}


def _error(
    one: ErrorDetails, kind: type[FedwardError], model: type[BaseModel] | None
) -> FedwardError:
    rule, fix = _rule(one)
    where = _where(one)
    about: dict[str, Any] = {}
    if kind is PlanError:
        about = {"code": RuleCode.PLAN_KEY, "values": {"key": plan_key(where)}}
    return kind(
        rule,
        value=_value(one),
        fix=(_suggested(one, model) if model else "") or fix,
        where=where,
        **about,
    )


def _suggested(one: ErrorDetails, model: type[BaseModel]) -> str:
    """The next step where a key or a word is nearly a known one; "" elsewhere."""
    if one["type"] == "literal_error" and isinstance(one["input"], str):
        words = re.findall(r"'([^']+)'", str((one.get("ctx") or {})["expected"]))
        near = nearest(one["input"], words)
        return f"Did you mean `{near}`? Else choose another of them" if near else ""
    if one["type"] != "extra_forbidden":
        return ""
    near, there = _meant(model, one["loc"])
    if near:
        return f"Did you mean `{near}`? Else remove it"
    if there:
        return f"It belongs in {' or '.join(f'[{name}]' for name in there)}; move it there"
    here = _table(model, map(str, one["loc"][:-1]))
    return f"Remove it; known are {', '.join(here.model_fields)}" if here else ""


def _meant(model: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[str, list[str]]:
    """What an unknown key may be: a known key of its table, or the same key in other tables."""
    *table, key = (str(part) for part in loc)
    there = [name for name, inner in _tables(model) if name and key in inner.model_fields]
    if 0 < len(there) <= _FEW:
        return "", there
    here = _table(model, table)
    return nearest(key, here.model_fields) if here else "", there


def _table(model: type[BaseModel], path: Iterable[str]) -> type[BaseModel] | None:
    """The class of the table at a path of a file."""
    found: list[Any] = [model]
    for part in path:
        found = [inner for one in found for inner in _within_type(one, part)]
    return next((one for one in found if _is_table(one)), None)


def _tables(model: type[BaseModel], name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Each table of a file with its name; NAME stands for one that the file chooses."""
    yield name, model
    for key, field in model.model_fields.items():
        for one in _members(field.annotation):
            named = ".NAME" if get_origin(one) is dict else ""
            for inner in (one, *get_args(one)):
                if _is_table(inner):
                    yield from _tables(inner, f"{name}.{key}{named}".lstrip("."))


def _within_type(one: Any, part: str) -> Iterator[Any]:
    """The types of a value's part: of a key of a table, or of an entry of a list."""
    if _is_table(one):
        if part in one.model_fields:
            yield from _members(one.model_fields[part].annotation)
    elif get_origin(one) in (dict, tuple):
        yield from _members(get_args(one)[1 if get_origin(one) is dict else 0])


def _members(annotation: Any) -> Iterator[Any]:
    """The types of a union, or the one type."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from _members(one)
    else:
        yield annotation


def _is_table(one: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(one, type) and issubclass(one, BaseModel)


def _value(first: ErrorDetails) -> str | None:
    if first["type"] in _WITHOUT_VALUE:
        return None
    found = first["input"]
    if first["type"] != _RULE:
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
