"""What selectors of depth do to a trained model that stays as it is: Dr.LLM and FiRST on questions of addition.

    python scripts/depth_experiments.py dr_llm      layers skipped or repeated, by labels that a search has found
    python scripts/depth_experiments.py first       layers skipped, by gates that the loss has taught
    python scripts/depth_experiments.py first_lora  the same with LoRA beside them

The model, a decoder of eight layers, is trained once and lies in --workdir, as do results, which count as done. Seeds
draw what is learned from, the questions that are asked, and the selectors. What is printed is the table of the cards.
"""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_zoo.compare.adapters.running import Tuner
from moe_zoo.core import param as P
from moe_zoo.core.schema import to_dict
from moe_zoo.data import Corpus, load_corpus, split
from moe_zoo.depth.paths import all_short, label_by_trying
from moe_zoo.inference import Loaded, load
from moe_zoo.train import loop
from moe_zoo.train.config import Config, config_from_dict
from moe_zoo.transform import Questions, add_adapters, add_selectors, answered, set_budget, teach_paths

#: of a question, both numbers having at most as many digits; so many questions of each
DIGITS, COUNT = (1, 2, 3), 12_000
STEPS = 2000
#: questions of each number of digits that selectors learn from, and that are asked
LEARN, TEST = 500, 300
#: of those to learn from, by which fixed layers are chosen to be compared with FiRST
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
    """A trained model and its questions: `learn` to learn from, also as the corpus `text`, `test` to be judged by."""

    base: Loaded
    learn: Questions
    test: Questions
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
    text, test = drawn(parts["train"], LEARN, random), drawn(parts["test"], TEST, random)
    return Bench(base, questions(base, text), questions(base, test), text, config)


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

ALPHAS = (0.02,)
TUNING = {"gates": 60, "lora": 60}
LORA = {"name": "lora", "target_modules": ["mixer.*", "ffn.*"], "r": 4, "lora_alpha": 8.0}


def first(workdir: Path, seed: int, lora: bool = False) -> Iterator[tuple[str, Line]]:
    """Gates, and as many fixed layers: the best ones and random ones; all of it with LoRA beside it, if asked for."""
    bench, random = make_bench(workdir, seed), np.random.default_rng(seed)
    L, few = bench.layers, bench.learn.take(random.permutation(len(bench.learn))[:SCORED])
    whole = add_selectors(bench.base, "fixed_depth")
    judged = lambda model: line(*answered(tuned(bench, model, LORA, seed) if lora else model, bench.test))
    yield "no routing", judged(whole)
    for alpha in ALPHAS:
        gated = tuned(bench, add_selectors(bench.base, {"name": "first", "alpha": alpha}, seed=seed), None, seed)
        yield f"FiRST, alpha {alpha}", judged(gated)
        mean = answered(gated, bench.test)[1].sum(1).mean()
        count = int(np.clip(round(mean), L - 2, L))
        paths = [path for path in all_short(L) if path.sum() == count and path.max() == 1]
        hits = [answered(whole, few, np.tile(path, (len(few), 1)))[0].mean() for path in paths]
        best = paths[int(np.argmax(hits))]
        for arm, path in (("best fixed", best), ("random fixed", random.permutation(best))):
            fixed = add_selectors(bench.base, {"name": "fixed_depth", "path": path.tolist()})
            yield f"{arm} layers, as many as at {alpha}, rounded", judged(fixed)


def first_lora(workdir: Path, seed: int) -> Iterator[tuple[str, Line]]:
    """The second phase, of every arm."""
    return first(workdir, seed, lora=True)


def tuned(bench: Bench, model: Loaded, adapters: dict[str, Any] | None, seed: int) -> Loaded:
    """What training makes of the model: its selectors, or adapters that are put beside it."""
    if adapters is not None:
        model = add_adapters(model, adapters, seed=seed)
    tree, steps = bench.config.to_dict(), TUNING["gates" if adapters is None else "lora"]
    tree["model"], tree["train"]["steps"] = to_dict(model.config), steps
    tree["optim"] |= {"learning_rate": 5e-2 if adapters is None else 2e-3, "weight_decay": 0.0, "warmup_steps": 10}
    return Tuner(config_from_dict(tree)).run(P.arrays(model.model), bench.text, steps, seed)


# --------------------------------------------------------------------------------------------------------------- main

PARTS: dict[str, Callable[[Path, int], Iterator[tuple[str, Line]]]] = {
    "dr_llm": dr_llm, "first": first, "first_lora": first_lora,
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
