"""What a choice between a big and a small network per token and layer is worth: Duo-LLM's question on bytes of text.

    python scripts/duo_experiments.py [--source=runs/corpus] [--seeds=3]

Every seed trains a decoder of six layers whose tokens draw their networks (stage 1), tries all 64 patterns of a token
with the oracle (stage 2), and teaches a router on the frozen networks (stage 3). All arms are routes through the same
weights. Fixed patterns and the size of noise are chosen on the validation part. What is printed is of the test part, in
three tables: scores that a model can have; bounds, which know the token that is to be predicted; and controls of the
oracle, whose minimum over many patterns is below their mean even if routes carry nothing. Runs and results lie in
--workdir, where they count as done.
"""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from depth_experiments import Line, table

from moe_zoo.compare.adapters.running import Tuner
from moe_zoo.core import param as P
from moe_zoo.core.schema import build_choice
from moe_zoo.data import Corpus, load_corpus, split
from moe_zoo.dispatch import DISPATCHERS
from moe_zoo.inference import Loaded, load
from moe_zoo.models import Decoder
from moe_zoo.train import loop
from moe_zoo.train.config import Config, config_from_dict
from moe_zoo.transform import losses_along, patterns, search_greedily

LAYERS, STEPS, ROUTER_STEPS = 6, 1000, 200
#: windows of the test and the validation part, and tokens of each that are predicted
ROWS, LENGTH = 64, 64
#: random fixed patterns of which the best is taken
TRIED = 8
HALF = LAYERS // 2
PARTS = ("model", "bound", "control")


# ------------------------------------------------------------------------------------------------- the model, the text


def base_config(source: str, seed: int) -> Config:
    """How stage 1 trains: every token draws its network in every layer."""
    return config_from_dict({
        "model": {
            "hidden_size": 64, "layers": f"{LAYERS}*moe", "num_experts": 2, "moe_intermediate_size": 256,
            "experts": {"name": "big_small", "ratio": 16}, "attention": {"num_attention_heads": 4},
            "router": {"name": "thor", "granularity": "token", "eval_granularity": "token"}, "losses": {},
            "dispatch": {"name": "dropless"},
        },
        "data": {"source": source, "seq_len": 128, "batch_size": 16, "eval_batch_size": 64},
        "optim": {"learning_rate": 5e-3, "warmup_steps": 50, "weight_decay": 0.01},
        "train": {"steps": STEPS, "seed": seed},
        "checkpoint": {"every": STEPS},
        "log": {"every": 100, "eval_every": STEPS, "eval_rows": 64, "tensorboard": False},
    })  # fmt: skip


def router_config(config: Config) -> Config:
    """How stage 3 trains: routers alone, under one budget for all layers."""
    tree = config.to_dict()
    tree["model"] |= {"router": {"name": "duo_llm", "total_steps": ROUTER_STEPS}, "dispatch": {"name": "everywhere"}}
    tree["optim"] |= {"learning_rate": 1e-2, "weight_decay": 0.0, "warmup_steps": 10}
    tree["train"] |= {"steps": ROUTER_STEPS, "freeze": ["*", "!*.router.*"]}
    tree["train"]["objective"] = {"name": "global_budget", "share": 0.5, "weight": 10.0}
    return config_from_dict(tree)


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of bytes: `tokens` [N, S], and the bytes behind each, `targets`."""

    tokens: np.ndarray
    targets: np.ndarray

    @classmethod
    def drawn(cls, corpus: Corpus, rows: int, random: np.random.Generator) -> "Text":
        """Each from a document of its own, if there are enough that are long enough."""
        long = [i for i in range(len(corpus)) if len(corpus.document(i)) > LENGTH]
        found = []
        for i in random.permutation(np.resize(random.permutation(long), rows)):
            document = corpus.document(i)
            begin = random.integers(len(document) - LENGTH)
            found.append(document[begin : begin + LENGTH + 1])
        windows = np.stack(found).astype(np.int32)
        return cls(windows[:, :-1], windows[:, 1:])

    def shuffled(self, random: np.random.Generator) -> "Text":
        """With the targets of other tokens, as often each: nothing that routes could know of."""
        return Text(self.tokens, random.permutation(self.targets.reshape(-1)).reshape(self.targets.shape))


# -------------------------------------------------------------------------------------------------------- what is said


def line(losses: np.ndarray, routes: np.ndarray | None = None) -> Line:
    """Nats per byte and, of routes [..., L], the share of big networks and the mean layer, from 0, that they are in;
    of those of single tokens [N, S, L] also the shares in the first and last quarter of the windows.
    """
    said = {"nats": float(losses.mean())}
    if routes is None:
        return said
    big = routes == 0
    said |= {"big": float(big.mean())}
    if big.any():
        said |= {"mean layer": float((big * np.arange(big.shape[-1])).sum() / big.sum())}
    if big.ndim == 3:
        quarter = big.shape[1] // 4
        said |= {"first quarter": float(big[:, :quarter].mean()), "last quarter": float(big[:, -quarter:].mean())}
    return said


def best_fixed(losses_PNS: np.ndarray, which: np.ndarray) -> int:
    """The number of the best of some patterns for all tokens."""
    return int(which[losses_PNS[which].mean((1, 2)).argmin()])


# ------------------------------------------------------------------------------------------------------------ the arms


def arms(source: str, workdir: Path, seed: int) -> Iterator[tuple[str, Line]]:
    """Every line of one seed, by "table: arm"."""
    config, random = base_config(source, seed), np.random.default_rng(seed)
    loop.train(config, workdir / f"seed{seed}")
    base = load(workdir / f"seed{seed}")
    # few tokens at a time: both networks of all are quicker than rows sorted
    base = changed(base, P.arrays(base.model), dispatch=build_choice(DISPATCHERS, "everywhere", ""))
    corpus = load_corpus(source, base.tokenizer)
    parts = split(corpus, config.data.fractions, config.data.seed, tokenizer=base.tokenizer)
    choose, test = (Text.drawn(parts[part], ROWS, random) for part in ("validation", "test"))
    every = patterns(LAYERS)
    chosen, judged = (losses_along(base, text.tokens, text.targets, every) for text in (choose, test))
    yield from fixed(base, test, chosen, judged, random)
    routed = Tuner(router_config(config)).run(P.arrays(base.model), parts["train"], ROUTER_STEPS, seed)
    yield "model: learned router, r = 0.5", line(*followed(routed, test))
    yield from bounds(base, test, judged)
    yield from controls(base, choose, test, chosen, judged, random)


def fixed(base: Loaded, test: Text, chosen, judged, random: np.random.Generator) -> Iterator[tuple[str, Line]]:
    """Patterns for all tokens, and random routes."""
    every = patterns(LAYERS)
    big = (every == 0).sum(1)
    for name, b in (("all small", 0), ("all big", LAYERS)):
        p = int(np.flatnonzero(big == b)[0])
        yield f"model: {name}", line(judged[p], every[p])
    for b in range(1, LAYERS):
        p = best_fixed(chosen, np.flatnonzero(big == b))
        yield f"model: best fixed layers, {b} big", line(judged[p], every[p])
    half = np.flatnonzero(big == HALF)
    yield f"model: random fixed layers, {HALF} big", line(judged[half], every[half])
    p = best_fixed(chosen, random.permutation(half)[:TRIED])
    yield f"model: best of {TRIED} random fixed layers, {HALF} big", line(judged[p], every[p])
    draws = random.integers(0, 2, (8, *test.tokens.shape, LAYERS))
    yield "model: every token and layer at random", line(losses_along(base, test.tokens, test.targets, draws), draws)


def followed(routed: Loaded, text: Text) -> tuple[np.ndarray, np.ndarray]:
    """The losses of a model with learned routers, and its routes."""
    decided = routed(text.tokens, return_routing=True).aux.stats["router_experts"]
    routes = np.stack([np.asarray(layer).reshape(text.tokens.shape) for layer in decided], -1)
    return losses_along(routed, text.tokens, text.targets, routes[None])[0], routes


def bounds(base: Loaded, test: Text, judged) -> Iterator[tuple[str, Line]]:
    """What the oracle finds, by budget."""
    every = patterns(LAYERS)
    for b in range(1, LAYERS):
        found = search_greedily(base, test.tokens, test.targets, patterns(LAYERS, b))
        yield f"bound: greedy oracle, {b} big", line(found.loss, found.routes)
    found = search_greedily(base, test.tokens, test.targets, every)
    yield "bound: greedy oracle, any", line(found.loss, found.routes)
    small, hard = judged[0], found.difficulty
    high = small >= np.quantile(small, 0.75)
    yield "bound: difficulty", {
        "mean": float(hard.mean()), "of high losses below 0.1": float((hard[high] < 0.1).mean()),
    }  # fmt: skip
    big = (every == 0).sum(1)
    for name, which in (("1 big", big == 1), (f"{HALF} big", big == HALF), ("any", big >= 0)):
        best = judged[which].argmin(0)
        yield f"bound: oracle apart, {name}", line(judged[which].min(0), every[which][best])


def controls(base: Loaded, choose: Text, test: Text, chosen, judged, random) -> Iterator[tuple[str, Line]]:
    """How far the minimum over all patterns lies below their mean: of the model, of the model asked for the bytes of
    other places, and of one whose networks are both its big one plus noise, as much as spreads patterns alike.
    """
    every = patterns(LAYERS)
    yield "control: the model", spread(judged)
    other = test.shuffled(random)
    yield "control: shuffled targets", spread(losses_along(base, other.tokens, other.targets, every))
    low, high = 0.0, 2.0
    for _ in range(6):
        size = (low + high) / 2
        noisy = with_noise(base, size, random)
        wide = spread(losses_along(noisy, choose.tokens, choose.targets, every))["deviation"]
        low, high = (size, high) if wide < spread(chosen)["deviation"] else (low, size)
    found = spread(losses_along(noisy, test.tokens, test.targets, every))
    yield "control: twice the big network, with noise", found | {"noise": size}


def spread(losses_PNS: np.ndarray) -> Line:
    """Over all patterns, of each token: mean, mean standard deviation, minimum; how far the minimum is below the mean,
    also in standard deviations; and the minima over patterns with 1, 2, ... big networks.
    """
    mean, low, deviation = losses_PNS.mean(), losses_PNS.min(0).mean(), losses_PNS.std(0).mean()
    big = (patterns(LAYERS) == 0).sum(1)
    return {
        "mean of patterns": float(mean), "deviation": float(deviation), "oracle apart": float(low),
        "gain": float(mean - low), "gain / deviation": float((mean - low) / deviation),
        **{f"{b} big": float(losses_PNS[big == b].min(0).mean()) for b in range(1, LAYERS)},
    }  # fmt: skip


def with_noise(base: Loaded, size: float, random: np.random.Generator) -> Loaded:
    """The model with two copies of its big network, each entry of each times a normal number around 1."""
    values = P.arrays(base.model)
    for path in [path for path in values if ".experts.big." in path]:
        clean = np.asarray(values[path])
        for name in ("big", "small"):
            noise = random.standard_normal(clean.shape).astype(np.float32)
            values[path.replace(".big.", f".{name}.")] = clean * (1 + size * noise)
    experts = base.config.experts
    alike = dataclasses.replace(experts, config=dataclasses.replace(experts.config, ratio=1))
    return changed(base, values, experts=alike)


def changed(base: Loaded, values: Mapping[str, Any], **settings) -> Loaded:
    """A model of other settings with these weights."""
    config = dataclasses.replace(base.config, **settings)
    return dataclasses.replace(base, model=P.replace(Decoder(config), values), config=config)


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="runs/corpus", help="a corpus, as in data.source")
    parser.add_argument("--workdir", type=Path, default=Path("runs/duo_experiments"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    store = args.workdir / "found.json"
    done: dict[str, dict[str, Line]] = json.loads(store.read_text()) if store.is_file() else {}
    for seed in range(args.seeds):
        if str(seed) in done:
            continue
        began, found = time.process_time(), {}
        for arm, found[arm] in arms(args.source, args.workdir, seed):
            said = ", ".join(f"{name} {value:.3f}" for name, value in found[arm].items())
            print(f"seed {seed} {time.process_time() - began:5.0f} s  {arm}: {said}", flush=True)
        done[str(seed)] = found
        store.write_text(json.dumps(done, indent=1))
    names = dict.fromkeys(arm for found in done.values() for arm in found)
    for part in PARTS:
        mine = [arm for arm in names if arm.startswith(f"{part}: ")]
        print(table({arm.removeprefix(f"{part}: "): [found[arm] for found in done.values()] for arm in mine}) + "\n")


if __name__ == "__main__":
    main()
