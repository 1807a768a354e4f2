"""The look of the comparison's figures: one drawing, as SVG for the page (which may be dark) and as PNG for a slide.

Ink and grid are drawn in colours that the page knows as variables; entries keep theirs in both.
"""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_zoo.analysis.plots import spread
from moe_zoo.compare.entries import REFERENCE
from moe_zoo.train.config import known_configs

PAGE = 11.5  # inches of a figure as wide as the page
INK, MUTED, FAINT = "#22262b", "#6b7280", "#d9dce1"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", FAINT: "var(--faint)"}
#: told apart on white and on near-black, neighbours also with the common forms of colour blindness
_PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#3aa6dd", "#7f5bd6", "#a0623a", "#d62f6d", "#7a9a1f",
    "#12a5a5", "#9a8f00",
)  # fmt: skip


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per entry, the same on every page: the reference in ink, the others by their place in the list of all
    entries, whichever are shown.
    """
    known = {name: path for name, path in known_configs().items() if "/" not in name}
    entries = [name for name, path in known.items() if "\nCLAIM = " in path.read_text(encoding="utf-8")]
    others = [name for name in [*entries, *sorted(set(names) - set(entries))] if name != REFERENCE]
    return {REFERENCE: INK} | {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(others)}


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, its panels in reading order."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = list(drawn.subplots(rows, columns, squeeze=False, **grid).flat)
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        for spine in axes.spines.values():
            spine.set_color(FAINT)
        axes.tick_params(colors=FAINT, labelcolor=MUTED, labelsize=8, length=3)
        axes.xaxis.label.set(color=MUTED, size=8.5)
        axes.yaxis.label.set(color=MUTED, size=8.5)
    return drawn, panels


def title(axes: Axes, text: str, colour: str = INK, note: str = "", size: float = 10) -> None:
    """Above the axes: a title on the left, a muted note on the right."""
    axes.set_title(text, loc="left", fontsize=size, weight="bold", color=colour)
    if note:
        axes.set_title(note, loc="right", fontsize=size - 1.5, color=MUTED)


def name_curves(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.06) -> None:
    """(height, text, colour) of each curve's end, written right of the axes, moved apart where they would meet."""
    low, high = axes.get_ylim()
    ends = sorted(ends)
    heights = [min(max((height - low) / (high - low), 0), 1) for height, *_ in ends]
    places = spread(heights, gap)
    # a crowd at the bottom would hang out of the figure: the lowest labels move up, and push others only if need be
    for i in range(len(places)):
        places[i] = max(places[i], i * gap)
    for true, height, (_, text, colour) in zip(heights, places, ends, strict=True):
        line = {"color": colour, "linewidth": 0.8, "clip_on": False, "transform": axes.transAxes}
        axes.plot([1.01, 1.05], [true, height], **line)
        axes.text(1.06, height, text, transform=axes.transAxes, color=colour, va="center", fontsize=8.5)


def to_svg(drawn: Figure) -> str:
    """An <svg> element for the page: no wider than its column, text as text, ink in the page's variables."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moe_zoo"}):
        drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # narrow figures stay narrow, so that letters are as large in all of them
    width = f"max-width: {min(100, 100 * drawn.get_figwidth() / PAGE):.0f}%"
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', rf'\1 style="{width}"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def save_png(drawn: Figure, path: Path) -> Path:
    """On white, 160 dots per inch, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=160, facecolor="white")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.getvalue())
    os.replace(temporary, path)
    return path
