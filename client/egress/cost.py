"""What an update says of its making follows from the plan and the patients; anything else stays."""

from __future__ import annotations

from client.training.batches import count_steps
from fedward.errors import EgressError, FedwardError
from fedward.plan.schema import Plan
from fedward.privacy import calibrate, epsilon_spent, steps_per_round
from fedward.protocol import TrainOutcome


def check_cost(plan: Plan, outcome: TrainOutcome) -> None:
    """Work out steps, noise, rate and ε again and compare: a free number could be anybody's.

    Raises
    ------
    EgressError
        One of them is another.
    """
    stated = (outcome.epsilon, outcome.delta, outcome.noise_multiplier, outcome.sampling_rate)
    if plan.privacy.on:
        _private(plan, outcome)
    elif any(value is not None for value in stated):
        raise _wrong("an update without privacy must not state its cost")
    elif outcome.steps != _steps(plan, outcome.images):
        raise _wrong("an update must take the plan's steps")


def _private(plan: Plan, outcome: TrainOutcome) -> None:
    try:
        mechanism = calibrate(plan, outcome.patients)
        each = steps_per_round(plan, mechanism.sampling_rate)
        spent = epsilon_spent(
            mechanism.noise_multiplier,
            mechanism.sampling_rate,
            each * outcome.round,
            plan.privacy.delta or 0.0,
        )
    except FedwardError:
        raise _wrong("what an update cost must be accountable") from None
    ran = (outcome.noise_multiplier, outcome.sampling_rate, outcome.delta, outcome.steps)
    if ran != (mechanism.noise_multiplier, mechanism.sampling_rate, plan.privacy.delta, each):
        raise _wrong("a private update must come from the mechanism that its plan asks for")
    if outcome.epsilon is not None and outcome.epsilon != spent:
        raise _wrong("a private update must state what it cost")


def _steps(plan: Plan, images: int) -> int:
    training = plan.training
    return count_steps(
        images, training.batch_size, epochs=training.local_epochs, steps=training.local_steps
    )


def _wrong(rule: str) -> EgressError:
    return EgressError(rule, fix="Nothing was sent; report it")
