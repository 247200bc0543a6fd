"""Read and write plans, with a canonical form and a stable hash."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Final

from fedward.errors import PlanError, SchemaError
from fedward.plan.messages import validated
from fedward.plan.schema import Plan
from fedward.plan.versions import used, vocabulary
from fedward.rule_codes import RuleCode

SCHEMA_VERSION: Final = max(vocabulary(Plan).values())
"""The newest schema version that this release knows."""

# In the canonical form only: the schema version that the plan needs; left out where that is 1.
_NEEDS: Final = "schema"

_HUGE = (RuleCode.PLAN_NUMBER, "Write fewer digits")
_DEEP = (RuleCode.PLAN_DEPTH, "Flatten its nested lists and tables")


def load_plan(path: Path) -> Plan:
    """Read and validate a TOML plan.

    Raises
    ------
    PlanError
        The file is missing, is not TOML, or breaks a rule; the message names the key.
    """
    try:
        return parse_plan(path.read_text("utf-8-sig"))
    except OSError as error:
        raise PlanError(
            "the plan file must be readable", value=path.name, fix="Check its name"
        ) from error
    except UnicodeDecodeError as error:
        raise PlanError(
            "the plan must be UTF-8 text", value=path.name, fix="Save it as UTF-8"
        ) from error


def parse_plan(text: str) -> Plan:
    """Validate the text of a TOML plan (see :func:`load_plan`)."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(
            "the plan must be valid TOML", value=str(error), fix="Mend that line"
        ) from error
    except ValueError:  # more digits than Python reads
        raise PlanError(_HUGE[0], fix=_HUGE[1]) from None
    except RecursionError:
        raise PlanError(_DEEP[0], fix=_DEEP[1]) from None
    return plan_from(content, text)


def plan_from(value: dict[str, Any], text: str = "") -> Plan:
    """Validate a plan given as nested dictionaries (see :func:`load_plan`).

    With the TOML text that holds it, errors name lines.
    """
    try:
        return validated(Plan, value, PlanError, text)
    except OverflowError:
        raise PlanError(_HUGE[0], fix=_HUGE[1]) from None
    except RecursionError:
        raise PlanError(_DEEP[0], fix=_DEEP[1]) from None


def canonical(plan: Plan) -> str:
    """The plan as canonical JSON: keys sorted, no spaces, no key that has its default value.

    Where a plan uses a key, word or setting that is newer than schema version 1, ``schema`` says
    which version it needs.

    Two files that mean the same study (order, comments, defaults left out or written) give the
    same text. A release that adds a key with a default gives the same text for an older plan, so
    its hash stays and a site with the previous release can read it. The reverse side: a default
    must never change its meaning, or equal hashes would stand for different studies.
    """
    content = plan.model_dump(mode="json", exclude_defaults=True)
    if (needed := schema_needed(plan)) > 1:
        content[_NEEDS] = needed
    return json.dumps(
        content,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )


def schema_needed(plan: Plan) -> int:
    """The smallest schema version that knows every key, word and setting that the plan uses."""
    return max(used(plan).values(), default=1)


def plan_hash(plan: Plan) -> str:
    """SHA-256 of the canonical form, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(plan).encode()).hexdigest()


def from_canonical(text: str) -> Plan:
    """Read a plan back from its canonical form, as a site receives it.

    Raises
    ------
    SchemaError
        The plan needs a newer schema version, or holds what this release does not know.
    PlanError
        The text is not the canonical form of a plan.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(RuleCode.PLAN_JSON, fix="Send it again") from error
    except ValueError:  # more digits than Python reads
        raise PlanError(_HUGE[0], fix=_HUGE[1]) from None
    except RecursionError:
        raise PlanError(_DEEP[0], fix=_DEEP[1]) from None
    if not isinstance(value, dict):
        raise PlanError(RuleCode.PLAN_OBJECT, value=type(value).__name__, fix="Send it again")
    needed = value.pop(_NEEDS, 1)
    if type(needed) is int and needed > SCHEMA_VERSION:
        raise SchemaError(
            RuleCode.SCHEMA_NEEDED,
            values={"needed": needed, "known": SCHEMA_VERSION},
            fix="Upgrade Fedward here",
        )
    try:
        plan = plan_from(value)
    except PlanError as error:
        # The aggregator's release validated it, whatever version the text states.
        raise SchemaError(
            error.rule,
            value=error.value,
            fix=error.fix,
            where=error.where,
            code=error.code,
            values=error.values,
        ) from None
    if canonical(plan) != text:
        # One plan has one text and one hash; else a denied one would come back under another.
        raise PlanError(RuleCode.PLAN_JSON, fix="Send it again")
    return plan
