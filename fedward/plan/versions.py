"""Which schema version a plan needs: the smallest that knows every key and word that it uses.

A key, a word of a choice or a setting of a strategy that is newer than version 1 carries the
version where it is declared, and nowhere else::

    clip: Annotated[float, Since(2)] = Field(default=0.0, description="…")
    optimizer: Annotated[Literal["sgd", "adamw", "lion"], Since(2, "lion")] = …
    "warmup": Setting("…", 0.0, since=2)
    StrategySpec(name="…", since=2), ModelSpec(name="…", since=2)

A plan that keeps a new key at its default does not use it, so it needs no newer version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedward.networks import MODELS
from fedward.strategies import STRATEGIES
from fedward.tasks.registry import METRICS, TASKS

# Words that come from a registry; each entry carries the version that added it.
_REGISTRIES: Final[dict[str, Mapping[str, Any]]] = {
    "model.name": MODELS,
    "strategy.name": STRATEGIES,
    "task.kind": TASKS,
    "metrics.report": METRICS,
    "metrics.primary": METRICS,
}


@dataclass(frozen=True, init=False)
class Since:
    """Annotation of a plan key, or of some words of its choice, that a later version added.

    Attributes
    ----------
    version : int
        The schema version that added it; from 2.
    words : frozenset of str
        The words that are new; empty where the key itself is.
    """

    version: int
    words: frozenset[str]

    def __init__(self, version: int, *words: str) -> None:
        object.__setattr__(self, "version", version)
        object.__setattr__(self, "words", frozenset(words))


def vocabulary(section: type[BaseModel], prefix: str = "", since: int = 1) -> dict[str, int]:
    """Every key, word and setting of a plan, each with the schema version that added it.

    Parameters
    ----------
    section : type
        A table of the plan.
    prefix : str
        What its keys begin with.
    since : int
        The version that added the table.

    Returns
    -------
    dict
        ``section.key``, ``section.key = word`` and ``strategy.settings.NAME.SETTING``.
    """
    found: dict[str, int] = {}
    for name, field in section.model_fields.items():
        key, version = prefix + name, max(since, _key_version(field))
        found[key] = version
        for part in _parts(field):
            if isinstance(part, str):
                found[f"{key} = {part}"] = max(version, _word_version(field, part))
            elif isinstance(part, type):
                found |= vocabulary(part, f"{key}.", version)
        if key == "strategy.settings":
            for strategy, spec in STRATEGIES.items():
                for setting, about in spec.settings.items():
                    found[f"{key}.{strategy}.{setting}"] = about.since
        for word, spec in _REGISTRIES.get(key, {}).items():
            found[f"{key} = {word}"] = spec.since
    return found


def used(plan: BaseModel) -> dict[str, int]:
    """Keys and words that a plan uses and that are newer than version 1, each with its version."""
    return {key: version for key, version in _used(plan) if version > 1}


def _used(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, int]]:
    written = section.model_dump(exclude_defaults=True)
    for name, field in type(section).model_fields.items():
        if name not in written:
            continue
        key, value = prefix + name, getattr(section, name)
        yield key, _key_version(field)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, BaseModel):
                yield from _used(item, f"{key}.")
            elif isinstance(item, str):
                yield f'{key} = "{item}"', _word_version(field, item)
        if key == "strategy.settings":
            known = STRATEGIES[getattr(section, "name")].settings  # noqa: B009
            yield from ((f"{key}.{setting}", known[setting].since) for setting in value)
        for word in value if isinstance(value, tuple) else (value,):
            if key in _REGISTRIES:
                yield f'{key} = "{word}"', _REGISTRIES[key][word].since


def _key_version(field: FieldInfo) -> int:
    return max((m.version for m in _marks(field) if not m.words), default=1)


def _word_version(field: FieldInfo, word: str) -> int:
    return max((m.version for m in _marks(field) if word in m.words), default=1)


def _marks(field: FieldInfo) -> Iterator[Since]:
    yield from (part for part in _parts(field) if isinstance(part, Since))


def _parts(field: FieldInfo) -> Iterator[Any]:
    """What an annotation is made of: its marks, the words of its choices, its tables."""
    yield from (mark for mark in field.metadata if isinstance(mark, Since))
    yield from _within(field.annotation)


def _within(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from (word for word in get_args(annotation) if isinstance(word, str))
    elif get_origin(annotation) is Annotated:
        yield from (mark for mark in annotation.__metadata__ if isinstance(mark, Since))
        yield from _within(annotation.__origin__)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _within(part)
