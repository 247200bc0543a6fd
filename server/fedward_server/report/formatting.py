"""Figures in words: names of metrics, numbers as text."""

from __future__ import annotations

from collections.abc import Iterable

from fedward.tasks.registry import METRICS

NOTHING = "–"
_DIGITS = 3
SYNTHETIC = "A program made these images. Nothing here speaks of real patients."
INTERVALS = (
    "Intervals are of 95 % and by patient: images of one patient are taken as alike, and the noise "
    "of private counts is in them. Shares: Wilson; AUC: DeLong, below ten patients Newcombe; Dice, "
    "IoU and distances: Student. "
    "A paired interval is of differences patient by patient (jackknife), which a simulation has. "
    "Otherwise, and for the marks in tables, two models are taken as independent although they "
    "answer on the same patients, which makes the interval of a difference wider."
)
INTERRUPTED = "The study did not run to its end. Only what was finished is shown."


def metric_name(metric: str) -> str:
    """A metric as people call it."""
    return METRICS[metric].label if metric in METRICS else metric.replace("_", " ")


def figure(value: float | None, metric: str = "") -> str:
    """A figure with the metric's decimals, without one with three; or a dash."""
    digits = METRICS[metric].digits if metric in METRICS else _DIGITS
    return NOTHING if value is None else f"{value:.{digits}f}"


def signed(value: float, metric: str = "") -> str:
    """A difference with its sign: ``+0.100``, ``−0.004``, ``0.000``."""
    text = figure(abs(value), metric)
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def interval(limits: tuple[float, float], metric: str = "") -> str:
    """``0.932–0.968``."""
    return f"{figure(limits[0], metric)}–{figure(limits[1], metric)}"


def epsilon(value: float | None) -> str:
    """``ε = 8``."""
    return NOTHING if value is None else f"ε = {value:g}"


def percent(share: float) -> str:
    """``62 %``, ``99.9 %``; only a whole is 100 %."""
    text = f"{100 * share:.0f}" if share < 0.985 else f"{100 * share:.6g}"
    return f"{text} %" if share == 1 or float(text) < 100 else "more than 99.9999 %"


def listed(parts: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = list(parts) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def counted(number: int, word: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``4 min 05 s``, ``2 h 03 min``."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(number: float) -> str:
    """Bytes as ``512 B``, ``12.3 kB``, ``4.56 MB``."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 2)):
        if number < 1000 or (unit == "MB" and number < 1e4):
            return f"{number:.{digits}f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def runs(numbers: Iterable[int]) -> str:
    """``1–3, 7``: whole numbers, neighbours joined."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in spans)
