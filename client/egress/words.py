"""The texts that may leave: fixed sentences, and values made of plan words and short numbers.

Words of a plan come from outside. They are looked up in a set and never become part of a pattern,
so that the time of a check is bounded by the length of the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, get_args

from client.data.reasons import REASONS
from client.policy import words as policy
from fedward.plan.schema import (
    MetricName,
    Modality,
    ModelName,
    Plan,
    Section,
    StrategyName,
)
from fedward.protocol import RefusalKind

# Four digits cannot hold a date, and no more than a count of patients would.
_NUMBER: Final = re.compile(r"-?[0-9]{1,4}(?:\.[0-9]{1,4})?(?:e[+-][0-9]{2})?")
# A row of short numbers would be a long one.
_ROW: Final = re.compile(r"\d[ ,:()]+-?\d")
_LONG_NUMBER: Final = re.compile(r"\d{5}")
_JOINTS: Final = (" ", ", ", ": ", " (", "), ")
# As long as a refusal's rule and value may be.
_LONGEST_RULE: Final = 500
_LONGEST_VALUE: Final = 200

FALLBACK: Final[dict[RefusalKind, str]] = {
    "policy": "the site's policy does not allow it",
    "pending": policy.PENDING,
    "paused": policy.PAUSED,
    "budget": "the study must stay within the site's privacy budget",
    "privacy": "the site cannot reach the privacy that the plan asks for",
    "data": "the site's data must be able to serve the plan",
    "protocol": "a message must be a known, valid record",
    "busy": "the site must be free to work",
    "error": "an unexpected error stopped the site",
    "arrays": "a site must hold the frozen arrays that an order names",
}

# `#` stands for a number, `@` for a word of the plan or of its schema; at most one `@` a sentence.
SENTENCES: Final = (
    *policy.RULES,
    *FALLBACK.values(),
    *sorted(REASONS),
    policy.MEMORY,
    policy.STOPPED,
    policy.GIVEN_UP,
    policy.UNWRITTEN,
    policy.STOPS_TRAINER,
    # training and evaluation
    "a site needs @ patients to be measured",
    "a site needs training patients",
    "a site must have images that can be used",
    "a site must have images",
    "a site must have patients to train on",
    "a site must have at least two patients to divide",
    "the dataset must hold images that the @ task can use",
    "the dataset must exist",
    "a prepared dataset must stay in its cache",
    "the cache of prepared images must be writable",
    "a cohort must be frozen before it is used",
    "a frozen cohort must not have changed",
    "a frozen cohort must have the task and classes of its dataset in site.toml",
    "the plan has rounds # to #",
    "a private round is trained once",
    "private training needs patients",
    "a private plan needs delta",
    "the cost of a study must be within what can be accounted",
    "the target must be reachable with finite noise",
    "probabilities must lie in # to #",
    "losses must be one finite number, # or more, for each image",
    "targets must be one class index for each image",
    "class indices must lie in # to #",
    # models, plans and records
    "the arrays must cover the whole model",
    "the model has no such array",
    "arrays must be float32",
    "arrays must be finite",
    "start weights must be finite",
    "every pattern must match a parameter of the model",
    "@ cannot take images of this size",
    "@ has four levels",
    "@ has fixed widths",
    "@ has no dropout",
    "the plan does not have the hash that came with it",
    "a plan on the wire must be canonical JSON",
    "a plan on the wire must be an object",
    "a message must carry an order",
    "an order must be signed by its coordinator",
    "an order must come with the task and the model that its coordinator signed",
    "a study is evaluated in the rounds that its plan names",
    "a round of a study is evaluated once, with one model",
    "an evaluation is tried a few times only",
    "an evaluation is answered once",
    "evaluations must stay within the site's budget for them",
    "the audit log must be whole",
    "the device must exist on this machine",
)
_PLAIN: Final = frozenset(one for one in SENTENCES if "@" not in one)
_AROUND_WORD: Final = tuple(tuple(one.split("@")) for one in SENTENCES if "@" in one)
_VALUE_WORDS: Final = (
    "limit",
    "million",
    "MiB",
    "missing",
    "patients",
    "patient",
    "cohort",
    "coordinator",
    "none",
    "for training",
    "no images",
    "epsilon",
    "delta",
    "noise",
    "steps at rate",
)


class Vocabulary:
    """What may be said about one plan.

    Parameters
    ----------
    plan : Plan or None
        Its own words may come back to the coordinator that wrote them.
    """

    def __init__(self, plan: Plan | None) -> None:
        own = set(_strings(plan.model_dump(mode="json"))) if plan else set()
        self._words = {*_schema_words(), *own, *REASONS} - {""}
        self._items = {*self._words, *_VALUE_WORDS, *_keys()}

    def rule(self, text: str) -> bool:
        """Whether it is one of the fixed sentences."""
        if len(text) > _LONGEST_RULE:
            return False
        if "#" not in text and _NUMBER.sub("#", text) in _PLAIN:
            return True
        return any(
            text.startswith(before)
            and text.endswith(after)
            and text[len(before) : len(text) - len(after)] in self._words
            for before, after in _AROUND_WORD
        )

    def value(self, text: str) -> bool:
        """Whether it is made of known words and short numbers only, joined by ``_JOINTS``."""
        if not text:
            return True
        if len(text) > _LONGEST_VALUE or _ROW.search(text):
            return False
        # Words may hold spaces, so every way to divide the text is followed, each place once.
        ends = [place for place in range(1, len(text)) if text[place] in " ,:)"] + [len(text)]
        starts = {0}
        for start in range(len(text)):
            if start not in starts:
                continue
            for end in ends:
                if end > start and self._is_item(text[start:end]):
                    if text[end:] in ("", ")"):
                        return True
                    starts.update(end + len(j) for j in _JOINTS if text.startswith(j, end))
        return False

    def _is_item(self, text: str) -> bool:
        return text in self._items or _NUMBER.fullmatch(text) is not None


def _strings(value: Any) -> Iterator[str]:
    """Class names and choices; not titles and other prose, nor digests."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("title", "intended_use", "initial_weights"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str) and not _LONG_NUMBER.search(value):
        yield value


def _schema_words() -> set[str]:
    choices = (ModelName, StrategyName, MetricName, Modality)
    words = {word for kind in choices for word in get_args(kind)}
    return {*words, "train", "validation", "test", "classification", "segmentation", "dp-sgd"}


def _keys(model: type[Section] = Plan, prefix: str = "") -> Iterator[str]:
    """Every key of a plan, ``section.key``."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _keys(inner, f"{prefix}{name}.")
