"""What earlier rounds told of each site, for strategies that weigh sites by it.

It is worked out anew from the study's results, which checkpoints keep: a study that goes on after a
fault weighs as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fedward.plan.schema import Plan
from fedward.strategies import SitePast
from fedward_server.results import Figures, Round

# A perfect figure must leave its site some weight, and a loss without bound must not overflow.
_LEAST: Final = 0.01
_MOST: Final = 100.0


def pasts(plan: Plan, rounds: Sequence[Round]) -> dict[str, SitePast]:
    """What is known of each site that has taken part.

    Parameters
    ----------
    plan : Plan
        The study.
    rounds : sequence of Round
        Those that have ended.
    """
    evaluated = [one for one in rounds if plan.is_evaluated(one.round, "validation")]
    return {
        site: SitePast(
            tuple(
                shortfall(plan, one.sites[site].validation) if site in one.sites else None
                for one in evaluated
            ),
            tuple(one.sites[site].agreement if site in one.sites else None for one in rounds),
        )
        for site in sorted({name for one in rounds for name in one.sites})
    }


def shortfall(plan: Plan, figures: Figures) -> float | None:
    """How far the primary figure is from perfect, 0.01 to 100; None where it was not released.

    The figure itself where lower is better (a loss), else 1 minus the figure.
    """
    value = figures.get(plan.metrics.primary)
    if value is None:
        return None
    lower = plan.task.spec.metric(plan.metrics.primary).better == "lower"
    return min(max(value if lower else 1.0 - value, _LEAST), _MOST)
