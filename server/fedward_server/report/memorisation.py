"""What a report says of an audit: tables, the method, and what they do not show."""

from __future__ import annotations

from collections.abc import Sequence

from fedward_server.memorisation import Audit, LowerBound, Membership
from fedward_server.report.formatting import NOTHING, counted
from fedward_server.report.tables import Cell, Row, Table

METHOD = (
    "Membership inference scores each patient by the mean over the patient's images: the loss, or "
    "the likelihood ratio of LiRA (arXiv:2112.03570) from federations that were trained by the "
    "same plan on random halves of the training patients. Canaries are made-up patients with wrong "
    "labels, each put in by a fair coin and then looked for in the delivered model and in every "
    "single update of a site, by an attacker who knows the canaries and the model before each "
    "update. Lower bounds on ε: from guesses about many patients in one run (arXiv:2305.08846), "
    "and from the true and false positive rates of single steps, composed over the study "
    "(arXiv:2302.07956). Inversion draws one patient's image back out of an update of that "
    "patient alone (arXiv:2003.14053)."
)
LIMITS = (
    "A lower bound is not an upper bound: a better attack may find more, and a bound of 0 says "
    "that these attacks found nothing, not that there is nothing. What so few guesses could show "
    "at most stands beside each bound. Canaries and halves were trained for the audit; their "
    "updates were never released."
)


def audit_tables(audit: Audit) -> list[Table]:
    """Membership inference, lower bounds on ε, gradient inversion; those that were done."""
    tables = (_memberships(audit.memberships), _bounds(audit), _inversions(audit))
    return [table for table in tables if table.rows]


def audit_words(audit: Audit) -> list[str]:
    """The result in a sentence or two."""
    found = [bound for bound in audit.bounds if bound.epsilon > 0]
    words = [
        f"{bound.attack}{_of(bound)}: ε ≥ {bound.epsilon_jointly:.2f}" for bound in audit.broken
    ]
    if words:
        return [f"More was found than the plan promises: {'; '.join(words)}."]
    promised = next((b.promised for b in audit.bounds if b.promised is not None), None)
    sure = f"at δ = {audit.delta:g}, with {100 * audit.confidence:g} % confidence"
    if not found:
        told = f"No attack bounded ε from below {sure}."
    else:
        top = max(found, key=lambda bound: bound.epsilon)
        told = f"The largest lower bound is ε ≥ {top.epsilon:.2f} {sure} ({top.attack}{_of(top)})."
    if promised is None:
        return [told, "The plan promises no ε."]
    return [told, f"The plan promises ε ≤ {promised:g} per site; nothing contradicts it."]


def _of(bound: LowerBound) -> str:
    return f", {bound.site}" if bound.site else ""


def _memberships(found: Sequence[Membership]) -> Table:
    rows = [
        Row(
            one.attack,
            [
                Cell(f"{one.members:,}"),
                Cell(f"{one.others:,}"),
                Cell(f"{one.auc:.3f} ± {one.auc_error:.3f}"),
                *(Cell(_rate(one, rate)) for rate in ("0.01", "0.001")),
            ],
        )
        for one in found
    ]
    columns = ["members", "others", "AUC", "found at 1 % false", "found at 0.1 % false"]
    return Table("Membership inference, by patient", "attack", columns, rows)


def _rate(one: Membership, rate: str) -> str:
    if rate not in one.true_positives:
        return NOTHING
    value, low, high = one.true_positives[rate]
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _bounds(audit: Audit) -> Table:
    rows = [
        Row(
            one.attack,
            [
                Cell(one.site or "all"),
                Cell(f"{one.epsilon:.2f}"),
                Cell(NOTHING if one.promised is None else f"{one.promised:g}"),
                Cell(NOTHING if one.ceiling is None else f"{one.ceiling:.2f}"),
                Cell(_right(one)),
            ],
        )
        for one in audit.bounds
    ]
    columns = ["site", "ε at least", "promised", "at most seen", "guesses"]
    caption = f"Lower bounds on ε at δ = {audit.delta:g}"
    return Table(caption, "attack", columns, rows, frozenset({0}))


def _right(one: LowerBound) -> str:
    if one.correct is None:
        return counted(one.guesses, "trial")
    return f"{one.correct:,} of {one.guesses:,} right"


def _inversions(audit: Audit) -> Table:
    rows = [
        Row(
            "with privacy" if one.private else "without privacy",
            [
                Cell(f"{one.mse:.3f}"),
                Cell(f"{one.ssim:.3f}"),
                Cell(f"{one.correlation:.3f}"),
            ],
        )
        for one in audit.inversions
    ]
    columns = ["mean squared error", "SSIM", "correlation"]
    caption = "An image drawn back out of one update, against the original"
    return Table(caption, "update", columns, rows)
