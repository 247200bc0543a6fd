"""How each arm looks, in every chart and legend of a study."""

from __future__ import annotations

from dataclasses import dataclass

from server.report.numbers import ordered
from server.report.svg import VARIABLES
from server.results import StudyResults

_PRIVATE = (
    ("--private-1", "s", "■"),
    ("--private-2", "^", "▲"),
    ("--private-3", "v", "▼"),
    ("--private-4", "P", "✚"),
)
DASHES = ("solid", (0, (5, 1.6)), (0, (1.4, 1.6)), (0, (5, 1.6, 1.4, 1.6)))


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, in every chart of a study.

    Attributes
    ----------
    variable : str
        The style sheet's colour.
    dash : object
        matplotlib's line style.
    border : str
        The nearest CSS border style, for legends.
    marker, symbol : str
        matplotlib's marker, and the character like it for legends.
    """

    variable: str
    dash: object = "solid"
    border: str = "solid"
    marker: str = "o"
    symbol: str = "●"
    thin: bool = False

    @property
    def colour(self) -> str:
        """The colour to hand to matplotlib."""
        return VARIABLES[self.variable]


def looks(results: StudyResults) -> dict[str, Look]:
    """How each arm is drawn, by its name."""
    found, private = {}, 0
    for arm in ordered(results.arms):
        if arm.kind == "alone":
            found[arm.name] = Look("--alone", marker="", symbol="", thin=True)
        elif arm.kind == "pooled":
            found[arm.name] = Look("--pooled", DASHES[2], "dotted", "D", "◆")
        elif arm.epsilon is None:
            found[arm.name] = Look("--federated")
        else:
            variable, marker, symbol = _PRIVATE[private % len(_PRIVATE)]
            found[arm.name] = Look(variable, DASHES[1], "dashed", marker, symbol)
            private += 1
    return found
