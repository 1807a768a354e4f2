"""The page of a scale: one HTML file that opens from a disk, the same as Markdown, and its figures as PNG."""

import html
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from moe_zoo.compare import figures
from moe_zoo.compare.claims import Claim
from moe_zoo.compare.entries import MATCHES, REFERENCE, Entry
from moe_zoo.compare.store import Store
from moe_zoo.compare.style import save_png, to_svg
from moe_zoo.compare.tables import COLUMNS, Group, Row, cells, groups, says
from moe_zoo.core.registry import ConfigError

#: name of the file, heading, what to know when looking at it
FIGURES: tuple[tuple[str, str, str, Callable[[Group], Figure | None]], ...] = (
    ("verdicts", "Claims", "The difference to the baseline of each claim, seed by seed (faint dots), its mean and 95% "
     "interval. An interval that holds zero decides nothing.", figures.verdicts),
    ("curves", "Loss", "Validation bits per byte: the mean over seeds, single seeds faintly. Active FLOPs are counted "
     "per step from what was routed.", figures.curves),
    ("gaps", f"Gap to {REFERENCE}", "Below the line is better; the band is the 95% interval over seeds, in grey the "
     "other entries.", figures.gaps),
    ("experts_per_token", "Experts per token", "Where the number follows from the tokens or the step.",
     figures.experts_per_token),
    ("load", "Load over training", "Each expert's share of the choices over an even share; a line per expert, time to "
     "the right, the lowest seed.", figures.load),
    ("specialization", "Who uses which expert", "Share of each domain's choices that an expert gets, over an even "
     "share, on test text: the layer whose expert says most of the domain, the lowest seed.", figures.specialization),
)  # fmt: skip


def write_page(store: Store, entries: Mapping[str, Entry], scale: str, match: str) -> Path:
    """Writes SCALE.html, SCALE.md and SCALE/*.png beside the store; every run of the store is on it.

    Raises ConfigError when the store is empty.
    """
    runs = store.read()
    found = groups(runs, entries, match)
    if not found:
        raise ConfigError(f"{store.path} has no run yet: --entries=all trains them")
    folder = store.path.parent / store.path.stem
    main, others = found[0], found[1:]
    drawn = {name: picture for name, _, _, draw in FIGURES if (picture := draw(main)) is not None}
    for name, _, _, _ in FIGURES:
        if name in drawn:
            save_png(drawn[name], folder / f"{name}.png")
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)
    _write(store.path.with_suffix(".md"), _markdown(scale, main, others, drawn, folder.name))
    page = store.path.with_suffix(".html")
    _write(page, _html(scale, main, others, {name: to_svg(picture) for name, picture in drawn.items()}))
    return page


def headline(group: Group) -> list[str]:
    """What was compared, in a few sentences."""
    runs = group.runs
    data, steps = runs[0]["data"], max(run["steps"] for run in runs)
    tokens = max(run["curves"]["train"]["tokens"][-1] for run in runs)
    seeds = sorted({run["seed"] for run in runs})
    devices = sorted({f"{run['device']['count']} x {run['device']['kind']}" for run in runs})
    clocks = {run["timing"]["clock"] for run in runs}
    equal = f"matched in {MATCHES[group.match]}" if group.match != "none" else "not matched: experts as configured"
    said = [
        f"{len(group.rows)} entries, seeds {', '.join(map(str, seeds))}, {len(runs)} runs; {steps:,} steps, "
        f"{tokens / 1e6:.3g} million tokens each, {equal}.",
        f"Data: {data['source']}, {data['bytes'] / 1e6:.1f} MB, {len(data['domains'])} domains, fingerprint "
        f"{group.fingerprint}.",
        f"On {', '.join(devices)}; jax {', '.join(sorted({run['versions']['jax'] for run in runs}))}; "
        f"{min(run['when'] for run in runs)} to {max(run['when'] for run in runs)} UTC.",
    ]
    if "processor" in clocks:
        said.append(
            "Time on a CPU is processor time, of all threads of a run: other work on the machine does not count."
        )
    return said


def summary(group: Group) -> list[str]:
    """One sentence per claim that was answered."""
    return [
        f"{row.label}: {row.claim.says} ({row.claim.source}). {row.claim.short()}: {says(row.verdict)}."
        for row in group.rows
        if isinstance(row.claim, Claim)
    ]


def _listing(row: Row) -> list[list[str]]:
    """Every run on its own: seed, loss, width, settings, commit, device, date, time, load."""
    value = lambda run: "failed" if run["failure"] else f"{run['results']['test_bits_per_byte']:.4f}"
    return [
        [
            row.label, str(run["seed"]), value(run), run["match"], run["config_hash"], run["commit"],
            f"{run['device']['count']} x {run['device']['kind']}", run["when"],
            f"{run['timing']['wall_seconds']:.0f} s", f"{run['timing']['load_before']:.1f}",
        ]
        for run in row.runs
    ]  # fmt: skip


_LISTING = (
    "entry", "seed", "test bits per byte", "matched", "settings", "commit", "device", "when (UTC)", "took",
    "load before",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ Markdown


def _markdown(scale: str, main: Group, others: Sequence[Group], drawn: Mapping[str, Figure], folder: str) -> str:
    lines = [f"# The comparison, scale `{scale}`", "", *headline(main), "", *_markdown_table(main), ""]
    lines += ["How this was made, and what is equal: [docs/comparison.md](../../comparison.md).", ""]
    for name, heading, note, _ in FIGURES:
        if name in drawn:
            lines += [f"## {heading}", "", note, "", f"![{heading}]({folder}/{name}.png)", ""]
    lines += ["## The claims", "", *(f"- {text}" for text in summary(main)), ""]
    for group in others:
        lines += [
            f"## Also in the store: {MATCHES[group.match]}",
            "",
            *headline(group),
            "",
            *_markdown_table(group),
            "",
        ]
    return "\n".join(lines)


def _markdown_table(group: Group) -> list[str]:
    escape = lambda text: text.replace("|", "\\|")
    return [
        "| " + " | ".join(name for name, _ in COLUMNS) + " |",
        "|" + "".join("--:|" if number else "---|" for _, number in COLUMNS),
        *("| " + " | ".join(map(escape, cells(row))) + " |" for row in group.rows),
    ]


# ---------------------------------------------------------------------------------------------------------------- HTML


def _html(scale: str, main: Group, others: Sequence[Group], pictures: Mapping[str, str]) -> str:
    text = html.escape
    facts = lambda group: f'<div class="facts">{"".join(f"<p>{text(line)}</p>" for line in headline(group))}</div>'
    body = ["<h1>Which router is better at equal cost?</h1>", facts(main), _html_table(main)]
    for name, heading, note, _ in FIGURES:
        if name in pictures:
            body.append(f'<h2>{text(heading)}</h2><p class="note">{text(note)}</p><figure>{pictures[name]}</figure>')
    body.append("<h2>The claims</h2><ul>" + "".join(f"<li>{text(line)}</li>" for line in summary(main)) + "</ul>")
    for group in others:
        body += [f"<h2>Also in the store: {text(MATCHES[group.match])}</h2>", facts(group), _html_table(group)]
    listing = [line for group in (main, *others) for row in group.rows for line in _listing(row)]
    unique = list(dict.fromkeys(map(tuple, listing)))
    head = "".join(f"<th>{text(name)}</th>" for name in _LISTING)
    lines = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in line) + "</tr>" for line in unique)
    body.append(
        f'<details><summary>Every run ({len(unique)})</summary><div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{lines}</tbody></table></div></details>"
    )
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>The comparison, scale {text(scale)}</title><style>{style}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _html_table(group: Group) -> str:
    shades = figures.palette(group)
    lines = []
    for row in group.rows:
        found = cells(row)
        answer = {"yes": "yes", "no": "no"}.get(row.verdict.answer, "open")
        dot = f'<i class="dot" style="background: {_page_colour(shades[row.label])}"></i>'
        note = "" if row.causal else "<small>sees the future</small>"
        made = [f'<td class="name">{dot}{html.escape(row.label)}{note}</td>']
        for (name, number), cell in list(zip(COLUMNS, found, strict=True))[1:]:
            kind = answer if name == "verdict" else "n" if number else ""
            made.append(f'<td class="{kind}">{html.escape(cell)}</td>')
        lines.append("<tr>" + "".join(made) + "</tr>")
    head = "".join(f'<th class="{"n" if number else ""}">{html.escape(name)}</th>' for name, number in COLUMNS)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _page_colour(colour: str) -> str:
    return "var(--ink)" if colour == figures.INK else colour


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
