"""Figures of the cards in docs/zoo, from the stores: a marked block of each card, and the table of all entries.

Everything between the two marks is written by `scripts/compare.py --cards`; the rest of a card is for people.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_zoo.compare.claims import Claim
from moe_zoo.compare.entries import REFERENCE, SCALES, Entry, load_entries
from moe_zoo.compare.store import Store
from moe_zoo.compare.tables import LOSS, Group, Row, groups, minutes, plus_minus, says
from moe_zoo.core.registry import ConfigError
from moe_zoo.models import Decoder
from moe_zoo.models.counting import router_parameters
from moe_zoo.train.config import load_config

BEGIN = "<!-- compare: written by `python scripts/compare.py --cards` -->"
END = "<!-- compare: end -->"

#: what `scripts/bench.py routers --out=...` writes, beside the stores' folder
ROUTER_COSTS = "routers_cpu.json"


def write_cards(folder: Path, stores: Path, results: Path | None = None) -> list[Path]:
    """Rewrites what changed and returns it. `results`: where router costs are; by default above `stores`.

    Raises ConfigError for a card without marks.
    """
    return write_changed(cards(folder, stores, results))


def write_changed(texts: Mapping[Path, str]) -> list[Path]:
    """Writes the files whose text is another one now and returns them."""
    changed = []
    for path, text in texts.items():
        if path.read_text(encoding="utf-8") != text:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
            changed.append(path)
    return changed


def cards(folder: Path, stores: Path, results: Path | None = None) -> dict[Path, str]:
    """{card: its text as it should be}; the table of all entries is README.md's."""
    entries = load_entries()
    found = {scale: group for scale in SCALES if (group := _main_group(stores, scale, entries)) is not None}
    costs = _router_costs((results or stores.parent) / ROUTER_COSTS)
    by_card: dict[str, list[Entry]] = {}
    for entry in entries.values():
        by_card.setdefault(_facts(entry)["router"], []).append(entry)
    texts = {}
    for router, mine in by_card.items():
        path = folder / f"{router}.md"
        texts[path] = replaced(path, _card(mine, found, folder, stores))
    readme = folder / "README.md"
    texts[readme] = replaced(readme, _table(entries, found, costs))
    return texts


def _main_group(stores: Path, scale: str, entries: Mapping[str, Entry]) -> Group | None:
    found = groups(Store(stores / f"{scale}.jsonl").read(), entries, "active")
    return found[0] if found and found[0].match == "active" else None


def replaced(path: Path, block: str, begin_mark: str = BEGIN, end_mark: str = END) -> str:
    """The card's text with `block` between the marks. Raises ConfigError if there is no card, or no marks in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: an entry has no card; write one, with these two lines in it: {begin_mark} {end_mark}"
        ) from None
    begin, end = text.find(begin_mark), text.find(end_mark)
    if not 0 <= begin < end:
        raise ConfigError(f"{path}: no place for the figures; it needs the lines {begin_mark} and {end_mark}")
    return text[: begin + len(begin_mark)] + f"\n\n{block}\n\n" + text[end:]


# -------------------------------------------------------------------------------------------------------------- a card


def _card(entries: Sequence[Entry], found: Mapping[str, Group], folder: Path, stores: Path) -> str:
    lines = [f"- Claim of `{entry.name}`: {_claim(entry)}" for entry in entries if isinstance(entry.claim, Claim)]
    where = Path(os.path.relpath(stores, folder)).as_posix()
    tables = []
    for scale, group in found.items():
        rows = [row for row in group.rows for entry in entries if row.label == entry.name]
        if rows:
            tables += [
                "", f"Scale `{scale}` ([page]({where}/{scale}.md)), equal active FLOPs, {_tokens(group)} tokens of "
                f"{group.runs[0]['data']['source']}:", "", *_figures(rows, group),
            ]  # fmt: skip
    if not tables:
        names = ",".join(entry.name for entry in entries)
        tables = ["", f"Not run yet: `python scripts/compare.py --entries={names} --seeds=3`."]
    return "\n".join([*lines, *tables])


def _claim(entry: Entry) -> str:
    claim = entry.claim
    return f"{claim.says} ({claim.source}); as judged: {claim.short()}."


def _figures(rows: Sequence[Row], group: Group) -> list[str]:
    head = (
        "entry", "test bits per byte", f"minus {REFERENCE}'s", "verdict on the claim", "MFLOP per token", "parameters",
        "minutes", "load violation", "seeds",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        gap = plus_minus(row.to_reference, "+.4f") if row.causal else "–"
        cells = (
            row.label + ("" if row.causal else " (sees the future)"), plus_minus(row.interval(LOSS), ".4f"), gap,
            _verdict(row), _value(row.mean("train_flops_per_token"), ".2f", 1e-6),
            f"{row.runs[0]['parameters']['total'] / 1e6:.2f} M", _value(minutes(row), ".1f"),
            _value(row.mean("load_violation"), ".2f"), str(len(row.runs)),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _verdict(row: Row) -> str:
    if row.verdict.difference is None or not row.verdict.decided:
        return says(row.verdict)
    return f"{says(row.verdict)} ({row.claim.short()})"


def _tokens(group: Group) -> str:
    return f"{max(run['curves']['train']['tokens'][-1] for run in group.runs) / 1e6:.3g} million"


# ------------------------------------------------------------------------------------------------ the table of entries


def _table(entries: Mapping[str, Entry], found: Mapping[str, Group], costs: Mapping[str, str]) -> str:
    head = ("entry", "router", "decides by", "causal", "experts per token", "router parameters", "router cost",
            *(f"claim, `{scale}`" for scale in found), "card", "config")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for entry in sorted(entries.values(), key=lambda entry: (_facts(entry)["router"], entry.name)):
        facts = _facts(entry)
        verdicts = []
        for group in found.values():
            row = group.row(entry.name)
            claimed = f": {entry.claim.short()}" if isinstance(entry.claim, Claim) else ""
            verdicts.append("not run yet" if row is None else says(row.verdict) + claimed)
        routed = facts["decision"] is not None
        cells = (
            entry.name, f"`{facts['router']}`" if routed else "–", facts["decision"] or "–",
            "yes" if facts["causal"] else "no", facts["dynamic"], _extra(facts["parameters"]) if routed else "–",
            costs.get(facts["router"], "–") if routed else "–", *verdicts,
            f"[{facts['router']}.md]({facts['router']}.md)", f"`{entry.path.stem}`",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    notes = [
        "",
        'Experts per token: "varies" with the tokens, a range with the step. Router parameters: of all layers at scale '
        f"`cpu`, above plain top-k's {_facts(entries[REFERENCE])['parameters']:,}.",
    ]  # fmt: skip
    if costs:
        notes[-1] += (
            " Router cost: CPU time of deciding, forward and backward, over top-k's, from `scripts/bench.py routers`."
        )
    return "\n".join(lines + notes)


def _facts(entry: Entry) -> dict[str, Any]:
    """What the settings say of an entry, at scale "cpu"."""
    config = load_config(f"{entry.path}:cpu")
    model = Decoder(config.model)
    routed = [block.ffn for _, block, _ in model.routed()]
    facts = {"router": config.model.router.name, "causal": model.causal, "parameters": router_parameters(model)}
    if not routed:
        return facts | {"decision": None, "dynamic": "–"}
    router = routed[0].router
    dynamic, times = _dynamic(router, config.data.seq_len), config.model.chain.iterations
    dynamic = dynamic if times == 1 else f"{times} times {dynamic}"
    return facts | {"decision": router.decision.__name__, "dynamic": dynamic}


def _dynamic(router, seq_len: int) -> str:
    if router.decision.__name__ in ("Dense", "ExpertChoice"):
        return f"varies, {router.active():g} on average"
    if router.decision.__name__ == "Soft":
        return "all, mixed"
    most, mean = router.active(), router.rows_per_token(seq_len)  # at the end of training, over all of it
    if mean != most:
        return f"{2 * mean - most:g} to {most:g}"
    return f"{most:g}" if most == router.max_active() else f"varies, {most:g} on average"


def _extra(parameters: int) -> str:
    reference = router_parameters(Decoder(load_config(f"{REFERENCE}:cpu").model))
    return f"{parameters - reference:+,}" if parameters != reference else "0"


def _router_costs(path: Path) -> dict[str, str]:
    """{router: its cost over top-k's} of the smallest number of experts that was measured; empty without the file."""
    if not path.is_file():
        return {}
    try:
        ratios = json.loads(path.read_text())["ratios"]
        return {
            name: f"{by_experts[min(by_experts, key=int)]['alone, both']:.2f}" for name, by_experts in ratios.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not the results of scripts/bench.py routers ({error!r})") from error


def _value(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else format(value * scale, form)
