"""Which of a study's shared models it delivers, and whether more rounds are worth their price.

Both are worked out anew from the study's results, which checkpoints keep: a study that goes on
after a fault chooses as it would have. They read figures that the sites released, so that they cost
no patient's budget (post-processing; Dwork and Roth, 2014, proposition 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence

from fedward.plan.schema import Plan
from fedward_server.results import Round
from fedward_strategies.averaging import decay_at


def best_round(plan: Plan, rounds: Sequence[Round]) -> int | None:
    """The round with the best primary figure on validation patients; None where none has one.

    The first of equals.
    """
    found = None
    for one in rounds:
        value = one.validation.get(plan.metrics.primary)
        if value is None:
            continue
        score = value if plan.task.spec.metric(plan.metrics.primary).better == "higher" else -value
        if found is None or score > found[0]:
            found = score, one.round
    return None if found is None else found[1]


def out_of_patience(plan: Plan, rounds: Sequence[Round]) -> bool:
    """Whether the last stage has gone on for the plan's patience without the best figure so far.

    A round whose figure nobody released tells nothing, and does not count.
    """
    patience = plan.training.patience
    if patience is None:
        return False
    last = [one for one in rounds if one.stage == plan.schedule[-1].name]
    told = [one for one in last if one.validation.get(plan.metrics.primary) is not None]
    best = best_round(plan, rounds)
    return best is not None and sum(one.round > best for one in told) >= patience


def average_decay(plan: Plan, round_: int) -> float:
    """How much of the average so far stays in that of the delivered model after a round.

    With ``keep = "averaged"`` it is the mean of the last rounds' models; the average is the newest
    model until they begin.
    """
    among = plan.training.averaged_rounds
    if among is None:
        return decay_at(round_, plan.strategy.averaging)
    place = round_ - (plan.rounds - among)  # from 1 within those rounds
    return (place - 1) / place if place > 1 else 0.0
