"""The study plan: schema, rules, canonical form."""

from fedward.plan.load import canonical, from_canonical, load_plan, parse_plan, plan_from, plan_hash
from fedward.plan.schema import Plan, Stage

__all__ = [
    "Plan",
    "Stage",
    "canonical",
    "from_canonical",
    "load_plan",
    "parse_plan",
    "plan_from",
    "plan_hash",
]
