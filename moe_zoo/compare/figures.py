"""The comparison's figures, each from a group of runs; None where the group has nothing to show in it."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moe_zoo.analysis.plots import BELOW_AND_ABOVE
from moe_zoo.compare.claims import ALL_STATISTICS, Claim
from moe_zoo.compare.entries import REFERENCE
from moe_zoo.compare.statistics import NO, YES, Interval, Run, interval, paired
from moe_zoo.compare.style import FAINT, INK, MUTED, PAGE, colours, figure, name_curves, title
from moe_zoo.compare.tables import Group, Row, plus_minus, says


def palette(group: Group) -> dict[str, str]:
    """A colour per label; earlier settings of an entry look like it."""
    by_entry = colours([row.entry for row in group.rows])
    return {row.label: by_entry[row.entry] for row in group.rows}


# ------------------------------------------------------------------------------------------------------------ verdicts


def verdicts(group: Group) -> Figure | None:
    """Each claim's paired difference to its baseline: seeds as dots, the mean, its 95% interval, the answer."""
    judged = [row for row in group.rows if isinstance(row.claim, Claim) and row.verdict.difference is not None]
    by_statistic: dict[str, list[Row]] = {}
    for row in judged:
        by_statistic.setdefault(row.claim.statistic, []).append(row)
    if not by_statistic:
        return None
    counts = [len(rows) for rows in by_statistic.values()]
    drawn, panels = figure(
        9.6, 0.36 * sum(counts) + 0.95 * len(counts), len(counts), height_ratios=[n + 0.8 for n in counts]
    )
    shades = palette(group)
    for axes, (statistic, rows) in zip(panels, by_statistic.items(), strict=True):
        _forest(axes, group, statistic, rows, shades)
    return drawn


def _forest(axes: Axes, group: Group, statistic: str, rows: Sequence[Row], shades: dict[str, str]) -> None:
    rows = sorted(rows, key=lambda row: -row.verdict.difference.mean)
    axes.axvline(0, color=MUTED, linewidth=1)
    reach = 0.0
    for height, row in enumerate(rows):
        colour, found = shades[row.label], row.verdict.difference
        pairs = paired(row.runs, group.row(row.claim.baseline).runs, statistic)
        axes.scatter(list(pairs.values()), [height - 0.24] * len(pairs), s=9, color=colour, alpha=0.6, linewidths=0)
        if found.n > 1:
            axes.plot([found.low, found.high], [height, height], color=colour, linewidth=2.2, solid_capstyle="round")
            reach = max(reach, abs(found.low), abs(found.high))
        axes.scatter([found.mean], [height], s=42, color=colour, zorder=4, linewidths=0)
        reach = max(reach, *map(abs, pairs.values()))
        answer = row.verdict.answer
        axes.text(
            1.015, height, f"{plus_minus(found, '+' + ALL_STATISTICS[statistic].form)}   {says(row.verdict)}",
            transform=axes.get_yaxis_transform(), va="center", fontsize=8.5,
            color=INK if answer in (YES, NO) else MUTED, weight="bold" if answer in (YES, NO) else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{row.label} − {row.claim.baseline}" for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set(color=shades[row.label], size=9)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(-1.1 * reach or -1, 1.1 * reach or 1)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    name = ALL_STATISTICS[statistic].title.partition(":")[0]
    side = {row.claim.direction for row in rows}
    ends = ("← as claimed      " if side == {"lower"} else "", "      as claimed →" if side == {"higher"} else "")
    axes.set_xlabel("difference to the baseline".join(ends))
    title(axes, f"{name[:1].upper()}{name[1:]}")


# -------------------------------------------------------------------------------------------------------------- curves

_AXES = (("tokens", "tokens", 1.0), ("flops", "active FLOPs", 1.0), ("seconds", "minutes of {} time", 1 / 60))


def curves(group: Group) -> Figure | None:
    """Validation loss over tokens, active FLOPs and time: the mean over seeds, each seed faintly."""
    rows = [row for row in group.rows if row.finished]
    if not rows:
        return None
    height = max(4.3, 0.25 * (len(rows) + 3))  # all names fit beside the panel
    drawn, panels = figure(PAGE, height, 1, 3, sharey=True)
    shades = palette(group)
    low, high = _loss_limits([row for row in rows if row.causal] or rows)
    for axes, (name, label, scale) in zip(panels, _AXES, strict=True):
        for row in reversed(rows):
            _curve(axes, row, name, scale, shades[row.label])
        axes.set_ylim(low, high)
        axes.set_xlim(left=0)
        axes.set_xlabel(
            label.format(" and ".join(sorted({run["timing"]["clock"] for row in rows for run in row.runs})))
        )
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if name != "seconds":
            axes.xaxis.set_major_formatter(FuncFormatter(_compact))
        axes.grid(axis="y", color=FAINT, linewidth=0.5)
    panels[0].set_ylabel("validation bits per byte")
    title(panels[0], "Loss at equal tokens")
    title(panels[1], "at equal compute")
    title(panels[2], "at equal time")
    ends = [(_end(row), _named(row, low), shades[row.label]) for row in rows]
    name_curves(panels[2], ends, gap=0.055 * 4.3 / height)
    return drawn


def _curve(axes: Axes, row: Row, name: str, scale: float, colour: str) -> None:
    style = {"color": colour, "linestyle": "-" if row.causal else (0, (3, 2))}
    xs = [np.asarray(run["curves"]["validation"][name], float) * scale for run in row.finished]
    ys = [np.asarray(run["curves"]["validation"]["bits_per_byte"], float) for run in row.finished]
    if len(xs) > 1:
        for x, y in zip(xs, ys, strict=True):
            axes.plot(x, y, alpha=0.25, linewidth=0.6, **style)
    wide = {"linewidth": 2.2 if row.entry == REFERENCE else 1.5}
    axes.plot(np.mean(xs, 0), np.mean(ys, 0), marker="o" if len(xs[0]) == 1 else None, **wide, **style)


def _end(row: Row) -> float:
    return float(np.mean([run["curves"]["validation"]["bits_per_byte"][-1] for run in row.finished]))


def _named(row: Row, low: float) -> str:
    end = _end(row)
    off = "" if end >= low else " ↓"
    return f"{row.label} {end:.3f}{off}" + ("" if row.causal else " (sees the future)")


def _loss_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """From just below the lowest end to where the curves were after a sixth of the way."""
    ends = [_end(row) for row in rows]
    early = [
        float(
            np.interp(
                run["steps"] / 6, run["curves"]["validation"]["step"], run["curves"]["validation"]["bits_per_byte"]
            )
        )
        for row in rows
        for run in row.finished
    ]
    low, high = min(ends), max(float(np.median(early)), max(ends))
    room = max(high - low, 1e-3)
    return low - 0.12 * room, high + 0.03 * room


def gaps(group: Group) -> Figure | None:
    """Each causal entry's validation loss minus the reference's at the same step, the others in grey behind it."""
    reference = group.reference
    rows = [row for row in group.rows if row.causal and row is not reference and row.finished]
    found = {row.label: gap for row in rows if (gap := _gap(row, reference)) is not None}
    if not found:
        return None
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    width = PAGE if columns > 2 else 3.6 * columns
    drawn, panels = figure(width, 1.75 * lines + 0.4, lines, columns, sharex=True, sharey=True)
    shades = palette(group)
    late = [bound for _, gap_SN in found.values() for bound in _bounds(gap_SN[:, gap_SN.shape[1] // 3 :])]
    reach = max(float(np.nanquantile(np.abs([(b.low, b.high, b.mean) for b in late]), 0.98)) * 1.1, 1e-3)
    for axes, (label, (tokens, gap_SN)) in zip(panels, found.items(), strict=False):
        for other, (x, y_SN) in found.items():
            if other != label:
                axes.plot(x, y_SN.mean(0), color=FAINT, linewidth=0.9, zorder=1)
        axes.axhline(0, color=INK, linewidth=1.0, zorder=2)
        _band(axes, tokens, gap_SN, shades[label])
        axes.set_ylim(-reach, reach)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(_compact))
        title(axes, label, shades[label], note=f"{gap_SN.mean(0)[-1]:+.3f}", size=9.5)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(found) - columns) : len(found)]:
        axes.tick_params(labelbottom=True)
    drawn.supylabel(f"validation bits per byte − {REFERENCE}'s", fontsize=8.5, color=MUTED)
    drawn.supxlabel("tokens", fontsize=8.5, color=MUTED)
    return drawn


def _gap(row: Row, reference: Row | None) -> tuple[np.ndarray, np.ndarray] | None:
    """(tokens [N], difference [seeds, N]) over the seeds in common."""
    theirs = {run["seed"]: run["curves"]["validation"] for run in reference.finished} if reference else {}
    pairs = [(run["curves"]["validation"], theirs[run["seed"]]) for run in row.finished if run["seed"] in theirs]
    pairs = [(a, b) for a, b in pairs if a["step"] == b["step"]]
    if not pairs:
        return None
    difference = [np.subtract(a["bits_per_byte"], b["bits_per_byte"]) for a, b in pairs]
    return np.asarray(pairs[0][0]["tokens"], float), np.asarray(difference, float)


def _bounds(y_SN: np.ndarray) -> list[Interval]:
    return [interval(column) for column in y_SN.T]


def _band(axes: Axes, x: np.ndarray, y_SN: np.ndarray, colour: str) -> None:
    bounds = _bounds(y_SN)
    if len(y_SN) > 1:
        axes.fill_between(x, [b.low for b in bounds], [b.high for b in bounds], color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, [b.mean for b in bounds], color=colour, linewidth=1.8, zorder=3)


# ------------------------------------------------------------------------------------------------------------- routing


def load(group: Group, most: int = 6) -> Figure | None:
    """Load of every expert over training: a line of panels per entry, a column per layer, of the lowest seed."""
    rows = [(row, run) for row in group.rows if (run := _first(row, lambda run: run["curves"]["load"])) is not None]
    if not rows:
        return None
    columns = min(most, max(len(run["curves"]["load"]["layers"]) for _, run in rows))
    drawn, panels = figure(1.9 * columns + 2.2, 0.7 * len(rows) + 0.9, len(rows), columns, sharex=True)
    shades, image, before = palette(group), None, 0
    for line, (row, run) in enumerate(rows):
        layers = run["curves"]["load"]["layers"]
        kept = np.unique(np.linspace(0, len(layers) - 1, columns).round().astype(int))
        for column in range(columns):
            axes = panels[line * columns + column]
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0, labelleft=False, labelbottom=line == len(rows) - 1)
            if column >= len(kept):
                axes.set_axis_off()
                continue
            image = _heat(axes, np.asarray(layers[kept[column]], float).T, run["curves"]["load"]["step"][-1])
            if len(layers) != before:  # once for all entries below that have as many
                axes.set_title(f"routed layer {kept[column] + 1}", fontsize=8, color=MUTED, loc="left", pad=3)
        panels[line * columns].set_ylabel(
            row.label, color=shades[row.label], rotation=0, ha="right", va="center", size=9
        )
        before = len(layers)
    panels[-columns].set_xlabel("step")
    bar = drawn.colorbar(image, ax=panels, fraction=0.03, pad=0.01, aspect=30, extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4×", "1/2×", "even", "2×", "4×"])
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=MUTED)
    bar.outline.set_visible(False)
    return drawn


def _heat(axes: Axes, ratio_EN: np.ndarray, steps: int):
    return axes.imshow(
        np.log2(np.maximum(ratio_EN, 1e-3)), aspect="auto", cmap=BELOW_AND_ABOVE, vmin=-2, vmax=2,
        interpolation="nearest", extent=(0, steps, -0.5, len(ratio_EN) - 0.5), origin="lower",
    )  # fmt: skip


def experts_per_token(group: Group) -> Figure | None:
    """Mean experts per token over training, of the entries in which it varies, beside the reference."""
    known = [row for row in group.rows if row.finished and "experts_per_token" in row.finished[0]["curves"]["train"]]
    rows = [row for row in known if varies(row)]
    if not rows:
        return None
    rows += [row for row in known if row.entry == REFERENCE and row not in rows]
    drawn, (axes,) = figure(8.2, 3.4)
    shades, ends = palette(group), []
    for row in rows:
        y = np.mean([np.asarray(run["curves"]["train"]["experts_per_token"], float) for run in row.finished], 0)
        x = np.asarray(row.finished[0]["curves"]["train"]["tokens"], float)
        axes.plot(x, y, color=shades[row.label], linewidth=1.8, drawstyle="default")
        ends.append((float(y[-1]), f"{row.label} {y[-1]:.2f}", shades[row.label]))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_compact))
    axes.set_xlabel("tokens")
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    name_curves(axes, ends, gap=0.08)
    return drawn


def varies(row: Row) -> bool:
    """Whether the number of experts per token changed over training by more than a percent."""
    for run in row.finished:
        values = np.asarray(run["curves"]["train"].get("experts_per_token", [0.0]), float)
        if np.ptp(values) > 0.01 * max(float(values.mean()), 1e-9):
            return True
    return False


def specialization(group: Group) -> Figure | None:
    """Which domain uses which expert: per entry the layer that tells most, of the lowest seed."""
    rows = [(row, run) for row in group.rows if (run := _first(row, lambda run: run.get("specialization"))) is not None]
    if not rows:
        return None
    domains = rows[0][1]["specialization"]["domains"]
    # a gap where the first word of the name changes, as between the languages of one text and other domains
    families = [name.partition("_")[0] if "_" in name else "" for name in domains]
    repeated = [family if families.count(family) > 1 else "" for family in families]
    edges = [i for i in range(1, len(domains)) if repeated[i] != repeated[i - 1]]
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    height = 0.17 * len(domains) + 0.65
    drawn, panels = figure(2.4 * columns + 2.6, height * lines + 0.4, lines, columns, sharey=True)
    shades, image = palette(group), None
    for axes, (row, run) in zip(panels, rows, strict=False):
        found = run["specialization"]
        bits = [b if b is not None else -1.0 for b in found["bits"]]
        best = max((layer for layer in found["share"]), key=lambda layer: bits[found["layers"].index(int(layer))])
        share_DE = np.asarray(found["share"][best], float)
        image = axes.imshow(
            np.log2(np.maximum(share_DE * share_DE.shape[1], 1e-3)), aspect="auto", cmap=BELOW_AND_ABOVE, vmin=-2,
            vmax=2, interpolation="nearest",
        )  # fmt: skip
        axes.set_yticks(range(len(domains)), domains, fontsize=7)
        for height in edges:
            axes.axhline(height - 0.5, color="white", linewidth=2)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        title(axes, row.label, shades[row.label], f"layer {best}, {max(bits):.2f} bits", size=9)
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    drawn.supxlabel("experts", fontsize=8.5, color=MUTED)
    bar = drawn.colorbar(image, ax=panels, fraction=0.025, pad=0.01, aspect=25, extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4×", "1/2×", "even", "2×", "4×"])
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=MUTED)
    bar.outline.set_visible(False)
    return drawn


def _first(row: Row, has: Callable[[Run], object]) -> Run | None:
    return next((run for run in row.finished if has(run)), None)


def _compact(value: float, _=None) -> str:
    """1,500,000 is "1.5M"."""
    for scale, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if math.fabs(value) >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"
