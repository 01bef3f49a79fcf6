"""Charts as SVG text, drawn by matplotlib."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from outrider.console import count

INK, GRID = "#1c2430", "#d8dee6"
COLOURS = ("#0b6e4f", "#c8553d", "#2f4b7c", "#e0a100", "#7a5195", "#4a8fb8")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "outrider", "font.family": "sans-serif", "font.size": 10,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False,
}


def _styled(draw: Callable[..., str]) -> Callable[..., str]:
    """Draw in the report's style, from the first label to the saved text."""

    @functools.wraps(draw)
    def drawn(*arguments: Any) -> str:
        with mpl.rc_context(_STYLE):
            return draw(*arguments)

    return drawn


@_styled
def loss_chart(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str) -> str:
    """Return lines over tokens: name -> (tokens, values)."""
    axes, figure = _axes()
    for index, (tokens, values) in enumerate(curves.values()):
        axes.plot(tokens, values, color=COLOURS[index % len(COLOURS)], linewidth=1.6,
                  marker="o" if len(values) < 3 else None)
    axes.set(xlabel="tokens", ylabel=ylabel)
    axes.xaxis.set_major_formatter(_tokens)
    # By handle: a name that begins with an underscore is left out otherwise.
    axes.legend(axes.lines, list(curves), frameon=False)
    return _svg(figure)


@_styled
def acceptance_chart(curves: Mapping[str, Sequence[float]]) -> str:
    """Return acceptance by place in the proposal: name -> shares."""
    axes, figure = _axes()
    for index, shares in enumerate(curves.values()):
        axes.plot(range(1, len(shares) + 1), shares, marker="o", color=COLOURS[index % len(COLOURS)])
    axes.set(xlabel="place in the proposal", ylabel="share accepted", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # By handle: a name that begins with an underscore is left out otherwise.
    axes.legend(axes.lines, list(curves), frameon=False)
    return _svg(figure)


@_styled
def speed_chart(bars: Mapping[str, tuple[float, float]]) -> str:
    """Return pairs of bars: name -> tokens/s alone and with the draft."""
    axes, figure = _axes(height=1.3 + 0.8 * len(bars))
    for index, (alone, drafted) in enumerate(bars.values()):
        axes.barh(index - 0.18, alone, height=0.34, color=GRID, label="target alone" if not index else None)
        axes.barh(index + 0.18, drafted, height=0.34, color=COLOURS[0], label="with the draft" if not index else None)
        axes.text(drafted, index + 0.18, f" {drafted / alone:.2f}x", va="center", fontweight="bold")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second")
    axes.margins(x=0.15)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.grid(axis="y", visible=False)
    return _svg(figure)


def _axes(height: float = 3.4) -> tuple[Any, Figure]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes, figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # matplotlib's metadata names web addresses; nothing in the page should.
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg"):], flags=re.DOTALL)


def _tokens(value: float, _position: object = None) -> str:
    return count(value).replace(".00", "").replace(".0", "")
