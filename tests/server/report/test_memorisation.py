"""The report's section on what the model remembers."""

from __future__ import annotations

from fedward_server.memorisation import Audit, Inverted, LowerBound, Membership
from fedward_server.report.memorisation import audit_words
from fedward_server.report.page import render
from fedward_server.results import StudyResults


def audit(epsilon: float, promised: float | None = 8.0) -> Audit:
    """An audit whose strongest bound is this."""
    told = Membership(
        attack="LiRA, delivered model",
        members=100,
        others=120,
        auc=0.612,
        auc_error=0.04,
        true_positives={"0.01": (0.05, 0.02, 0.09)},
    )
    bound = LowerBound(
        attack="canaries, all updates",
        site="North",
        epsilon=epsilon + 0.1,
        epsilon_jointly=epsilon,
        promised=promised,
        ceiling=4.2,
        guesses=48,
        correct=42,
    )
    return Audit(
        study="x",
        plan_sha256="0" * 64,
        seed=0,
        shadows=4,
        canaries=24,
        delta=1e-4,
        confidence=0.95,
        memberships=[told],
        bounds=[bound],
        inversions=[Inverted(private=True, mse=0.2, ssim=0.01, correlation=-0.1)],
    )


def test_the_section_stands_only_where_there_was_an_audit(classification: StudyResults) -> None:
    assert "What the model remembers" not in render([classification])
    page = render([classification.model_copy(update={"audit": audit(1.0)})])
    for text in (
        "What the model remembers",
        "0.612 ± 0.040",
        "42 of 48 right",
        "5.0 % (2.0 to 9.0)",
    ):
        assert text in page
    assert "A lower bound is not an upper bound" in page


def test_a_broken_promise_is_told_first_and_a_kept_one_as_not_contradicted() -> None:
    assert (
        audit(9.0).broken and "More was found than the plan promises" in audit_words(audit(9.0))[0]
    )
    assert not audit(7.95).broken  # alone above 8, jointly not
    assert "nothing contradicts it" in audit_words(audit(1.0))[1]
    assert not audit(9.0, promised=None).broken
    assert audit_words(audit(9.0, promised=None))[1] == "The plan promises no ε."
