"""Which tokens take which depth, drawn over the text itself: a PNG, and a page of HTML that says each token's layers.

L layers that only some tokens go through, S tokens.
"""

from __future__ import annotations

import dataclasses
import html
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex

from moe_zoo.analysis import plots

_DEPTH = LinearSegmentedColormap.from_list("depth", ["#f6f5f1", "#f7d9b0", "#f0a35e", "#d55e00", "#6e2600"])
_COLUMNS, _LINES = 88, 24  # of the PNG


@dataclasses.dataclass(frozen=True)
class TokenDepth:
    """`texts`: of each token; empty where a character is not complete yet. `through_LS`: how often each went through
    each of the `layers`, which have these ids.
    """

    texts: Sequence[str]
    through_LS: np.ndarray
    layers: Sequence[int]

    @property
    def depth_S(self) -> np.ndarray:
        """How many of the layers, repeats counted, each token went through."""
        return self.through_LS.sum(0)


def token_depth(loaded: Any, text: str, length: int | None = None) -> TokenDepth:
    """What a loaded model (`moe_zoo.load`) does with a text, each token decided as in generation.

    `length`: in pieces of so many tokens, each read from its beginning; None: as one. Raises ValueError for a model all
    of whose layers take all tokens, and for an empty text.
    """
    layers = sorted(i for _, block, ids in loaded.model.blocks() if block.selects for i in ids)
    if not layers:
        raise ValueError("every layer of this model takes every token: there is no depth to draw")
    ids = np.asarray(loaded.tokenizer.encode(text), np.int32)
    if not len(ids):
        raise ValueError("no text: there is nothing to draw")
    length = min(length or len(ids), len(ids))
    rows = np.resize(ids, (-(-len(ids) // length), length))  # the last row is filled up with what is not looked at
    stats = loaded(rows, return_routing=True).aux.stats
    through_LS = np.stack([np.asarray(through_BS).reshape(-1)[: len(ids)] for through_BS in stats["depth_through"]])
    return TokenDepth(_texts(loaded.tokenizer, ids), through_LS, layers)


def _texts(tokenizer: Any, ids: np.ndarray) -> list[str]:
    from moe_zoo.inference.text import Pieces

    pieces = Pieces(tokenizer)
    texts = [pieces.feed([i]) for i in ids]
    texts[-1] += pieces.finish()
    return texts


def plot_token_depth(found: TokenDepth, path: str | os.PathLike[str]) -> pathlib.Path:
    """The text, each character on the colour of its token's depth; what does not fit on 24 lines of 88 is left out.

    A character of several tokens (bytes) has their mean.
    """
    characters, depths = _characters(found)
    lines = _wrapped(characters)
    shown = lines[:_LINES]
    image = np.full((len(shown), _COLUMNS), np.nan)
    for row, line in enumerate(shown):
        image[row, : len(line)] = [depths[i] for i in line]
    most = max(1, int(found.through_LS.max())) * len(found.layers)
    figure, (axes,) = plots._figure(8.0, 0.19 * len(shown) + 1.5)
    drawn = axes.imshow(image, cmap=_DEPTH, vmin=0, vmax=most, aspect="auto", interpolation="nearest")
    for row, line in enumerate(shown):
        for column, i in enumerate(line):
            ink = "white" if depths[i] > 0.62 * most else plots._INK
            axes.text(column, row, _drawable(characters[i]), family="DejaVu Sans Mono", fontsize=8, color=ink,
                      ha="center", va="center", parse_math=False)  # fmt: skip
    axes.set_axis_off()
    bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.02, orientation="horizontal", shrink=0.4, aspect=40)
    bar.set_label("layers that the token went through", size=9)
    bar.set_ticks(range(0, most + 1, max(1, most // 8)))
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    left = len(lines) - len(shown)
    figure.suptitle("Which tokens take which depth", x=0.01, ha="left", fontsize=13, weight="bold", color=plots._INK)
    axes.set_title(_note(found) + (f"; {left} more lines are not shown" if left else ""), loc="left", fontsize=8.5,
                   color=plots._MUTED)  # fmt: skip
    return plots._save(figure, path)


def write_token_depth(found: TokenDepth, path: str | os.PathLike[str]) -> pathlib.Path:
    """The same as a page that needs nothing else: each token says its layers, and a layer can be looked at alone."""
    most = max(1, int(found.through_LS.max()))
    spans = []
    for text, through_L in zip(*_whole(found)):
        went = [f"{i}" + ("" if n == 1 else f" (x{n:g})") for i, n in zip(found.layers, through_L) if n]
        where = f"layers {', '.join(went)}" if went else "none of the layers"
        data = ",".join(f"{n:g}" for n in through_L)
        spans.append(f'<span title="{where}" data-n="{data}">{html.escape(text)}</span>')
    choices = "".join(f'<option value="{k}">layer {i}</option>' for k, i in enumerate(found.layers))
    scale = [to_hex(_DEPTH(i / 16)) for i in range(17)]
    page = (
        _PAGE.replace("{spans}", "".join(spans)).replace("{choices}", choices).replace("{scale}", repr(scale))
        .replace("{note}", html.escape(_note(found))).replace("{most}", str(most))
    )  # fmt: skip
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _note(found: TokenDepth) -> str:
    share = (found.through_LS > 0).mean()
    layers = f"layer{'s' if len(found.layers) > 1 else ''} {', '.join(map(str, found.layers))}"
    return f"{len(found.texts)} tokens; {share:.0%} of them go through a layer on average; {layers}"


def _whole(found: TokenDepth) -> tuple[list[str], list[np.ndarray]]:
    """Tokens with text, and how often each went through: those without are averaged into the next that has some."""
    texts, throughs, waiting = [], [], []
    for text, through_L in zip(found.texts, found.through_LS.T):
        waiting.append(through_L)
        if text:
            texts.append(text)
            throughs.append(np.mean(waiting, axis=0))
            waiting = []
    return texts, throughs


def _characters(found: TokenDepth) -> tuple[list[str], list[float]]:
    texts, throughs = _whole(found)
    pairs = [(c, through_L.sum()) for text, through_L in zip(texts, throughs) for c in text]
    return [c for c, _ in pairs], [d for _, d in pairs]


def _wrapped(characters: Sequence[str]) -> list[list[int]]:
    """Lines of indices of characters: broken at line breaks, after spaces where possible."""
    lines, line = [], []
    for i, character in enumerate(characters):
        line.append(i)
        if character == "\n":
            lines.append(line)
            line = []
        elif len(line) == _COLUMNS:
            at = next((k for k in range(len(line), _COLUMNS // 2, -1) if characters[line[k - 1]] == " "), len(line))
            lines.append(line[:at])
            line = line[at:]
    return [*lines, line] if line else lines


def _drawable(character: str) -> str:
    """What the font has; a place holder for the rest."""
    if character == "\n":
        return "⏎"
    return character if character.isprintable() and ord(character) < 0x2000 else "▯"


_PAGE = """<!doctype html><meta charset="utf-8"><title>Which tokens take which depth</title>
<style>
body { font: 15px/1.7 ui-monospace, "DejaVu Sans Mono", monospace; max-width: 60rem; margin: 2rem auto; color: #22262b }
h1 { font: 600 1.2rem system-ui, sans-serif } p, label { font: 0.85rem system-ui, sans-serif; color: #6b7280 }
main { white-space: pre-wrap; overflow-wrap: anywhere } span { border-radius: 2px }
span:hover { outline: 1px solid #22262b }
</style>
<h1>Which tokens take which depth</h1><p>{note}. The darker, the more; hold the pointer over a token.</p>
<label>Show <select id="layer"><option value="all">all layers</option>{choices}</select></label>
<main>{spans}</main>
<script>
const scale = {scale}, most = {most}, spans = document.querySelectorAll("main span");
function paint() {
  const layer = document.getElementById("layer").value;
  for (const span of spans) {
    const n = span.dataset.n.split(",").map(Number);
    const part = layer === "all" ? n.reduce((a, b) => a + b) / (most * n.length) : n[layer] / most;
    const at = Math.round(16 * part);
    span.style.background = scale[at];
    span.style.color = at > 10 ? "white" : "inherit";
  }
}
document.getElementById("layer").onchange = paint;
paint();
</script>
"""
