"""Write a plan as TOML that parses to the same plan."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedward.plan.schema import Plan

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(plan: Plan) -> str:
    """The plan as TOML, defaults written out; it has the hash of the plan."""
    return toml_text(plan.model_dump(mode="json"))


def toml_text(value: Mapping[str, Any]) -> str:
    """Nested mappings of scalars and lists as TOML; keys that are None are left out."""
    return "\n".join(_table(value, ())).strip() + "\n"


def _table(value: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    given = {key: item for key, item in value.items() if item is not None}
    for key, item in given.items():
        if not _nested(item):
            yield f"{_key(key)} = {_scalar(item)}"
    for key, item in given.items():
        if _nested(item):
            yield from _sections(item, (*path, key))


def _sections(item: Any, path: tuple[str, ...]) -> Iterator[str]:
    name = ".".join(_key(part) for part in path)
    if isinstance(item, Mapping):
        yield from ("", f"[{name}]", *_table(item, path))
        return
    for entry in item:
        yield from ("", f"[[{name}]]", *_table(entry, path))


def _nested(item: Any) -> bool:
    if isinstance(item, Mapping):
        return True
    return isinstance(item, list) and bool(item) and isinstance(item[0], Mapping)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _scalar(key)


def _scalar(item: Any) -> str:
    if isinstance(item, list):
        return f"[{', '.join(_scalar(part) for part in item)}]"
    # JSON's scalars are TOML's, but for the one control character that JSON leaves as it is.
    return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")
