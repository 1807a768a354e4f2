"""Pictures of a run: the loss, how the load of the experts develops, and which domain uses which expert.

Each function takes plain data and a path, writes a PNG of 150 dots per inch in one step (a reader never sees half a
file), and returns the path. Figures are matplotlib objects of their own: no pyplot, no global state, safe in a training
process. Colours are told apart with every common form of colour blindness.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from moe_zoo.analysis.specialization import Specialization

_DPI = 150
_INK, _MUTED, _FAINT = "#22262b", "#6b7280", "#d9dce1"
_BLUE, _ORANGE = "#0072b2", "#d55e00"  # after Okabe and Ito
BELOW_AND_ABOVE = LinearSegmentedColormap.from_list(
    "below_and_above", ["#08306b", "#2673b5", "#93c1e2", "#f6f5f1", "#f3b183", "#d55e00", "#6e2600"]
).with_extremes(bad="#c9ccd1")
_MAX_COLUMNS = 150  # of a heatmap over steps: a column then averages out the noise of single batches
_SORT_ABOVE, _SORT_UP_TO = 16, 64  # experts per layer: below, ids read better; above, sorted ids could not be read


# ---------------------------------------------------------------------------------------------------------------- loss


def plot_loss(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    baselines: Mapping[str, float] | None = None,
) -> pathlib.Path:
    """Bits per byte over training: training batches (faint, and smoothed), validation, and compressors as levels.

    Args:
        history: lines of `read_metrics`; those of kind "train" hold step, bits_per_byte and perhaps tokens and seconds,
            those of kind "validation" step and bits_per_byte. Others are passed over.
        path: where to write the PNG.
        baselines: name to bits per byte on the same text, such as {"gzip -9": 2.3}.
    """
    train_x, train_y = _curve(history, "train")
    valid_x, valid_y = _curve(history, "validation")
    if not len(train_y) and not len(valid_y):
        return _save_note(path, "No bits per byte were recorded")
    figure, (axes,) = _figure(8.0, 4.6)
    baselines = {name: level for name, level in (baselines or {}).items() if math.isfinite(level) and level > 0}
    labels = []  # (level, text, colour, weight), written at the right end of each curve
    for name, level in baselines.items():
        axes.axhline(level, color=_MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        labels.append((level, f"{name}  {level:.2f}", _MUTED, "normal"))
    if len(train_y):
        smooth = _smoothed(train_y)
        axes.plot(train_x, train_y, color=_BLUE, alpha=0.22, linewidth=0.8)
        axes.plot(train_x, smooth, color=_BLUE, linewidth=1.8, marker="o" if len(train_y) == 1 else None, markersize=4)
        labels.append((smooth[-1], f"training  {smooth[-1]:.2f}", _BLUE, "bold"))
    if len(valid_y):
        axes.plot(
            valid_x,
            valid_y,
            color=_ORANGE,
            linewidth=1.2,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=4,
            clip_on=False,
        )
        labels.append((valid_y[-1], f"validation  {valid_y[-1]:.2f}", _ORANGE, "bold"))
    # The curve comes in from above: its first steps would take most of the height, and nobody looks at them.
    shown = train_y[len(train_y) // 25 :]
    _loss_axes(axes, [*shown, *valid_y, *baselines.values()], history)
    _direct_labels(axes, labels)
    _title(axes, "Bits per byte over training", _run_summary(history))
    return _save(figure, path)


def _curve(history: Sequence[Mapping[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, bits per byte) of one kind of line, where finite; x is tokens if training lines know them, else steps."""
    lines = [line for line in history if line.get("kind") == kind and "bits_per_byte" in line and "step" in line]
    x = np.asarray([line["step"] for line in lines], np.float64)
    y = np.asarray([line["bits_per_byte"] for line in lines], np.float64)
    if _has_tokens(history) and len(x):
        known = sorted((line["step"], line["tokens"]) for line in history if line.get("kind") == "train")
        steps, tokens = np.asarray(known, np.float64).T
        # Lines of validation need not know the tokens: through the origin and along the training lines.
        x = np.interp(x, np.append(0.0, steps), np.append(0.0, tokens))
    good = np.isfinite(y) & (y > 0)
    return x[good], y[good]


def _has_tokens(history: Sequence[Mapping[str, Any]]) -> bool:
    train = [line for line in history if line.get("kind") == "train"]
    return bool(train) and all("tokens" in line and "step" in line for line in train)


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Mean over a window of a thirtieth of the curve, narrower towards the start where the curve is steep."""
    index = np.arange(len(y))
    radius = np.minimum(max(1, len(y) // 60), index)
    low, high = index - radius, np.minimum(index + radius, len(y) - 1) + 1
    total = np.append(0.0, np.cumsum(y))
    return (total[high] - total[low]) / (high - low)


def _loss_axes(axes: Axes, levels: Sequence[float], history: Sequence[Mapping[str, Any]]) -> None:
    """Axes that hold these levels, on a log scale: equal heights are equal ratios of compression."""
    axes.set_yscale("log")
    low, high = min(levels) / 1.05, max(levels) * 1.04
    axes.set_ylim(low, max(high, low * 1.2))
    low, high = axes.get_ylim()
    fine = [0.1 * n for n in range(1, 10)] + [1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4]
    ticks = fine if high < 4.5 else [0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks if len(ticks) > 2 else MaxNLocator(5).tick_values(low, high)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    axes.set_xlabel("tokens seen" if _has_tokens(history) else "step")
    axes.set_ylabel("bits per byte (log scale)")


def _direct_labels(axes: Axes, labels: Sequence[tuple[float, str, str, str]]) -> None:
    """Names each curve at its right end instead of in a legend; labels that would overlap are moved apart."""
    low, high = np.log(axes.get_ylim())
    labels = sorted(labels)
    heights = [(math.log(level) - low) / (high - low) for level, *_ in labels]
    for true_height, height, (_, text, colour, weight) in zip(heights, spread(heights, gap=0.06), labels, strict=True):
        axes.plot(
            [1.005, 1.035], [true_height, height], transform=axes.transAxes, color=colour, linewidth=0.8, clip_on=False
        )
        axes.text(1.045, height, text, transform=axes.transAxes, color=colour, weight=weight, va="center", fontsize=10)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Moves ascending heights apart by at least `gap`, keeping each crowded group centred where it was."""
    groups: list[tuple[float, int]] = []  # centre, size
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1:
            (below, few), (above, more) = groups[-2:]
            if above - below >= gap * (few + more) / 2:
                break
            groups[-2:] = [((below * few + above * more) / (few + more), few + more)]
    return [centre + gap * (place - (size - 1) / 2) for centre, size in groups for place in range(size)]


def _run_summary(history: Sequence[Mapping[str, Any]]) -> str:
    lines = [line for line in history if line.get("kind") == "train" and "step" in line]
    if not lines:
        return "no training lines"
    parts = [f"{lines[-1]['step']:,} steps"]
    if _has_tokens(history):
        parts.append(f"{_compact(lines[-1]['tokens'])} tokens")
    if "seconds" in lines[-1]:
        seconds = lines[-1]["seconds"]
        parts.append(f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds")
    return ", ".join(parts)


# --------------------------------------------------------------------------------------------------------- expert load


def plot_expert_load(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> pathlib.Path:
    """The share of each expert over training, one panel per MoE layer: experts upwards, steps to the right.

    Colour is the share over an even share, on a log scale: white for even, orange for a busy expert, blue for an idle.

    Args:
        history: lines of `read_metrics`; those of kind "train" hold "step" and "expert_load", a list over layers of
            lists over experts of shares that sum to 1. Lines whose shape is not that of the last one are passed over.
        path: where to write the PNG.
    """
    steps, loads_LES = _load_history(history)
    if not loads_LES:
        return _save_note(path, "No expert load was recorded")
    num_layers = len(loads_LES)
    columns = _grid_columns(num_layers)
    rows = -(-num_layers // columns)
    width = {1: 7.4, 2: 4.6, 3: 3.7, 4: 3.1}.get(columns, 15.0 / columns)
    height = {1: 3.4, 2: 2.4, 3: 2.1}.get(rows, 1.75 if rows <= 4 else 1.45)
    figure, panels = _figure(columns * width + 1.1, rows * height + 0.8, rows, columns)
    limit = _colour_limit([np.log2(np.maximum(load, 1e-6)) for load in loads_LES])
    edges = _edges(steps)
    same_ids = len({len(load_ES) for load_ES in loads_LES}) == 1
    for layer, (axes, load_ES) in enumerate(zip(panels, loads_LES, strict=False)):
        image = _load_panel(axes, layer, edges, load_ES, limit)
        if layer % columns == 0:
            axes.set_ylabel("expert")
        elif same_ids:
            axes.tick_params(labelleft=False)
        if layer + columns >= num_layers:
            axes.set_xlabel("step")
        else:
            axes.tick_params(labelbottom=False)
    for axes in panels[num_layers:]:
        axes.set_axis_off()
    _colour_bar(figure, panels, image, limit, "load ÷ even share", figure_height=rows * height + 0.8)
    _heading(
        figure, "Expert load over training", "numbers: idlest and busiest expert over the last tenth, ÷ even share"
    )
    return _save(figure, path)


def _load_history(history: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Steps `[S]`, and per layer the load over an even share `[E, S]`, averaged into at most `_MAX_COLUMNS` columns."""
    lines = [line for line in history if line.get("kind") == "train" and "expert_load" in line and "step" in line]
    if not lines:
        return np.zeros(0), []
    shape = [len(layer) for layer in lines[-1]["expert_load"]]
    lines = [line for line in lines if [len(layer) for layer in line["expert_load"]] == shape]
    per_column = -(-len(lines) // _MAX_COLUMNS)
    parts = [slice(start, start + per_column) for start in range(0, len(lines), per_column)]
    steps = np.asarray([line["step"] for line in lines], np.float64)
    loads = []
    for layer, num_experts in enumerate(shape):
        load_SE = np.asarray([line["expert_load"][layer] for line in lines], np.float64) * num_experts
        loads.append(np.stack([load_SE[part].mean(axis=0) for part in parts], axis=-1))
    return np.asarray([steps[part].mean() for part in parts]), loads


def _load_panel(axes: Axes, layer: int, edges: np.ndarray, load_ES: np.ndarray, limit: float):
    num_experts = len(load_ES)
    values = np.ma.masked_invalid(np.log2(np.maximum(load_ES, 1e-6)))
    image = axes.pcolormesh(
        edges, np.arange(num_experts + 1) - 0.5, values, cmap=BELOW_AND_ABOVE, vmin=-limit, vmax=limit, rasterized=True
    )
    # The last tenth rather than the last line, which is one batch.
    last = load_ES[:, -max(1, load_ES.shape[1] // 10) :].mean(axis=1)
    _title(axes, f"layer {layer}", f"{last.min():.2f} – {last.max():.2f}", small=True)
    axes.yaxis.set_major_locator(FixedLocator(_ids(num_experts, 8 if num_experts <= 8 else 4)))
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    return image


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders of columns with these centres, `[S + 1]`."""
    if len(centres) == 1:
        return centres[0] + np.asarray([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _grid_columns(num_panels: int) -> int:
    if num_panels <= 4:
        return {4: 2}.get(num_panels, num_panels)
    return min(8, math.ceil(math.sqrt(num_panels * 1.3)))


def _ids(num_experts: int, at_most: int) -> list[int]:
    """Round expert ids to write on an axis, from 0."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, num_experts) if num_experts / step <= at_most)
    return list(range(0, num_experts, step))


# ------------------------------------------------------------------------------------------------- domains and experts


def plot_domain_experts(
    specialization: Specialization | Mapping[str, Any],
    path: str | os.PathLike[str],
    sort_experts: bool | None = None,
    title: str = "Which domain uses which expert",
) -> pathlib.Path:
    """Which domain uses which expert: per MoE layer, a row per domain and a column per expert.

    A cell is the expert's share within the domain over an even share 1/E, on a log scale; 1 is white. Beside a layer's
    name stands how much the expert tells about the domain: mutual information in bits, and of the most possible.

    Args:
        specialization: as `train.evaluate` measures it, or its `to_dict`.
        path: where to write the PNG.
        sort_experts: put experts side by side that prefer the same domain (ids stay on the axis); by default where
            there are 17 to 64 of them: fewer are easy to find by id, and ids of more could not be read.
        title: of the whole picture.
    """
    found = specialization
    if not isinstance(found, Specialization):
        found = Specialization.from_dict(found)
    if not found.load:
        return _save_note(path, "No layer sends tokens to experts")
    num_layers, num_domains = len(found.load), len(found.domains)
    num_experts = max(matrix_DE.shape[1] for matrix_DE in found.load)
    if sort_experts is None:
        sort_experts = _SORT_ABOVE < num_experts <= _SORT_UP_TO
    with np.errstate(invalid="ignore"):
        ratios = [load_DE / load_DE.sum(axis=-1, keepdims=True) * load_DE.shape[1] for load_DE in found.load]
    columns, cell, figure_size = _domain_layout(num_layers, num_domains, num_experts)
    rows = -(-num_layers // columns)
    figure, panels = _figure(*figure_size, rows, columns)
    limit = _colour_limit([np.log2(np.maximum(ratio_DE, 1e-6)) for ratio_DE in ratios])
    for place, (axes, ratio_DE) in enumerate(zip(panels, ratios, strict=False)):
        order = _by_domain(ratio_DE) if sort_experts else np.arange(ratio_DE.shape[1])
        image = _domain_panel(axes, ratio_DE[:, order], limit, cell)
        note = f"{found.bits[place]:.2f} bits, {found.normalised[place]:.0%}" if np.isfinite(found.bits[place]) else "-"
        _title(axes, f"layer {found.layers[place]}", note, small=True)
        _expert_axis(axes, order, cell[0], sort_experts)
        axes.yaxis.set_major_locator(FixedLocator(range(num_domains)))
        axes.set_yticklabels([_shortened(name) for name in found.domains] if place % columns == 0 else [])
        if place + columns >= num_layers:
            axes.set_xlabel("expert" + (", sorted by the domain it prefers" if sort_experts else ""))
    for axes in panels[num_layers:]:
        axes.set_axis_off()
    _colour_bar(figure, panels, image, limit, "share ÷ even share", figure_height=figure_size[1])
    _heading(
        figure,
        title,
        "bits: how much the expert tells about the domain (mutual information), and of the most possible",
    )
    return _save(figure, path)


def _domain_layout(num_layers: int, num_domains: int, num_experts: int):
    """(panels side by side, (cell width, cell height) in inches, (figure width, figure height) in inches)."""
    if num_experts <= _SORT_ABOVE:
        columns = min(num_layers, 4 if num_layers > 6 else 3) if num_experts <= 8 else min(num_layers, 2)
    else:
        columns = 1 if num_layers <= 8 else 2
    if num_layers > 16:
        columns = 4
    columns = -(
        -num_layers // -(-num_layers // columns)
    )  # as few as that many rows need, so that no panel is left alone
    panel_width = {1: 11.0, 2: 6.6 if num_experts > 8 else 4.6, 3: 3.9}.get(columns, 3.2)
    if num_layers == 1:
        panel_width = min(11.0, max(3.5, 0.62 * num_experts))
    rows = -(-num_layers // columns)
    cell = panel_width / num_experts, min(0.34, max(0.16, (2.0 if rows < 8 else 1.0) / num_domains))
    height = rows * (num_domains * cell[1] + 0.62) + 1.0
    return columns, cell, (columns * panel_width + 2.6, max(2.6, height))


def _by_domain(ratio_DE: np.ndarray) -> np.ndarray:
    """Expert ids by the domain that prefers them most, and within it from strong to weak preference."""
    ratio_DE = np.nan_to_num(ratio_DE)
    return np.lexsort((-ratio_DE.max(axis=0), ratio_DE.argmax(axis=0)))


def _domain_panel(axes: Axes, ratio_DE: np.ndarray, limit: float, cell: tuple[float, float]):
    values = np.ma.masked_invalid(np.log2(np.maximum(ratio_DE, 1e-6)))
    num_domains, num_experts = ratio_DE.shape
    image = axes.pcolormesh(
        np.arange(num_experts + 1) - 0.5,
        np.arange(num_domains + 1) - 0.5,
        values,
        cmap=BELOW_AND_ABOVE,
        vmin=-limit,
        vmax=limit,
        edgecolors="white",
        linewidth=min(1.2, 8 * cell[0] - 0.2) if cell[0] > 0.05 else 0,
    )
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if cell[0] >= 0.3 and cell[1] >= 0.16:
        for domain, expert in np.ndindex(ratio_DE.shape):
            if math.isfinite(ratio := ratio_DE[domain, expert]):
                colour = "white" if abs(values[domain, expert]) > 0.62 * limit else _INK
                axes.text(expert, domain, f"{ratio:.1f}", ha="center", va="center", fontsize=7.5, color=colour)
    return image


def _expert_axis(axes: Axes, order: np.ndarray, cell_width: float, is_sorted: bool) -> None:
    """All ids where they fit; sorted ids all the same, since the ones left out could not be guessed."""
    if is_sorted or cell_width >= 0.2:
        places, size = range(len(order)), min(8.0, max(3.5, cell_width * 46))
    else:
        places, size = _ids(len(order), 16 if cell_width * len(order) > 5 else 8), 8.0
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.set_xticklabels([str(order[place]) for place in places], fontsize=size)


def _shortened(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 9] + "…" + name[-8:]


# --------------------------------------------------------------------------------------------------------- house style


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure (inches) with panels in reading order, in the house style."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        for spine in axes.spines.values():
            spine.set_color(_MUTED)
        axes.tick_params(colors=_MUTED, labelcolor=_INK, labelsize=8 if len(panels) > 1 else 9, length=3)
        axes.xaxis.label.set(color=_INK, size=9)
        axes.yaxis.label.set(color=_INK, size=9)
    return figure, panels


def _title(axes: Axes, title: str, note: str = "", small: bool = False) -> None:
    """A title on the left, and a muted note on the right, above the axes."""
    axes.set_title(title, loc="left", fontsize=9 if small else 13, weight="bold", color=_INK)
    axes.set_title(note, loc="right", fontsize=8 if small else 9.5, color=_MUTED)


def _heading(figure: Figure, title: str, note: str) -> None:
    """A heading of a whole figure and, below it, what to know when reading it."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold", color=_INK)
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=_MUTED)


def _colour_limit(log2_ratios: Sequence[np.ndarray]) -> float:
    """Half the range of the colours in doublings: a few outliers are cut off rather than paling everything else."""
    magnitudes = np.abs(np.concatenate([np.ravel(ratios) for ratios in log2_ratios]))
    magnitudes = magnitudes[np.isfinite(magnitudes)]
    return float(np.clip(np.ceil(np.quantile(magnitudes, 0.97)), 1, 3)) if len(magnitudes) else 1.0


def _colour_bar(figure: Figure, panels: Sequence[Axes], image, limit: float, label: str, figure_height: float) -> None:
    bar = figure.colorbar(
        image, ax=list(panels), extend="both", fraction=0.05, pad=0.015, aspect=22, shrink=min(1.0, 3.2 / figure_height)
    )
    powers = np.arange(-int(limit), int(limit) + 1)
    bar.set_ticks(powers, labels=[f"{2**power}×" if power >= 0 else f"1/{2**-power}×" for power in powers.tolist()])
    bar.set_label(label, color=_INK, size=9)
    bar.ax.tick_params(labelsize=8, colors=_MUTED, labelcolor=_INK, length=0)
    bar.outline.set_visible(False)
    bar.ax.axhline(0.0, color=_INK, linewidth=1.0)  # an even share


def _compact(value: float) -> str:
    """1,500,000 is "1.5M"."""
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.4g}"


def _save_note(path: str | os.PathLike[str], text: str) -> pathlib.Path:
    figure, (axes,) = _figure(6.0, 2.0)
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=12, color=_MUTED, transform=axes.transAxes)
    return _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike[str]) -> pathlib.Path:
    """Draws into memory, and then replaces the file in one step."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(drawn.getvalue())
    os.replace(temporary, path)
    return path
