"""Reference pages from pydantic models: a heading per table, a row per key."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

Schema = Mapping[str, Any]

_WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "table",
}
_LIMITS = (
    ("exclusiveMinimum", "above {}"),
    ("minimum", "at least {}"),
    ("exclusiveMaximum", "below {}"),
    ("maximum", "at most {}"),
    ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"),
    ("minItems", "at least {} entries"),
    ("maxItems", "at most {} entries"),
    ("pattern", "matches `{}`"),
)


def fields_table(
    model: type[BaseModel], meanings: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """A Markdown table with a row per field of a model.

    Parameters
    ----------
    model : type
        The model.
    meanings : mapping
        What a key means, for keys that the model itself does not describe.

    Returns
    -------
    list of str
        Lines; columns key, type, default, limits, meaning.
    """
    schema = model.model_json_schema()
    return [
        "| key | type | default | limits | meaning |",
        "|---|---|---|---|---|",
        *(_row(name, model, schema, meanings.get(name, "")) for name in model.model_fields),
    ]


def summary(model: type[BaseModel]) -> str:
    """What a model's docstring says first."""
    return " ".join(inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].split()).replace(
        "``", "`"
    )


def anchor(name: str) -> str:
    """Where links to a model's table point."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


def _row(name: str, model: type[BaseModel], schema: Schema, meaning: str) -> str:
    field = schema["properties"][name]
    cells = (
        f"`{name}`",
        _type(field),
        "required" if model.model_fields[name].is_required() else _default(field),
        "; ".join(dict.fromkeys(_limits(field))),
        field.get("description") or meaning or _linked_summary(field, schema),
    )
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _linked_summary(field: Schema, schema: Schema) -> str:
    reference = field.get("$ref") or (field.get("items") or _values(field)).get("$ref", "")
    text: str = schema.get("$defs", {}).get(reference.rsplit("/", 1)[-1], {}).get("description", "")
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")


def _cell(text: str) -> str:
    # A pipe would end the cell, inside code too.
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def _default(field: Schema) -> str:
    if "default" not in field:  # made by a factory: an empty list or table
        return "empty"
    value = field["default"]
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "its defaults" if value else "empty"
    return f"`{json.dumps(value, ensure_ascii=False)}`" if value != [] else "empty"


def _type(field: Schema) -> str:
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{anchor(name)})"
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"] if one.get("type") != "null")
    if "const" in field:
        return _choices([field["const"]])
    if "enum" in field:
        return f"one of {_choices(field['enum'])}"
    if field.get("type") == "array":
        return f"list of {_items(field)}"
    if field.get("type") == "object":
        return f"table of {_type(_values(field))}" if _values(field) else "table"
    return _WORDS.get(str(field.get("type")), "any")


def _values(field: Schema) -> Schema:
    value = field.get("additionalProperties")
    return value if isinstance(value, Mapping) else {}


def _items(field: Schema) -> str:
    if "prefixItems" in field:
        return f"{len(field['prefixItems'])} × {_type(field['prefixItems'][0])}"
    return _type(field["items"])


def _choices(values: list[Any]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values)


def _limits(field: Schema) -> Iterator[str]:
    for one in field.get("anyOf", ()):
        yield from _limits(one)
    fixed = "prefixItems" in field
    for key, words in _LIMITS:
        if key in field and not (fixed and key.endswith("Items")):
            value = field[key]
            yield words.format(f"{value:g}" if isinstance(value, float) else value)
    inner = field.get("items") or _values(field)
    if inner:
        yield from (f"each {limit}" for limit in _limits(inner))
