"""Loss at equal training FLOPs (isoFLOP): models of several widths, each trained for as many steps as the budget pays.

A wider model costs more per token and so sees fewer of them; where a curve over width is lowest is the best model that
the budget buys, and curves of two ideas compare at their lowest points (Hoffmann et al., arXiv 2203.15556; mixture of
depths, arXiv 2404.02258, figure 3).

    steps = round(budget / (FLOPs to train on a token * tokens of a batch));   the schedule ends with the steps

The budget is what the dense decoder costs as its config says. Heads keep their size, feed-forward layers and experts
grow with the width; the learning rate stays.
"""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_zoo.compare.claims import Reference
from moe_zoo.compare.entries import SCALES, Entry, Scale, digest, learned
from moe_zoo.compare.statistics import Interval, Run, interval
from moe_zoo.core.registry import ConfigError, nearest
from moe_zoo.train.config import Config, config_from_dict, known_configs, load_config

#: whose cost is the budget
BUDGET_OF = "dense"


@dataclasses.dataclass(frozen=True)
class Bought:
    """What the budget pays: FLOPs to train on a token, and steps."""

    flops_per_token: float
    steps: int
    budget: float

    def says(self) -> str:
        """In one line."""
        return f"{self.steps} steps at {self.flops_per_token / 1e6:.2f} MFLOP a token"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run that may be made."""

    entry: Entry
    width: int
    scale: Scale
    seed: int
    config: Config
    match: Bought
    config_hash: str

    def key(self, fingerprint: str) -> str:
        """What a run is known by in the store, given the data's fingerprint."""
        return f"{self.entry.name}-{self.scale.name}-{self.seed}-{self.config_hash}-{fingerprint}"

    def command(self) -> str:
        """That trains this run alone."""
        model, base = self.config.model, load_config(f"{self.entry.path}:{self.scale.name}").model
        changes = {
            "model.hidden_size": (model.hidden_size, base.hidden_size),
            "model.attention.num_attention_heads": (
                model.attention.num_attention_heads, base.attention.num_attention_heads,
            ),
            "model.intermediate_size": (model.intermediate_size, base.intermediate_size),
            "model.moe_intermediate_size": (model.moe_intermediate_size, base.moe_intermediate_size),
        }  # fmt: skip
        given = " ".join(f"--config.{name}={new}" for name, (new, old) in changes.items() if new != old)
        config = f"scripts/train.py --config=configs/{self.entry.name}.py:{self.scale.name}"
        return " ".join(part for part in (config, given, f"--config.train.steps={self.match.steps}") if part)


def plan(name: str, width: int, seed: int, *, scale: str = "cpu", budget: float = 1.0, source: str = "") -> Plan:
    """The settings of one run: the config `name` as wide as `width`, with the steps that `budget` (times the dense
    decoder's cost at this scale) pays, this seed and data.

    Raises ConfigError for a name, scale or width that there is not.
    """
    known = known_configs()
    if name not in known:
        raise ConfigError(f"--entries: unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    if scale not in SCALES:
        raise ConfigError(f"--scale: unknown {scale!r}{nearest(scale, SCALES)}; known: {', '.join(SCALES)}")
    config = load_config(f"{known[name]}:{scale}")
    reference = load_config(f"{known[BUDGET_OF]}:{scale}")
    if reference.train.steps is None:
        raise ConfigError(f"--scale={scale}: its training ends by minutes, a budget needs steps")
    tree = widened(config, width)
    cost, tokens = _train_flops(config_from_dict(tree)), config.data.seq_len * config.data.batch_size
    total = budget * _train_flops(reference) * reference.train.steps * tokens
    steps = round(total / (cost * tokens))
    if steps < 2 * config.optim.warmup_steps:
        raise ConfigError(
            f"--budget={budget:g}: pays {steps} steps of {name} at width {width}, fewer than twice the "
            f"{config.optim.warmup_steps} of warming up; give more, or smaller --widths"
        )
    tree["train"] |= {"seed": seed, "steps": steps}
    tree["data"] |= {"seed": seed, "source": source or tree["data"]["source"]}
    config = config_from_dict(tree)
    entry = Entry(name, known[name], Reference(says=""))
    return Plan(entry, width, SCALES[scale], seed, config, Bought(cost, steps, total), digest(learned(config)))


def widened(config: Config, width: int) -> dict[str, Any]:
    """The settings with a hidden size of `width`: heads as large as they were, feed-forward layers in proportion."""
    tree, model = config.to_dict(), config.model
    head, heads = model.hidden_size // model.attention.num_attention_heads, tree["model"]["attention"]
    if width < head or width % head:
        raise ConfigError(f"--widths: {width} is no multiple of {head}, what a head of the config has")
    own = {name: round(getattr(model, name) * width / model.hidden_size)
           for name in ("intermediate_size", "moe_intermediate_size")}  # fmt: skip
    tree["model"] |= own | {"hidden_size": width, "attention": heads | {"num_attention_heads": width // head}}
    return tree


def _train_flops(config: Config) -> float:
    from moe_zoo.models import Decoder
    from moe_zoo.models.counting import train_flops_per_token

    return train_flops_per_token(Decoder(config.model), config.data.seq_len, passes=config.train.objective.cls.passes)


def run_one(plan: Plan, corpus, workdir: Path, *, rows: int) -> Run | None:
    """Trains and scores one run on `rows` windows: its line of the store; None if a signal stopped it."""
    from moe_zoo.compare import runner
    from moe_zoo.models.counting import count_parameters
    from moe_zoo.train import loop
    from moe_zoo.train.evaluate import evaluate

    began, load, data = time.perf_counter(), os.getloadavg()[0], plan.config.data
    done = loop.train(plan.config, workdir)
    if not done["finished"]:
        return None
    model = done["trainer"].model(done["state"])
    score = lambda model: evaluate(
        model, done["parts"]["test"], done["tokenizer"], seq_len=data.seq_len, stride=data.eval_stride,
        batch_size=data.eval_batch_size, max_rows=rows, sharding=done["trainer"].batch_sharding,
    )["bits_per_byte"]["overall"]  # fmt: skip
    results = {"test_bits_per_byte": score(model)}
    if model.selects:
        results["as_trained"] = score(model.as_trained())
    return {
        "key": plan.key(corpus.fingerprint), "entry": plan.entry.name, "width": plan.width, "seed": plan.seed,
        "scale": plan.scale.name, "budget": plan.match.budget, "flops_per_token": plan.match.flops_per_token,
        "steps": plan.match.steps, "rows": rows, "parameters": count_parameters(model)["total"],
        "data": {"source": Path(data.source).name, "fingerprint": corpus.fingerprint},
        **runner.circumstances(), "results": results, "timing": runner.timing(began, load),
        "train_seconds": round(done["seconds"], 1), "command": plan.command(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- results


@dataclasses.dataclass(frozen=True)
class Curve:
    """Of one entry: its runs by width, and the width whose mean loss is least."""

    entry: str
    runs: Mapping[int, Sequence[Run]]

    @property
    def best(self) -> int:
        """The width with the least mean."""
        return min(self.runs, key=lambda width: mean(self.runs[width]))


def mean(runs: Sequence[Run], statistic: str = "test_bits_per_byte") -> float:
    """Over seeds."""
    return sum(run["results"][statistic] for run in runs) / len(runs)


def curves(runs: Sequence[Run], entries: Sequence[str]) -> list[Curve]:
    """One per entry that has runs, widths in order."""
    found = []
    for name in entries:
        widths = sorted({run["width"] for run in runs if run["entry"] == name})
        by_width = {w: [run for run in runs if (run["entry"], run["width"]) == (name, w)] for w in widths}
        if by_width:
            found.append(Curve(name, by_width))
    return found


def difference(curve: Curve, baseline: Curve) -> Interval | None:
    """Of both at their best widths, in pairs of equal seeds; None if no seed is in common."""
    value = lambda c: {run["seed"]: run["results"]["test_bits_per_byte"] for run in c.runs[c.best]}
    mine, theirs = value(curve), value(baseline)
    shared = sorted(mine.keys() & theirs.keys())
    return interval([mine[seed] - theirs[seed] for seed in shared]) if shared else None


def table(found: Sequence[Curve]) -> str:
    """Markdown: a line per entry and width, and what the best widths differ by from the first entry's."""
    lines = [
        "| | width | parameters | MFLOP a token | steps | test bits per byte | by what competes | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for curve in found:
        for width, runs in curve.runs.items():
            run, seeds = runs[0], len(runs)
            spread = max(r["results"]["test_bits_per_byte"] for r in runs) - min(
                r["results"]["test_bits_per_byte"] for r in runs
            )
            seen = f"{mean(runs, 'as_trained'):.4f}" if "as_trained" in run["results"] else ""
            star = "**" if width == curve.best else ""
            lines.append(
                f"| {curve.entry} | {width} | {run['parameters'] / 1e6:.2f} M | {run['flops_per_token'] / 1e6:.2f} "
                f"| {run['steps']} | {star}{mean(runs):.4f}{star} (spread {spread:.4f}) | {seen} | {seeds} |"
            )
    first, *others = found
    for curve in others:
        if (d := difference(curve, first)) is not None:
            sure = f", 95% interval {d.low:+.4f} to {d.high:+.4f}" if d.n > 1 else ", one seed"
            lines += ["", f"{curve.entry} at {curve.best} - {first.entry} at {first.best}: {d.mean:+.4f}{sure}."]
    return "\n".join(lines)


def draw(found: Sequence[Curve], path: Path) -> Path:
    """Loss over parameters and over FLOPs of a token: dots are seeds, lines means."""
    from moe_zoo.compare.style import colours, figure, name_curves, save_png

    shades = colours([curve.entry for curve in found])
    drawn, panels = figure(9.6, 3.9, 1, 2, sharey=True)
    for axes, what, label in zip(
        panels, ("parameters", "flops_per_token"), ("parameters", "FLOPs to train on a token")
    ):
        ends = []
        for curve in found:
            colour = shades[curve.entry]
            at = [runs[0][what] for runs in curve.runs.values()]
            axes.plot(at, [mean(runs) for runs in curve.runs.values()], color=colour, linewidth=1.8)
            ends.append((mean(list(curve.runs.values())[-1]), curve.entry, colour))
            for x, runs in zip(at, curve.runs.values()):
                axes.scatter([x] * len(runs), [r["results"]["test_bits_per_byte"] for r in runs], s=12, color=colour)
        axes.set_xscale("log")
        axes.set_xlabel(f"{label}, all at {found[0].runs[found[0].best][0]['budget']:.2g} FLOPs of training")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("test bits per byte, token by token")
    name_curves(panels[1], ends)
    return save_png(drawn, path)
