"""From a matplotlib figure to an inline SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that matplotlib draws with, each standing for a variable of the page's style sheet, so
# that one drawing serves light, dark and print.
COLOURS: dict[str, str] = {
    "#0a0001": "--ink",
    "#0a0002": "--muted",
    "#0a0003": "--line",
    "#0a0004": "--paper",
    "#0a0005": "--warn",
    "#0a0010": "--alone",
    "#0a0011": "--federated",
    "#0a0012": "--private-1",
    "#0a0013": "--private-2",
    "#0a0014": "--private-3",
    "#0a0015": "--private-4",
    "#0a0016": "--pooled",
}
VARIABLES = {variable: colour for colour, variable in COLOURS.items()}
INK, MUTED, LINE, PAPER, WARN = (
    VARIABLES[name] for name in ("--ink", "--muted", "--line", "--paper", "--warn")
)

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedward",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
_XML = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style.*?</style>", re.DOTALL
)
_OPEN = re.compile(r"<svg\b[^>]*?viewBox=\"([^\"]+)\"[^>]*>", re.DOTALL)


def draw(
    plot: Callable[[Axes], None], *, name: str, words: str, width: float = 4.8, height: float = 2.7
) -> str:
    """Draw into fresh axes and give the SVG element.

    Parameters
    ----------
    plot : callable
        Draws into the axes, with colours from this module.
    name : str
        Letters, digits and hyphens; makes the element's ids unique in the page.
    words : str
        What a reader who does not see the picture is told.
    width, height : float
        Inches; the page scales the picture to the room there is.
    """
    # Imported here: loading matplotlib takes longer than a run's start may.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE), _unknown_glyphs():
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        canvas, axes = FigureCanvasSVG(figure), figure.add_subplot(facecolor="none")
        plot(axes)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, words)


@contextmanager
def _unknown_glyphs() -> Iterator[None]:
    # The browser sets the text, with its own fonts; the one used for measuring need not know it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def _inline(text: str, name: str, words: str) -> str:
    text = _XML.sub("", text)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r"#0a00[0-9a-f]{2}", lambda match: f"var({COLOURS[match[0]]})", text)
    label = escape(words)
    return _OPEN.sub(
        lambda match: f'<svg viewBox="{match[1]}" role="img" aria-label="{label}">', text, count=1
    ).strip()
