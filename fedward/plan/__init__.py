"""The study plan: schema, rules, canonical form."""

from fedward.plan.load import (
    SCHEMA_VERSION,
    canonical,
    from_canonical,
    load_plan,
    parse_plan,
    plan_from,
    plan_hash,
    schema_needed,
)
from fedward.plan.schema import Plan, Stage

__all__ = [
    "SCHEMA_VERSION",
    "Plan",
    "Stage",
    "canonical",
    "from_canonical",
    "load_plan",
    "parse_plan",
    "plan_from",
    "plan_hash",
    "schema_needed",
]
