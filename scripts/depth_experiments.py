"""What selectors of depth do to a trained model that stays as it is: Dr.LLM and FiRST on addition, FTP on text.

    python scripts/depth_experiments.py dr_llm      layers skipped or repeated, by labels that a search has found
    python scripts/depth_experiments.py first       layers skipped, by gates that the loss has taught; then LoRA
    python scripts/depth_experiments.py ftp         tokens that pass layers by

A model of eight layers is trained once, for addition and for text, and lies in --workdir, as do results, which count as
done. Seeds draw what is learned from, what choices are made by, the questions that are asked (the rows of text are the
same), and the selectors. Choices are made by validation data. What is printed is the table of the cards.
"""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_zoo.compare.adapters.running import Tuner
from moe_zoo.core import param as P
from moe_zoo.core.schema import to_dict
from moe_zoo.data import Corpus, eval_batches, load_corpus, split, train_iterator
from moe_zoo.depth.paths import all_short, label_by_trying
from moe_zoo.inference import Loaded, load
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.train import loop
from moe_zoo.train.config import Config, config_from_dict
from moe_zoo.train.objective import cross_entropy, forward
from moe_zoo.transform import (
    Questions,
    add_adapters,
    add_selectors,
    answered,
    search_sparsities,
    set_budget,
    teach_paths,
)

#: of a question, both numbers having at most as many digits; so many questions of each
DIGITS, COUNT = (1, 2, 3), 12_000
STEPS = 2000
#: questions of each number of digits that selectors learn from, that are asked, and that choices are made by
LEARN, TEST = 500, 300
#: of the latter, by which fixed layers are chosen to be compared with FiRST
SCORED = 256
BUDGETS = (-0.55, -0.45, -0.35)
MODEL = {
    "hidden_size": 64, "layers": "8*dense", "intermediate_size": 128, "attention": {"num_attention_heads": 4},
    "norm": "rms", "losses": {},
}  # fmt: skip
Line = dict[str, float]


# ------------------------------------------------------------------------------------------- the model, its questions


def write_questions(path: Path) -> None:
    """Records "417+86=" -> "305": the sum's digits from the last one on, which is the order that they are found in."""
    random, lines = np.random.RandomState(0), []
    for k in DIGITS:
        numbers = np.arange(10 ** (2 * k)) if k < 3 else random.randint(0, 10**6, 2 * COUNT)
        for number in random.permutation(np.unique(numbers))[:COUNT].tolist():
            a, b = divmod(number, 10**k)
            lines.append({"prompt": f"{a}+{b}=", "answer": str(a + b)[::-1], "domain": f"{k} digits"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def base_config(data: Path) -> Config:
    """How the model is trained."""
    return config_from_dict({
        "model": MODEL,
        "data": {"source": str(data), "seq_len": 96, "batch_size": 32, "eval_batch_size": 64},
        "optim": {"learning_rate": 3e-3, "schedule": "wsd", "warmup_steps": 50, "weight_decay": 0.01, "b2": 0.99},
        "train": {"steps": STEPS},
        "checkpoint": {"every": 1000},
        "log": {"every": 100, "eval_every": 500, "tensorboard": False},
    })  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bench:
    """A trained model and its questions: `learn` to learn from, also as the corpus `text`, `test` to be judged by,
    `choose` to make choices by.
    """

    base: Loaded
    learn: Questions
    test: Questions
    choose: Questions
    text: Corpus
    config: Config

    @property
    def layers(self) -> int:
        return self.base.config.num_layers


def make_bench(workdir: Path, seed: int) -> Bench:
    """With questions that the seed draws; the model is trained if it is not there."""
    data = workdir / "questions.jsonl"
    if not data.is_file():
        write_questions(data)
    config = base_config(data)
    loop.train(config, workdir / "base")
    base = load(workdir / "base")
    parts = split(load_corpus(str(data), base.tokenizer), config.data.fractions, 0, tokenizer=base.tokenizer)
    random = np.random.default_rng(seed)
    text, *others = (drawn(parts[n], k, random) for n, k in (("train", LEARN), ("test", TEST), ("validation", TEST)))
    return Bench(base, questions(base, text), *(questions(base, other) for other in others), text, config)


def drawn(corpus: Corpus, count: int, random: np.random.Generator) -> Corpus:
    """At most so many documents of each number of digits."""
    each = [random.permutation(np.flatnonzero(corpus.domain_ids == d))[:count] for d in range(len(corpus.domains))]
    return corpus.select(np.concatenate(each))


def questions(base: Loaded, corpus: Corpus) -> Questions:
    """The documents as questions and answers."""
    texts = [base.tokenizer.decode(corpus.document(i)).partition("=") for i in range(len(corpus))]
    return Questions.of(base, [(prompt + sign, answer) for prompt, sign, answer in texts])


def line(right: np.ndarray, times_NL: np.ndarray) -> Line:
    """What is said of an arm."""
    return {"exact": float(right.mean()), "layers": float(times_NL.sum(1).mean())}


def tried(model: Loaded, asked: Questions) -> np.ndarray:
    """Whether each of all short paths answers each question [P, N]."""
    every = lambda path: np.tile(path, (len(asked), 1))
    return np.stack([answered(model, asked, every(path))[0] for path in all_short(model.config.num_layers)])


def best_static(hits_PN: np.ndarray, layers: int, L: int) -> int:
    """The number of the path of so many layers, none of them twice, that answers most."""
    fitting = [p for p, path in enumerate(all_short(L)) if path.sum() == layers and path.max() == 1]
    return max(fitting, key=lambda p: hits_PN[p].mean())


# ------------------------------------------------------------------------------------------------------------- dr_llm


def dr_llm(workdir: Path, seed: int) -> Iterator[tuple[str, Line]]:
    """Classifiers that have learned labels, and what they are compared with at as many executed layers."""
    bench = make_bench(workdir, seed)
    L, random = bench.layers, np.random.default_rng(seed)
    routed = add_selectors(bench.base, "dr_llm", seed=seed)
    paths, learned, hits = all_short(L), tried(routed, bench.learn), tried(routed, bench.test)
    static = lambda p: line(hits[p], np.tile(paths[p], (len(bench.test), 1)))
    yield "no routing", static(0)
    labels, found = labelled(learned, L)
    true, there = labelled(hits, L)
    yield "the search, which knows the answers", line(there, true)
    taught, _ = teach_paths(routed, bench.learn.take(found), labels[found], seed=seed)
    right, times = answered(taught, bench.test)
    yield "Dr.LLM", line(right, times) | {"macro F1": macro_f1(times[there], true[there])}
    yield "random layers, as many", line(*answered(taught, bench.test, random.permuted(times, axis=1)))
    mean = times.sum(1).mean()
    low = min(int(mean), L - 1)
    two = [best_static(learned, n, L) if n < L else 0 for n in (low, low + 1)]
    which = np.where(random.random(len(right)) < mean - low, two[1], two[0])
    yield "the best fixed layers, as many", line(hits[which, np.arange(len(right))], paths[which])
    for n in (L - 1, L - 2):
        yield f"the best fixed layers, {n}", static(best_static(learned, n, L))
    for budget in BUDGETS:
        yield f"Dr.LLM, budget {budget:+.2f}", line(*answered(set_budget(taught, budget), bench.test))


def labelled(hits_PN: np.ndarray, L: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of questions of which it is known what answers them, and which have one."""
    number = {tuple(path): p for p, path in enumerate(all_short(L).tolist())}
    known = lambda which, asked: hits_PN[[number[tuple(path)] for path in asked.tolist()], which]
    return label_by_trying(known, hits_PN.shape[1], L)


def macro_f1(times_NL: np.ndarray, labels_NL: np.ndarray) -> float:
    """F1 over all layers and questions, the mean over the classes that there are labels of."""
    pairs = [(times_NL == c, labels_NL == c) for c in np.unique(labels_NL)]
    return float(np.mean([2 * (said & true).sum() / (said.sum() + true.sum()) for said, true in pairs]))


# -------------------------------------------------------------------------------------------------------------- first

#: prices of a layer, of which each seed takes the one that leaves about so many layers of validation questions
ALPHAS, KEPT = (0.01, 0.015, 0.02), 6
TUNING = {"gates": 60, "lora": 60}
LORA = {"name": "lora", "target_modules": ["mixer.*", "ffn.*"], "r": 4, "lora_alpha": 8.0}


def first(workdir: Path, seed: int) -> Iterator[tuple[str, Line]]:
    """Gates, and as many fixed layers, the best ones and random ones; then all of it with LoRA beside it."""
    bench, random = make_bench(workdir, seed), np.random.default_rng(seed)
    few = bench.choose.take(random.permutation(len(bench.choose))[:SCORED])
    whole, ask = add_selectors(bench.base, "fixed_depth"), lambda model, *path: answered(model, bench.test, *path)
    fixed = lambda path: add_selectors(bench.base, {"name": "fixed_depth", "path": path.tolist()})
    tuned_to = lambda path: ask(tuned(bench, fixed(path), LORA, seed))
    alpha, gated = gates(bench, seed)
    best_of = functools.cache(lambda count: best_fixed(whole, few, count))
    for told, with_gates, along in (
        ("", lambda: ask(gated), lambda path: ask(whole, np.tile(path, (len(bench.test), 1)))),
        (", LoRA", lambda: ask(tuned(bench, gated, LORA, seed)), tuned_to),
    ):
        yield f"no routing{told}", line(*along(np.ones(bench.layers, np.int8)))
        right, times = with_gates()
        yield f"FiRST{told}", line(right, times) | ({} if told else {"alpha": alpha})
        # as many layers on average: some questions with one more than the others
        mean = times.sum(1).mean()
        low = min(int(mean), bench.layers - 1)
        more = random.random(len(right)) < mean - low
        best = [best_of(count) for count in (low, low + 1)]
        for arm, paths in (("best", best), ("random", [random.permutation(path) for path in best])):
            pair = [along(path) for path in paths]
            right, times = (np.where(more.reshape(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(*pair, strict=True))
            yield f"{arm} fixed layers, as many{told}", line(right, times)


def gates(bench: Bench, seed: int) -> tuple[float, Loaded]:
    """The price of a layer, chosen by what it leaves of validation questions, and the gates learned at it."""
    found = {}
    for alpha in ALPHAS:
        model = tuned(bench, add_selectors(bench.base, {"name": "first", "alpha": alpha}, seed=seed), None, seed)
        found[alpha] = answered(model, bench.choose)[1].sum(1).mean(), model
        print(f"seed {seed}, alpha {alpha}: {found[alpha][0]:.3f} layers of validation questions", flush=True)
    alpha = min(ALPHAS, key=lambda alpha: abs(found[alpha][0] - KEPT))
    return alpha, found[alpha][1]


def best_fixed(whole: Loaded, asked: Questions, count: int) -> np.ndarray:
    """Of all paths of so many layers the one that answers most."""
    L = whole.config.num_layers
    paths = [np.isin(np.arange(L), kept).astype(np.int8) for kept in itertools.combinations(range(L), count)]
    hits = [answered(whole, asked, np.tile(path, (len(asked), 1)))[0].mean() for path in paths]
    return paths[int(np.argmax(hits))]


def tuned(bench: Bench, model: Loaded, adapters: dict[str, Any] | None, seed: int) -> Loaded:
    """What training makes of the model: its selectors, or adapters that are put beside it."""
    if adapters is not None:
        model = add_adapters(model, adapters, seed=seed)
    steps = TUNING["gates" if adapters is None else "lora"]
    changes = {"learning_rate": 5e-2 if adapters is None else 2e-3, "weight_decay": 0.0, "warmup_steps": 10}
    return trained(bench.config, model, bench.text, steps, seed, changes)


def trained(config: Config, model: Loaded, text: Corpus, steps: int, seed: int, optim: dict, **train) -> Loaded:
    """What so many steps make of what is not frozen."""
    tree = config.to_dict()
    tree["model"], tree["train"] = to_dict(model.config), tree["train"] | {"steps": steps} | train
    tree["model"]["remat"] = "block"  # layers in a loop, not side by side: few steps cost less than compiling
    tree["optim"] |= optim
    return Tuner(config_from_dict(tree)).run(P.arrays(model.model), text, steps, seed)


# ---------------------------------------------------------------------------------------------------------------- ftp

#: the part of all tokens in all layers that passes by; rows of text that are scored, and that choices are made by
SPARSITY, TEXT_STEPS, ROUTER_STEPS, ROWS, CHOICE = 0.25, 1500, 100, 128, 32
#: so that routers keep about as many tokens as they should
SPARSITY_COEF = 10.0


def text_config() -> Config:
    """How the model of text is trained."""
    return config_from_dict({
        "model": MODEL,
        "data": {"seq_len": 128, "batch_size": 16, "eval_batch_size": 32},
        "optim": {"learning_rate": 4e-3, "schedule": "wsd", "warmup_steps": 50, "weight_decay": 0.01, "b2": 0.99},
        "train": {"steps": TEXT_STEPS},
        "checkpoint": {"every": 500},
        "log": {"every": 100, "eval_every": 500, "eval_rows": 64, "tensorboard": False},
    })  # fmt: skip


def ftp(workdir: Path, seed: int) -> Iterator[tuple[str, Line]]:
    """A quarter of all tokens of all layers pass by: routers that learn and that do not, and two layers left out.

    Token by token, routers keep other shares than they are to: by validation text each is moved by one number.
    """
    config = text_config()
    loop.train(config, workdir / "text")
    base, data = load(workdir / "text"), config.data
    parts = split(load_corpus(data.source, base.tokenizer), data.fractions, data.seed, tokenizer=base.tokenizer)
    rows = {"seq_len": data.seq_len, "batch_size": data.eval_batch_size, "max_rows": ROWS}
    test = list(eval_batches(parts["test"], base.tokenizer, **rows))
    drawn_rows = dict(seq_len=data.seq_len, batch_size=CHOICE, seed=seed, prefetch=0)
    seen = next(train_iterator(parts["validation"], base.tokenizer, **drawn_rows))
    yield "the whole model", text_line(base, test)
    best = {"name": "fixed_depth", "path": two_left_out(base, seen).tolist()}
    yield "the two layers left out that cost least", text_line(add_selectors(base, best), test)
    L, settings = base.config.num_layers, {"name": "ftp", "sparsity_coef": SPARSITY_COEF}
    put = lambda router, **more: add_selectors(base, settings | {"router": router} | more, seed=seed)
    found, _ = search_sparsities(put("static"), seen["tokens"], SPARSITY, segment_ids=seen["segment_ids"], seed=seed)
    settings |= {"sparsities": list(found.config.depth.config.sparsities)}
    print(f"seed {seed}, found: {np.round(settings['sparsities'], 2).tolist()}", flush=True)
    ends = np.isin(np.arange(L), (0, L - 1))
    for name, each in (("equal", np.where(ends, 0, SPARSITY * L / (L - 2))), ("found", settings["sparsities"])):
        for router in ("random", "static"):
            yield f"{router} router, {name} sparsities", text_line(*scaled(put(router), each, seen, test))
    optim = {"learning_rate": 1e-2, "weight_decay": 0.0, "warmup_steps": 10}
    for name, router, more in (
        ("dynamic router", "dynamic", {}), ("dynamic router, one for all layers", "dynamic", {"share_router": True}),
        ("router of the hidden state", "hidden", {}),
    ):  # fmt: skip
        learning = put(router, **more), parts["train"], ROUTER_STEPS, seed, optim
        model = trained(config, *learning, objective={"name": "distill"})
        yield f"{name}, as it has learned", text_line(model, test)
        yield name, text_line(shifted(model, seen), test)


def scaled(model: Loaded, sparsities, seen: dict, batches: list[dict]) -> tuple[Loaded, list[dict]]:
    """The model and the batches with the multiple of the sparsities at which the share is right in `seen`."""
    at = lambda by, batch: (
        batch | {"inputs": {"depth_sparsity": np.float32(np.clip(by * np.array(sparsities), 0, 0.95))}}
    )
    by = settled(lambda by: text_line(model, [at(by, seen)]), 0.0, 4.0)
    return model, [at(by, batch) for batch in batches]


def shifted(model: Loaded, seen: dict) -> Loaded:
    """The model whose learned routers ask for so much more of every token that the share is right in `seen`."""
    values = P.arrays(model.model)
    name = next(n for n in values if n.endswith((".out_bias", "selector.bias")))
    unit = np.array([0, 1]) if name.endswith("out_bias") else 1  # of (stay, go), or of one number
    at = lambda by: dataclasses.replace(model, model=P.replace(model.model, values | {name: values[name] - by * unit}))
    return at(settled(lambda by: text_line(at(by), [seen]), -8.0, 8.0))


def settled(says: Callable[[float], Line], low: float, high: float) -> float:
    """The number between the two, found by halving, at which the share of tokens, which falls, is 1 - SPARSITY."""
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if says(middle)["share of tokens"] > 1 - SPARSITY else (low, middle)
    return (low + high) / 2


def two_left_out(base: Loaded, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Of all paths without two layers the one with the lowest loss on a batch, its rows read as one text each."""

    def nats(model, batch, path_L):
        rows = {"depth": jnp.tile(path_L[:, None], (1, len(batch["tokens"])))}
        logits, _, _ = model(batch["tokens"], inputs=rows)
        return jnp.where(batch["loss_mask"], cross_entropy(logits, batch["targets"]), 0).sum()

    run, model, L = jax.jit(nats), add_selectors(base, "fixed_depth").model, base.config.num_layers
    paths = [path for path in all_short(L) if path.sum() == L - 2]
    return min(paths, key=lambda path: float(run(model, batch, jnp.asarray(path, jnp.int32))))


def text_line(model: Loaded, batches: list[dict[str, np.ndarray]]) -> Line:
    """Bits per byte, the share of tokens that go through a layer, and forward FLOPs of a token with that share."""
    told = [jax.device_get(_sums(model.model, batch)) for batch in batches]
    nats, through, tokens = np.sum(told, axis=0, dtype=float)
    # a document's end is a target, too, and no byte
    size = sum(int((batch["loss_mask"] & (batch["targets"] != model.tokenizer.eos_id)).sum()) for batch in batches)
    share, seq_len = through / tokens if tokens else 1.0, batches[0]["tokens"].shape[1]
    flops = text_flops(model, share, (seq_len + 1) / 2)
    return {"bits per byte": float(nats / np.log(2) / size), "share of tokens": float(share), "MFLOP": flops / 1e6}


@jax.jit
def _sums(model, batch):
    """(nats, tokens that go through, tokens), of all layers."""
    logits, aux = forward(model, batch)
    nats = jnp.where(batch["loss_mask"], cross_entropy(logits, batch["targets"]), 0).sum()
    stats = [told.stats["depth_share"] for _, told in aux.layers.values() if "depth_share" in told.stats]
    return nats, sum(stat.total.sum() for stat in stats), sum(stat.weight.sum() for stat in stats)


def text_flops(model: Loaded, share: float, context: float) -> float:
    """Forward FLOPs of a token if that share of them goes through a layer, all layers being alike; keys and values of
    those that pass by are counted, if they leave some.
    """
    c, block = model.config, model.model.segments[0].blocks[0]
    bare = Decoder(dataclasses.replace(c, depth=ModelConfig().depth))
    head = 2 * c.hidden_size * c.vocab_size
    layer = (bare.flops_per_token(context) - head) / c.num_layers
    if not block.selects:
        return c.num_layers * layer + head
    left = (1 - share) * block.mixer.flops_to_remember() if block.selector.leaves_keys else 0
    return float(c.num_layers * (share * layer + left + block.selector.flops_per_token()) + head)


# --------------------------------------------------------------------------------------------------------------- main

PARTS: dict[str, Callable[[Path, int], Iterator[tuple[str, Line]]]] = {
    "dr_llm": dr_llm, "first": first, "ftp": ftp,
}  # fmt: skip


def table(found: dict[str, list[Line]]) -> str:
    """In markdown: means and standard deviations over the seeds."""
    columns = list(dict.fromkeys(name for lines in found.values() for one in lines for name in one))
    rows = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for arm, lines in found.items():
        cells = []
        for name in columns:
            values = [one[name] for one in lines if name in one]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
        rows.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--workdir", type=Path, default=Path("runs/depth_experiments"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    store = args.workdir / f"{args.part}.json"
    done: dict[str, dict[str, Line]] = json.loads(store.read_text()) if store.is_file() else {}
    for seed in range(args.seeds):
        if str(seed) in done:
            continue
        began, found = time.process_time(), {}
        for arm, found[arm] in PARTS[args.part](args.workdir, seed):
            said = ", ".join(f"{name} {value:.3f}" for name, value in found[arm].items())
            print(f"seed {seed} {time.process_time() - began:5.0f} s  {arm}: {said}", flush=True)
        store.write_text(json.dumps(done | {str(seed): found}, indent=1))
        done = json.loads(store.read_text())
    arms = dict.fromkeys(arm for found in done.values() for arm in found)
    print(table({arm: [found[arm] for found in done.values() if arm in found] for arm in arms}))


if __name__ == "__main__":
    main()
