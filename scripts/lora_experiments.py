"""The experiments of what one LoRA for all tasks cannot be compared with: SAME, MoGU, and fine-tunes as one model.

    python scripts/lora_experiments.py continual      one task after the other, without the earlier ones' data
    python scripts/lora_experiments.py guarded        answer what is asked, refuse what is flagged
    python scripts/lora_experiments.py merged         a fine-tune of each task, as one model without training

All act beside the base of `scripts/compare_lora.py` (trained once, kept in --workdir), with three seeds. Lines go to
docs/results/compare_lora/NAME.json, where they are counted as done; what is printed is the table of the cards.
"""

from moe_zoo.cli import allocator

if __name__ == "__main__":
    allocator.use()

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_zoo.compare.adapters import bench, plans
from moe_zoo.compare.adapters.running import Tuner
from moe_zoo.compare.adapters.score import Score, sample, score
from moe_zoo.compare.runner import circumstances, use_compilation_cache
from moe_zoo.core import param as P
from moe_zoo.core.schema import overlay, to_dict
from moe_zoo.data import Corpus, Tokenizer, load_corpus, load_tokenizer, split
from moe_zoo.inference import Loaded
from moe_zoo.train.config import Config, config_from_dict, load_config
from moe_zoo.transform import breadcrumbs, dare, merge, task_arithmetic, ties

SCALE = plans.SCALES["cpu"]
RESULTS = Path("docs/results/compare_lora")
#: of one task in `continual`, of each part in `guarded`; LoRA beside MoGU gets as many as its three stages together
STEPS = {"continual": 60, "merged": 60, "tuned": 400, "glad": 10, "unwill": 100, "route": 300}
QUESTIONS = 64
Run = dict[str, Any]


def configured(base: Loaded, adapters: dict[str, Any], objective: dict[str, Any] | None = None) -> Config:
    """LoRA's settings of the comparison with these adapters beside the base."""
    tree = load_config("lora/lora:cpu").to_dict()
    model = {k: v for k, v in to_dict(base.config).items() if k != "adapters"}
    tree = overlay(tree, {"data": {"tokenizer": base.tokenizer_spec}})
    tree["model"] = model | {"adapters": adapters}
    if objective:
        tree["train"]["objective"] = objective
    return config_from_dict(tree)


# ----------------------------------------------------------------------------------------------------------- continual

FEED_FORWARD = {"target_modules": ["ffn.*"]}
SAME = {"name": "same", **FEED_FORWARD, "num_experts": 5, "r": 4, "lora_alpha": 8.0}
METHODS = {
    "lora": {"name": "lora", **FEED_FORWARD, "r": 22, "lora_alpha": 44.0},
    "same, no rules": SAME | {"gain": "none", "curvature": None, "freeze_below": -1.0},
    "same, freezing": SAME | {"gain": "none", "curvature": None},
    "same": SAME,
}


def continual(made: bench.Bench, tokenizer: Tokenizer, tasks: Sequence[str], seed: int) -> Iterator[tuple[str, Run]]:
    """Each method on one task after the other: what it answers of each when it was learned, and of all at the end."""
    for method, adapters in METHODS.items():
        config = configured(made.base, adapters)
        parts = split(made.corpus, config.data.fractions, seed, tokenizer=tokenizer)
        test = sample(parts["test"], QUESTIONS)
        tuner, begin, learned = Tuner(config), P.arrays(made.base.model), []
        for i, task in enumerate(tasks):
            own = parts["train"].select(parts["train"].domain_ids == i)
            model = tuner.run(begin, own, STEPS["continual"], seed)
            begin = P.arrays(model.model)
            learned.append(scored(model, test.select(test.domain_ids == i), tokenizer, config).exact[task])
        found = scored(model, test, tokenizer, config)
        exact = [found.exact[task] for task in tasks]
        yield method, {
            "exact": float(np.mean(exact)), "loss": float(np.mean([found.loss[task] for task in tasks])),
            "learned": float(np.mean(learned)), "forgotten": float(np.mean(np.subtract(learned, exact)[:-1])),
            "each": {"learned": np.round(learned, 4).tolist(), "kept": np.round(exact, 4).tolist()},
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- guarded

OUTPUT = {"target_modules": ["o"]}
MOGU = {"name": "mogu", **OUTPUT, "r": 8, "lora_alpha": 16.0, "d_router": 512}
FLIPPED = {"name": "answer_ratio", "prefer": "rejected"}
STAGES = (
    ("glad", {"stage": "glad", "freeze_experts": False}, FLIPPED | {"domains": (1,)}),
    ("unwill", {"stage": "unwill", "freeze_experts": False}, FLIPPED | {"domains": (0,)}),
    ("route", {"stage": "route", "unsafe_domains": (1,)}, None),
)


def guarded(made: bench.Bench, tokenizer: Tokenizer, tasks: Sequence[str], seed: int) -> Iterator[tuple[str, Run]]:
    """A model that answers everything, flagged or not; it with one LoRA that learns to refuse; it with MoGU."""
    corpus = load_corpus("guarded_tasks", tokenizer)
    lora = {"name": "lora", "r": 16, "lora_alpha": 32.0}
    begin = configured(made.base, lora)
    parts = split(corpus, begin.data.fractions, seed, tokenizer=tokenizer)
    single = lambda part: part.select(~part.rejected_documents())
    train, test = parts["train"], sample(single(parts["test"]), 8 * QUESTIONS)
    plain = single(train).select(single(train).domain_ids == 0)
    answers = merge(Tuner(begin).run(P.arrays(made.base.model), plain, STEPS["tuned"], seed))
    yield "before", kept_and_refused(answers, test, tokenizer, begin)

    config = configured(answers, lora | OUTPUT)
    total = sum(STEPS[stage] for stage, _, _ in STAGES)
    model = Tuner(config).run(P.arrays(answers.model), single(train), total, seed)
    yield "lora", kept_and_refused(model, test, tokenizer, config)

    model = answers
    for stage, adapters, objective in STAGES:
        config = configured(answers, MOGU | adapters, objective)
        own = train if objective else single(train)
        model = Tuner(config).run(P.arrays(model.model), own, STEPS[stage], seed)
        if not objective:
            yield "mogu", kept_and_refused(model, test, tokenizer, config)


def kept_and_refused(model: Loaded, test: Corpus, tokenizer: Tokenizer, config: Config) -> Run:
    """Plain questions that are answered right, flagged ones that are refused, and the losses of both."""
    found = scored(model, test, tokenizer, config)
    return {"answered": found.exact["plain"], "refused": found.exact["flagged"],
            "loss_plain": found.loss["plain"], "loss_flagged": found.loss["flagged"]}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- merged

MERGES: dict[str, Callable[[Loaded, list[Loaded], int], Loaded]] = {
    "the base": lambda base, tuned, seed: base,
    "mean": lambda base, tuned, seed: task_arithmetic(base, tuned, 1 / len(tuned)),
    "task arithmetic": lambda base, tuned, seed: task_arithmetic(base, tuned),
    "TIES": lambda base, tuned, seed: ties(base, tuned),
    "DARE": lambda base, tuned, seed: dare(base, tuned, 0.3, seed=seed),
    "Breadcrumbs": lambda base, tuned, seed: breadcrumbs(base, tuned),
}


def merged(made: bench.Bench, tokenizer: Tokenizer, tasks: Sequence[str], seed: int) -> Iterator[tuple[str, Run]]:
    """Each task's own model on its task, then the models that they all amount to on all tasks."""
    config = configured(made.base, {"name": "lora", "r": 18, "lora_alpha": 36.0})
    parts = split(made.corpus, config.data.fractions, seed, tokenizer=tokenizer)
    test, begin, tuner = sample(parts["test"], QUESTIONS), P.arrays(made.base.model), Tuner(config)
    own = [parts["train"].select(parts["train"].domain_ids == i) for i in range(len(tasks))]
    tuned = [merge(tuner.run(begin, part, STEPS["merged"], seed * 100 + i)) for i, part in enumerate(own)]
    alone = [scored(model, test, tokenizer, config) for model in tuned]
    mean = lambda found, value: float(np.mean([getattr(found, value)[task] for task in tasks]))
    others = lambda found: float(np.mean([found.loss[task] for task in SCALE.held_out]))
    yield (
        "each on its own task",
        {
            "exact": float(np.mean([found.exact[task] for found, task in zip(alone, tasks, strict=True)])),
            "loss": float(np.mean([found.loss[task] for found, task in zip(alone, tasks, strict=True)])),
            "loss_held_out": float(np.mean([others(found) for found in alone])),
        },
    )
    for name, make in MERGES.items():
        found = scored(make(made.base, tuned, seed), test, tokenizer, config)
        yield name, {"exact": mean(found, "exact"), "loss": mean(found, "loss"), "loss_held_out": others(found)}


# ------------------------------------------------------------------------------------------------------- runs and table


def scored(model: Loaded, test: Corpus, tokenizer: Tokenizer, config: Config) -> Score:
    """All test questions."""
    data = config.data
    return score(model.model, test, tokenizer, seq_len=data.seq_len, batch_size=data.eval_batch_size)


EXPERIMENTS: dict[str, tuple[Callable[..., Iterator[tuple[str, Run]]], tuple[str, ...]]] = {
    "continual": (continual, ("exact", "learned", "forgotten", "loss")),
    "merged": (merged, ("exact", "loss", "loss_held_out")),
    "guarded": (guarded, ("answered", "refused", "loss_plain", "loss_flagged")),
}


def table(runs: dict[str, dict[str, Run]], columns: Sequence[str]) -> str:
    """Means over seeds and, behind +-, the standard deviation."""
    methods = {method: None for run in runs.values() for method in run}
    rows = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for method in methods:
        values = [[run[method][column] for run in runs.values()] for column in columns]
        rows.append(f"| {method} | {' | '.join(f'{np.mean(v):.3f} +- {np.std(v, ddof=1):.3f}' for v in values)} |")
    return "\n".join(rows)


def main() -> None:
    """Runs the seeds that are missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", default="runs/compare_lora", help="where the base is kept")
    arguments = parser.parse_args()
    allocator.give_back()
    run, columns = EXPERIMENTS[arguments.experiment]
    path = RESULTS / f"{arguments.experiment}.json"
    held_in = plans.held_in(load_config("lora/lora:cpu"))
    workdir = Path(arguments.workdir).absolute()
    use_compilation_cache(workdir / "compiled")
    made = bench.prepare(SCALE, held_in, workdir, print)
    tokenizer = load_tokenizer(made.base.tokenizer_spec)
    stored = json.loads(path.read_text()) if path.is_file() else {}
    if stored.get("fingerprint") != made.fingerprint:
        about = {"fingerprint": made.fingerprint, "tasks": list(held_in), "steps": STEPS}
        stored = about | circumstances() | {"runs": {}}
    for seed in range(arguments.seeds):
        if str(seed) in stored["runs"]:
            continue
        stored["runs"][str(seed)] = {}
        for method, values in run(made, tokenizer, held_in, seed):
            stored["runs"][str(seed)][method] = values
            print(f"seed {seed}, {method}: " + ", ".join(f"{c} {values[c]:.3f}" for c in columns), flush=True)
            jax.clear_caches()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(stored["runs"], columns))


if __name__ == "__main__":
    main()
