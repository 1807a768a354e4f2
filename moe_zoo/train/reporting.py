"""The closing summary of a run: what was reached, beside what general-purpose compressors reach on the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.panel
import rich.table
from rich.text import Text

from moe_zoo.train.progress import PLAIN_WIDTH, duration, make_console, short_number

_SAMPLE_CHARACTERS, _SAMPLE_LINES = 1500, 24
_MOST_CLASSES = 10  # that have a column each
_BAR_COLUMNS = 64
_BARS, _ASCII_BARS = "·▁▂▃▄▅▆▇█", " .:-=+*#@"


def final_table(report: Mapping[str, Any], console: rich.console.Console | None = None) -> None:
    """Prints the summary, at most 100 columns wide; plain text when the output is not a terminal.

    Args:
        report: any of these; what is missing is left out.
            bits_per_byte: {"overall": float, "domains": {name: float}} on the test documents.
            scored: "answers" when only the answers of supervised documents count.
            bytes, gzip, xz: {name: number, "overall": number}: test bytes, and the compressors' bits per byte.
            accuracy, bits, examples, accuracy_by_class {name}: of a classifier on the test examples.
            context_length: tokens. tokens_per_second, train_seconds, steps: numbers of the training run.
            parameters: {"total": int, "active": int (per token), "trainable": int}.
            flops_per_token: active floating-point operations per token.
            expert_load: per MoE layer, the share of the routed tokens that each expert got (sums to 1).
            specialization: `analysis.Specialization.to_dict`. sparsity: `train.evaluate.sparsity`.
            sample: {"prompt": str, "text": str}. pictures: {name: path}.
        console: where to print; standard output by default.
    """
    console = make_console() if console is None else console
    width = min(PLAIN_WIDTH, console.width)
    sections = [
        _compression_table(report),
        _class_table(report),
        _facts(report),
        _load_table(
            report.get("expert_load"),
            (report.get("specialization") or {}).get("layers"),
            unicode=_speaks_unicode(console),
            width=width,
        ),
        _specialization_table(report.get("specialization")),
        _sparsity_table(report.get("sparsity")),
        _sample_panel(report.get("sample"), console),
    ]
    for section in sections:
        if section is not None:
            console.print()
            console.print(section, width=width)
    if pictures := report.get("pictures"):
        console.print()
        for name, path in pictures.items():
            # Soft wrap: a path that is longer than the line must still be one that can be copied.
            console.print(Text(f"{name}: {path}"), soft_wrap=True)
    console.print()


def _speaks_unicode(console: rich.console.Console) -> bool:
    return (console.encoding or "").lower().startswith("utf")


def _new_table(title: str) -> rich.table.Table:
    return rich.table.Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=rich.box.SIMPLE_HEAD,
        header_style="bold",
        show_edge=False,
        pad_edge=False,
    )


def _compression_table(report: Mapping[str, Any]) -> rich.table.Table | None:
    """Domains x (model, gzip, xz, bytes), and a row for all of them."""
    model = report.get("bits_per_byte") or {}
    columns = {
        "model": {**model.get("domains", {}), **({"overall": model["overall"]} if "overall" in model else {})},
        "gzip -9": report.get("gzip") or {},
        "xz -9e": report.get("xz") or {},
    }
    sizes = dict(report.get("bytes") or {})
    if sizes:
        sizes.setdefault("overall", sum(sizes.values()))
    columns = {name: column for name, column in columns.items() if column}
    if not columns:
        return None
    names = list(dict.fromkeys(name for column in (*columns.values(), sizes) for name in column if name != "overall"))
    answers = report.get("scored") == "answers"
    what = " of the answers (lower is better; gzip and xz do not see the prompts)" if answers else " (lower is better)"
    table = _new_table(f"Test bits per byte{what}")
    table.add_column("domain", overflow="fold")
    for name in (*columns, "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in (*names, "overall"):
        if name == "overall":
            table.add_section()
        values = [column.get(name) for column in columns.values()]
        if name != "overall" or any(value is not None for value in values):
            size = f"{sizes[name]:,}" if name in sizes else "-"
            table.add_row(Text(name), *_marked(values), size, style="bold" if name == "overall" else "")
    return table


def _class_table(report: Mapping[str, Any]) -> rich.table.Table | None:
    """The share of a classifier's right answers: of all examples, and of those of each class."""
    if "accuracy" not in report:
        return None
    table = _new_table(f"Test accuracy on {report['examples']:,} examples, {report['bits']:.3f} bits each")
    names = list(report["accuracy_by_class"])
    shown = names if len(names) <= _MOST_CLASSES else []
    for name in ("all", *shown):
        table.add_column(Text(name), justify="right", no_wrap=True)
    table.add_row(*(f"{v:.1%}" for v in (report["accuracy"], *(report["accuracy_by_class"][n] for n in shown))))
    return table


def _marked(values: Sequence[float | None]) -> list[Text]:
    """The values as text; the lowest one is coloured."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    best = min(known, default=None)
    return [
        Text("-") if value is None else Text(f"{value:.3f}", style="green" if value == best else "") for value in values
    ]


def _facts(report: Mapping[str, Any]) -> rich.table.Table | None:
    """One line each for context, training, speed, parameters and FLOPs."""
    facts = []
    if "context_length" in report:
        facts.append(("context length", f"{report['context_length']:,} tokens"))
    trained = []
    if "steps" in report:
        trained.append(f"{report['steps']:,} steps")
    if "train_seconds" in report:
        trained.append(duration(report["train_seconds"]))
    if trained:
        facts.append(("trained for", ", ".join(trained)))
    if "tokens_per_second" in report:
        facts.append(("speed", f"{report['tokens_per_second']:,.0f} tokens/s"))
    if parameters := report.get("parameters"):
        words = {"total": "in total", "active": "active per token", "trainable": "trainable"}
        counts = [f"{parameters[name]:,} {word}" for name, word in words.items() if name in parameters]
        facts.append(("parameters", ", ".join(counts)))
    if "flops_per_token" in report:
        facts.append(("active FLOPs", f"{short_number(report['flops_per_token'])} per token"))
    if not facts:
        return None
    grid = rich.table.Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, value in facts:
        grid.add_row(name, value)
    return grid


def _load_table(
    expert_load: Sequence[Sequence[float]] | None, layers: Sequence[int] | None, *, unicode: bool, width: int
) -> rich.table.Table | None:
    """Per layer: the busiest and the idlest expert against an even share, and a bar per expert."""
    if expert_load is None or not len(expert_load):
        return None
    bars = _BARS if unicode else _ASCII_BARS
    room = min(_BAR_COLUMNS, width - 30)
    per_bar = max(1, -(-max(map(len, expert_load)) // room))
    what = "one bar per expert" if per_bar == 1 else f"one bar per {per_bar} experts"
    table = _new_table("Expert load")
    for name in ("layer", "max/mean", "min/mean"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"{what}; even share {bars[4]}, twice it {bars[8]}", overflow="fold")
    for layer, shares in zip(layers or range(len(expert_load)), expert_load, strict=True):
        ratios = [share * len(shares) for share in shares]
        table.add_row(str(layer), f"{max(ratios):.2f}", f"{min(ratios):.2f}", Text(_load_bars(ratios, bars, per_bar)))
    return table


def _load_bars(ratios: Sequence[float], bars: str = _BARS, per_bar: int = 1) -> str:
    """A character per `per_bar` experts: `bars[0]` for no load, `bars[4]` for the mean, `bars[8]` for twice that."""
    means = [
        sum(group) / len(group)
        for start in range(0, len(ratios), per_bar)
        if (group := ratios[start : start + per_bar])
    ]
    return "".join(
        "?" if not math.isfinite(mean) else bars[0 if mean <= 0 else min(8, max(1, round(4 * mean)))] for mean in means
    )


def _specialization_table(found: Mapping[str, Any] | None) -> rich.table.Table | None:
    """Per layer: what the expert says of the domain, and which domain prefers which expert most."""
    if not found or not found["load"] or len(found["domains"]) < 2:
        return None
    rates = [[rate for rate in row if rate is not None] for row in found["experts_per_token"]]
    varies = any(row and max(row) > 1.001 * min(row) for row in rates)
    table = _new_table("Domains and experts: what the expert tells about the domain, of the most possible")
    for name in ("layer", "bits", "of most", *(["experts per token"] if varies else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("favourites: domain, expert, over an even share", overflow="fold")
    for place, layer in enumerate(found["layers"]):
        bits, most = found["bits"][place], found["normalised"][place]
        said = ["-", "-"] if bits is None else [f"{bits:.3f}", f"{most:.1%}"]
        if varies:
            said.append(f"{min(rates[place]):.2f}-{max(rates[place]):.2f}" if rates[place] else "-")
        table.add_row(str(layer), *said, Text(_preferences(found["domains"], found["load"][place])))
    return table


def _sparsity_table(found: Mapping[str, Any] | None) -> rich.table.Table | None:
    """Per layer: the share of experts that a token, and a chunk of tokens, leave alone; what the next token reuses."""
    if not found or not found["layers"]:
        return None
    table = _new_table("Sparsity: the share of experts that is")
    for name in ("layer", "idle for a token", f"idle for {found['chunk_length']} in a row", "used again by the next"):
        table.add_column(name, justify="right", no_wrap=True)
    said = lambda value: "-" if value is None else f"{value:.1%}"
    columns = [found[name] for name in ("token", "chunk", "reuse")]
    for layer, *values in zip(found["layers"], *columns, strict=True):
        table.add_row(str(layer), *map(said, values))
    if len(found["layers"]) > 1:
        known = [[value for value in column if value is not None] for column in columns]
        table.add_section()
        table.add_row("mean", *(said(sum(values) / len(values) if values else None) for values in known), style="bold")
    return table


def _preferences(domains: Sequence[str], load_DE: Sequence[Sequence[float]], count: int = 3) -> str:
    """The domains' favourite experts, strongest first."""
    favourites = []
    for name, row in zip(domains, load_DE, strict=True):
        if total := sum(row):
            favourites.append((max(row) / total * len(row), name, max(range(len(row)), key=row.__getitem__)))
    return ", ".join(
        f"{name} {expert} {ratio:.1f}x" for ratio, name, expert in sorted(favourites, reverse=True)[:count]
    )


def _sample_panel(sample: Mapping[str, str] | None, console: rich.console.Console) -> rich.panel.Panel | None:
    if not sample:
        return None
    prompt, text = (_printable(sample.get(name, ""), console.encoding) for name in ("prompt", "text"))
    # Some callers return the prompt as part of the text.
    text = text.removeprefix(prompt)
    body = Text.assemble((prompt, "bold"), text)
    shown = body[:_SAMPLE_CHARACTERS]
    lines = shown.split("\n")
    if len(lines) > _SAMPLE_LINES or len(shown) < len(body):
        shown = Text("\n").join([*lines[:_SAMPLE_LINES], Text("[...]")])
    title = "sample, the prompt in bold" if console.is_terminal else "sample, the prompt first"
    return rich.panel.Panel(shown, title=title, title_align="left", box=rich.box.ROUNDED)


def _printable(text: str, encoding: str) -> str:
    """Spells out what the terminal must not get: a byte model may well write an escape code or half a character."""
    text = text.expandtabs(4).encode(encoding, "backslashreplace").decode(encoding)
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
