"""From an error to the refusal that a site may send."""

from __future__ import annotations

from typing import Final

from client.egress.words import FALLBACK
from fedward.errors import (
    BudgetError,
    DataError,
    FedwardError,
    ModelError,
    PlanError,
    PolicyError,
    PrivacyError,
    ProtocolError,
)
from fedward.printable import printable
from fedward.protocol import Refusal, RefusalKind

_KINDS: Final[tuple[tuple[type[FedwardError], RefusalKind], ...]] = (
    (PolicyError, "policy"),
    (BudgetError, "budget"),
    (PrivacyError, "privacy"),
    (DataError, "data"),
    (ProtocolError, "protocol"),
    (PlanError, "protocol"),
    (ModelError, "protocol"),
)


def refusal_for(
    error: BaseException, site: str, round_: int, kind: RefusalKind | None = None
) -> Refusal:
    """What a site says in place of a reply; give it to :meth:`client.egress.Gate.check_refusal`.

    Parameters
    ----------
    error : BaseException
        What stopped it. Only what was raised on purpose has words of its own.
    site, round_ : str, int
        Whose refusal it is, and in which round (0 outside rounds).
    kind : str, optional
        Whose turn it is; by default that follows from the kind of error.
    """
    if not isinstance(error, FedwardError):
        return Refusal(site=site, round=round_, kind=kind or "error", rule=FALLBACK["error"])
    by_error: RefusalKind = next((k for of, k in _KINDS if isinstance(error, of)), "error")
    chosen = kind or by_error
    value = error.where if error.value is None else str(error.value)
    rule, value = printable(error.rule)[:500], printable(value)[:200]
    return Refusal(site=site, round=round_, kind=chosen, rule=rule, value=value)
