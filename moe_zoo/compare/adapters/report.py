"""The page of the adapters' comparison, its pictures, and the figures of the cards in docs/zoo: all from the store."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_zoo.analysis.plots import BELOW_AND_ABOVE, plot_domain_experts
from moe_zoo.compare import figures
from moe_zoo.compare.adapters.plans import MATCH, REFERENCE, entries
from moe_zoo.compare.cards import replaced
from moe_zoo.compare.claims import OF_ADAPTERS, Claim
from moe_zoo.compare.entries import Entry
from moe_zoo.compare.store import Store
from moe_zoo.compare.style import FAINT, INK, MUTED, figure, save_png, title
from moe_zoo.compare.tables import Group, Row, groups, plus_minus, says
from moe_zoo.core.registry import ConfigError
from moe_zoo.train.config import config_file_value, load_config

LOSS = "held_in_loss"
BEGIN = "<!-- compare_lora: written by `python scripts/compare_lora.py --cards` -->"
END = "<!-- compare_lora: end -->"


def main_group(store: Store, known: Mapping[str, Entry]) -> Group | None:
    """The largest set of runs that may be compared; None if there is no run."""
    found = groups(store.read(), known, MATCH, REFERENCE, LOSS)
    return found[0] if found else None


# ------------------------------------------------------------------------------------------------------------ the page


def write_page(store: Store, known: Mapping[str, Entry], scale: str) -> Path:
    """Writes SCALE.md and SCALE/*.png beside the store; every run of the store is counted on it.

    Raises ConfigError when the store is empty.
    """
    found = groups(store.read(), known, MATCH, REFERENCE, LOSS)
    if not found:
        raise ConfigError(f"{store.path} has no run yet: --entries=all trains them")
    main, others = found[0], found[1:]
    folder = store.path.parent / store.path.stem
    drawn = {"verdicts": figures.verdicts(main), "tasks": by_task(main)}
    for name, picture in drawn.items():
        if picture is not None:
            save_png(picture, folder / f"{name}.png")
    for row in main.rows:
        draw_experts(row, folder / f"experts_{row.entry}.png")
    path = store.path.with_suffix(".md")
    temporary = path.with_name(path.name + ".tmp")
    shown = [name for name, picture in drawn.items() if picture is not None]
    temporary.write_text(page(scale, main, others, shown, folder.name), encoding="utf-8")
    os.replace(temporary, path)
    return path


def page(scale: str, main: Group, others: Sequence[Group], drawn: Sequence[str], folder: str) -> str:
    """The page as Markdown."""
    lines = [f"# One LoRA against mixtures, scale `{scale}`", "", *headline(main), "", *table(main), ""]
    lines += ["What is equal, and how claims are judged: [docs/adapters.md](../../adapters.md#compared).", ""]
    headings = {
        "verdicts": ("Claims", "The difference to the baseline of each claim, seed by seed (faint dots), its mean and "
                     "95% interval. An interval that holds zero decides nothing."),
        "tasks": ("Task by task", f"Loss on the answers minus {REFERENCE}'s, the mean over seeds: blue is better. "
                  "Below the line: tasks that nobody trained."),
    }  # fmt: skip
    for name in drawn:
        heading, note = headings[name]
        lines += [f"## {heading}", "", note, "", f"![{heading}]({folder}/{name}.png)", ""]
    lines += ["## Loss and exact answers of each task", "", *tasks_table(main), ""]
    lines += ["## The claims", ""]
    lines += [
        f"- {row.label}: {row.claim.says} ({row.claim.source}). {row.claim.short()}: {says(row.verdict)}."
        for row in main.rows
        if isinstance(row.claim, Claim)
    ]
    lines += ["", "## Which task uses which expert", ""]
    lines += ["Share of the gates of a task's tokens over an even share, on test questions, the lowest seed.", ""]
    for row in main.rows:
        if _experts_of(row):
            lines += [f"### {row.label}", "", f"![{row.label}]({folder}/experts_{row.entry}.png)", ""]
    for group in others:
        lines += ["## Also in the store", "", *headline(group), "", *table(group), ""]
    return "\n".join(lines)


def headline(group: Group) -> list[str]:
    """What was compared, in a few sentences."""
    runs = group.runs
    data = runs[0]["data"]
    empty = sorted({*data["held_in"], *data["held_out"]} - runs[0]["tasks"].keys())
    seeds = sorted({run["seed"] for run in runs})
    each = {row.label: len(row.runs) for row in group.rows}
    fewer = [f"{label} {n}" for label, n in each.items() if n < len(seeds)]
    equal = "trained parameters as configured"
    if (reference := group.row(REFERENCE)) is not None:
        target = reference.runs[0]["parameters"]["trained"]
        off = max(abs(run["parameters"]["trained"] / target - 1) for run in runs)
        equal = f"trained parameters within {off:.1%} of {REFERENCE}'s"
    return [
        f"{len(group.rows)} entries, seeds {', '.join(map(str, seeds))}, {len(runs)} runs"
        + (f" ({', '.join(fewer)})" if fewer else "")
        + f"; {max(run['tokens'] for run in runs):,} tokens each, {equal}.",
        f"Trained: {', '.join(data['held_in'])}. Held out: {', '.join(data['held_out'])}."
        + (f" Not installed: {', '.join(empty)}." if empty else ""),
        f"Base and data {group.fingerprint}. On {runs[0]['device']['kind']}; jax {runs[0]['versions']['jax']}; "
        f"{min(run['when'] for run in runs)} to {max(run['when'] for run in runs)} UTC.",
    ]


COLUMNS = (
    "entry", "loss", "exact", "loss, held out", "exact, held out", f"loss minus {REFERENCE}'s", "claim", "difference",
    "verdict", "trained", "active", "MFLOP / token", "seconds", "experts / token", "specialization", "seeds",
)  # fmt: skip


def table(group: Group, rows: Sequence[Row] | None = None) -> list[str]:
    """A line per entry, and the base's own."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|--:" * 5 + "|---|--:|---" + "|--:" * 7 + "|"]
    for row in group.rows if rows is None else rows:
        lines.append("| " + " | ".join(cells(row)) + " |")
    if (before := _base(group)) is not None and rows is None:
        blank = [""] * (len(COLUMNS) - 5)
        lines.append("| " + " | ".join(["the base alone", *before, *blank]) + " |")
    return lines


def cells(row: Row) -> list[str]:
    """One row of the table."""
    claim = row.claim
    form = OF_ADAPTERS[claim.statistic].form if isinstance(claim, Claim) else ".4f"
    number = lambda value, form, scale=1.0: "–" if value is None else format(value * scale, form)
    shown = [plus_minus(row.interval(name), OF_ADAPTERS[name].form) for name in tuple(OF_ADAPTERS)[:4]]
    failed = len(row.runs) - len(row.finished)
    return [
        row.label, *shown, plus_minus(row.to_reference, "+.4f"),
        claim.short() if isinstance(claim, Claim) else "–",
        plus_minus(row.verdict.difference, f"+{form}"), says(row.verdict),
        f"{row.runs[0]['parameters']['trained']:,}", number(row.mean("active_parameters"), ",.0f"),
        f"{np.mean([run['train_flops_per_token'] for run in row.runs]) / 1e6:.2f}",
        f"{np.mean([run['seconds'] for run in row.runs]):.0f}",
        number(row.mean("experts_per_token"), ".2f"), number(row.mean("specialization"), ".2f"),
        str(len(row.runs)) + (f", {failed} failed" if failed else ""),
    ]  # fmt: skip


def _base(group: Group) -> list[str] | None:
    """The first four numbers of the base without adapters: loss and exact answers, held in and held out."""
    runs = [run for run in group.runs if "base" in run]
    if not runs:
        return None
    found = []
    for tasks in ("held_in", "held_out"):
        for name, form in (("loss", ".4f"), ("exact", ".3f")):
            each = [[run["base"][t][name] for t in run["data"][tasks] if t in run["base"]] for run in runs]
            found.append(format(float(np.mean(each)), form))
    return found


def tasks_table(group: Group) -> list[str]:
    """Loss and share of exact answers of every entry and task, means over seeds."""
    tasks = _tasks(group)
    lines = ["| entry | " + " | ".join(tasks) + " |", "|---" + "|--:" * len(tasks) + "|"]
    for row in group.rows:
        lines.append(f"| {row.label} | " + " | ".join(_pair(row.finished, "tasks", task) for task in tasks) + " |")
    if runs := [run for run in group.runs if "base" in run]:
        lines.append("| the base alone | " + " | ".join(_pair(runs, "base", task) for task in tasks) + " |")
    return lines


def _pair(runs: Sequence[Mapping[str, Any]], of: str, task: str) -> str:
    values = [run[of][task] for run in runs if task in run[of]]
    mean = lambda name: float(np.mean([value[name] for value in values]))
    return f"{mean('loss'):.2f}, {mean('exact'):.0%}" if values else "–"


def _tasks(group: Group) -> list[str]:
    data = group.runs[0]["data"]
    there = {task for run in group.runs for task in run["tasks"]}
    return [task for task in (*data["held_in"], *data["held_out"]) if task in there]


# ------------------------------------------------------------------------------------------------------------- pictures


def by_task(group: Group) -> Figure | None:
    """Loss minus the reference's of every entry and task, held-out tasks below a line."""
    reference = group.row(REFERENCE)
    rows = [row for row in group.rows if row.label != REFERENCE and row.finished]
    if reference is None or not rows:
        return None
    tasks = _tasks(group)
    loss = lambda row, task: float(np.mean([run["tasks"][task]["loss"] for run in row.finished]))
    gaps = np.asarray([[loss(row, task) - loss(reference, task) for row in rows] for task in tasks])
    drawn, (axes,) = figure(max(4.5, 1.6 + 0.55 * len(rows)), 1.6 + 0.34 * len(tasks))
    limit = max(0.01, float(np.quantile(np.abs(gaps), 0.95)))
    axes.imshow(gaps, cmap=BELOW_AND_ABOVE, vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), gap in np.ndenumerate(gaps):
        colour = "white" if abs(gap) > 0.6 * limit else INK
        axes.text(j, i, f"{gap:+.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(rows)), [row.label for row in rows], rotation=45, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    trained = sum(task in group.runs[0]["data"]["held_in"] for task in tasks)
    axes.axhline(trained - 0.5, color=MUTED, linewidth=1.2)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    title(axes, f"Loss on the answers minus {REFERENCE}'s")
    return drawn


def _experts_of(row: Row) -> Mapping[str, Any] | None:
    """Of the lowest seed: which task used which expert; None without experts, and of earlier settings of an entry."""
    current = row.finished if row.label == row.entry else ()
    return next((run["specialization"] for run in current if run["specialization"]), None)


def draw_experts(row: Row, path: Path) -> None:
    """The heat map of an entry, if it has experts."""
    found = _experts_of(row)
    if found is not None:
        known = [i for i, tokens in enumerate(found["tokens"]) if tokens]
        kept = {"domains": [found["domains"][i] for i in known], "tokens": [found["tokens"][i] for i in known]}
        kept |= {"layers": found["layers"], "load": [[matrix[i] for i in known] for matrix in found["load"]]}
        plot_domain_experts(kept, path, sort_experts=False, title=f"{row.label}: which task uses which expert")


# ---------------------------------------------------------------------------------------------------------------- cards


def cards(folder: Path, stores: Path, scales: Sequence[str] = ("cpu",)) -> dict[Path, str]:
    """{card: its text as it should be} of every entry's adapter. Raises ConfigError for a card without marks."""
    known = entries()
    found = {scale: main_group(Store(stores / f"{scale}.jsonl"), known) for scale in scales}
    by_card: dict[str, list[Entry]] = {}
    for entry in known.values():
        by_card.setdefault(adapter_of(entry), []).append(entry)
    where = Path(os.path.relpath(stores, folder)).as_posix()
    texts = {}
    for name, mine in by_card.items():
        lines = [
            f"- Claim of `{entry.name}`: {entry.claim.says} ({entry.claim.source}); as judged: {entry.claim.short()}."
            for entry in mine
            if isinstance(entry.claim, Claim)
        ]
        for scale, group in found.items():
            lines += _of_scale(scale, group, mine, where)
        path = folder / f"{name}.md"
        texts[path] = replaced(path, "\n".join(lines), BEGIN, END)
    return texts


def _of_scale(scale: str, group: Group | None, mine: Sequence[Entry], where: str) -> list[str]:
    names = [entry.name for entry in mine]
    rows = [row for row in group.rows if row.label in names] if group else []
    if not rows:
        return ["", f"Not run yet: `python scripts/compare_lora.py --entries={','.join(names)} --seeds=3`."]
    baselines = {row.claim.baseline for row in rows if isinstance(row.claim, Claim)} | {REFERENCE}
    beside = [row for row in group.rows if row in rows or row.label in baselines]
    inside, outside = (len(group.runs[0]["data"][name]) for name in ("held_in", "held_out"))
    page = f"Scale `{scale}` ([page]({where}/{scale}.md)), equal trained parameters, "
    lines = ["", page + f"{inside} tasks, {outside} held out:", "", *table(group, beside)]
    for row in rows:
        if _experts_of(row):
            lines += ["", f"![{row.label}]({where}/{scale}/experts_{row.entry}.png)"]
    return lines


def adapter_of(entry: Entry) -> str:
    """The adapter that an entry ends with, which is the name of its card."""
    recipe = config_file_value(entry.path, "RECIPE")
    if recipe is not None and recipe.join is not None:
        return recipe.join["name"]
    return load_config(f"{entry.path}:cpu").model.adapters.name
