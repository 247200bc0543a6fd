"""Settings of each strategy, with limits and defaults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedward.plan.schema import StrategyName


@dataclass(frozen=True)
class Setting:
    """One setting of a strategy.

    Attributes
    ----------
    meaning : str
        What it does, for the plan reference.
    default : float or int or None
        Flower's, which holds when a plan leaves it out; none: a plan must give it.
    least, below : float
        The value must be at least ``least`` and less than ``below``.
    above_least : bool
        Whether ``least`` itself is out.
    whole : bool
        Whether it counts something.
    """

    meaning: str
    default: float | int | None = None
    least: float = 0.0
    below: float = float("inf")
    above_least: bool = False
    whole: bool = False

    @property
    def limits(self) -> str:
        """The limits in words."""
        text = f"{'above' if self.above_least else 'at least'} {self.least:g}"
        if self.below != float("inf"):
            text += f", below {self.below:g}"
        return f"a whole number, {text}" if self.whole else text

    def allows(self, value: float) -> bool:
        """Whether a value is within the limits."""
        if self.whole and value != int(value):
            return False
        return (self.least < value or (self.least == value and not self.above_least)) and (
            value < self.below
        )


_ETA = "server learning rate"
_TAU = Setting("adaptivity: added to the root of the second moment", 1e-3, above_least=True)
_BETA_1 = Setting("decay of the first moment", 0.9, below=1.0)
_BETA_2 = Setting("decay of the second moment", 0.99, below=1.0)
_MALICIOUS = Setting("sites that may send anything and must not matter", whole=True)

SETTINGS: dict[StrategyName, dict[str, Setting]] = {
    "fedavg": {},
    "fedprox": {"mu": Setting("weight of the proximal term, (μ/2)·‖w − wᵗ‖²")},
    "fedavgm": {
        "server_learning_rate": Setting(_ETA, 1.0, above_least=True),
        "server_momentum": Setting("server momentum", 0.0, below=1.0),
    },
    "fedadam": {
        "eta": Setting(_ETA, 0.1, above_least=True),
        "beta_1": _BETA_1,
        "beta_2": _BETA_2,
        "tau": _TAU,
    },
    "fedyogi": {
        "eta": Setting(_ETA, 0.01, above_least=True),
        "beta_1": _BETA_1,
        "beta_2": _BETA_2,
        "tau": _TAU,
    },
    "fedadagrad": {"eta": Setting(_ETA, 0.1, above_least=True), "tau": _TAU},
    "fedmedian": {},
    "fedtrimmedavg": {
        "beta": Setting("share cut off at either end of the values", 0.2, below=0.5),
    },
    "krum": {"malicious": _MALICIOUS},
    "multikrum": {
        "malicious": _MALICIOUS,
        "keep": Setting("updates that are kept and averaged", 1, least=1.0, whole=True),
    },
    "bulyan": {"malicious": _MALICIOUS},
}

SUMMARIES: dict[StrategyName, str] = {
    "fedavg": "weighted mean of the updates",
    "fedprox": "weighted mean; sites are held near the shared model while they train",
    "fedavgm": "weighted mean with momentum at the server",
    "fedadam": "Adam at the server",
    "fedyogi": "Yogi at the server",
    "fedadagrad": "Adagrad at the server",
    "fedmedian": "median of each parameter",
    "fedtrimmedavg": "mean of each parameter without its extremes",
    "krum": "the one update that lies nearest to the others",
    "multikrum": "mean of the updates that lie nearest to the others",
    "bulyan": "trimmed mean of the updates that Krum selects",
}

# Strategies that take a step of their own with the mean update.
SERVER_OPTIMIZERS: frozenset[StrategyName] = frozenset(
    ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
)

# Strategies that compare the updates of a round; the others fold each in as it comes.
NEED_ALL: frozenset[StrategyName] = frozenset(
    ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan")
)

_WHOLE = frozenset(
    name for settings in SETTINGS.values() for name, setting in settings.items() if setting.whole
)


def normal(name: str, value: float | int) -> float | int:
    """The one way to write a setting's value: counts as integers, all else as floats."""
    if name in _WHOLE:
        return int(value) if value == int(value) else value
    return float(value)


def updates_needed(strategy: StrategyName, malicious: int) -> int:
    """Updates without which a strategy cannot withstand so many malicious sites.

    Krum needs 2 f + 3 (Blanchard et al., 2017, arXiv:1703.02757), Bulyan 4 f + 3 (El Mhamdi et
    al., 2018, arXiv:1802.07927).
    """
    if strategy in {"krum", "multikrum"}:
        return 2 * malicious + 3
    return 4 * malicious + 3 if strategy == "bulyan" else 1


def broken(strategy: StrategyName, given: dict[str, float | int]) -> Iterator[tuple[str, str]]:
    """The key and rule of each setting that is unknown, missing or out of its limits."""
    known = SETTINGS[strategy]
    for name, value in sorted(given.items()):
        where = f"strategy.settings.{name}"
        if name not in known:
            yield where, f"{strategy} knows {', '.join(sorted(known)) or 'no settings'}; remove it"
        elif not known[name].allows(value):
            yield where, f"{name} must be {known[name].limits}, not {value:g}; change it"
    for name, setting in known.items():
        if setting.default is None and name not in given:
            yield (
                f"strategy.settings.{name}",
                f"{strategy} needs {name} ({setting.meaning}); add it",
            )
