"""Makes one run: the stages of its recipe, then the scores. It takes seconds, so nothing of it is saved on the way."""

import dataclasses
import gc
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_zoo.compare import runner
from moe_zoo.compare.adapters.bench import Bench
from moe_zoo.compare.adapters.plans import REFERENCE, Plan, staged, trained
from moe_zoo.compare.adapters.score import Score, sample, score
from moe_zoo.compare.claims import OF_ADAPTERS
from moe_zoo.compare.record import rounded
from moe_zoo.core import param as P
from moe_zoo.core.schema import to_dict
from moe_zoo.data import Corpus, load_tokenizer, split, train_iterator
from moe_zoo.data.tasks import INSTRUCTIONS
from moe_zoo.inference import Loaded
from moe_zoo.models import Decoder
from moe_zoo.models.counting import train_flops_per_token
from moe_zoo.sharding import make_mesh
from moe_zoo.train.config import Config
from moe_zoo.train.step import Trainer
from moe_zoo.transform import describe_experts, join_experts

_POINTS = 40  # of the curve of the loss


class Tuner:
    """Trains models of one config; the program is compiled once. `seconds`: processor time of all steps but the first;
    `flops`: per token and so many `steps`; `losses`: of every step of the last run.
    """

    def __init__(self, config: Config):
        self.config = config
        self.trainer = Trainer(config, make_mesh(devices=jax.local_devices()[:1]), config.train.objective.make())
        self.flops = train_flops_per_token(self.trainer.abstract, config.data.seq_len)
        self.seconds, self.steps, self.losses = 0.0, 0, []

    def run(self, begin: Mapping[str, jax.Array], corpus: Corpus, steps: int, seed: int) -> Loaded:
        """What `steps` steps on `corpus` make of a model with the weights `begin`; `seed` draws those not in there."""
        config, trainer = self.config, self.trainer
        tokenizer = load_tokenizer(config.data.tokenizer)
        begin = P.arrays(P.materialize(trainer.abstract, seed, None, begin))
        state = trainer.init_state(None, begin, corpus.domains)
        batches = train_iterator(
            corpus, tokenizer, seq_len=config.data.seq_len, batch_size=config.data.batch_size, seed=seed, prefetch=0
        )
        losses = []
        for step in range(steps):
            began = time.process_time()
            state, stats = trainer.train_step(state, next(batches), np.float32(step / steps))
            losses.append(float(stats["scalars"]["loss"]))
            if self.steps:  # the very first compiles
                self.seconds += time.process_time() - began
            self.steps += 1
        self.losses = losses
        return Loaded(trainer.model(state), config.model, tokenizer, config.data.tokenizer)


def run_one(plan: Plan, bench: Bench, workdir: Path) -> dict[str, Any]:
    """Trains and scores one run: its line of the store."""
    began, load = time.perf_counter(), os.getloadavg()[0]
    data, tasks = plan.config.data, plan.held_in
    tokenizer = load_tokenizer(data.tokenizer)
    parts = split(bench.corpus, data.fractions, data.seed, tokenizer=tokenizer)
    training = parts["train"].select(parts["train"].domain_ids < len(tasks))
    test = sample(parts["test"], plan.scale.questions)
    scored = lambda model: score(model, test, tokenizer, seq_len=data.seq_len, batch_size=data.eval_batch_size)
    tuned, tuners = follow(plan, bench.base, training)
    found = scored(tuned.model)
    steps = sum(tuner.steps for tuner in tuners)
    values = results(found, tuned.model, tasks, plan.scale.held_out)
    failure = None if math.isfinite(values["held_in_loss"]) else "the loss on the answers is not finite"
    run = {
        "key": plan.key(bench.fingerprint), "entry": plan.entry.name, "seed": plan.seed, "scale": plan.scale.name,
        "fits": list(plan.fits), "match": plan.match.says(), "config_hash": plan.config_hash,
        "cost_hash": plan.cost_hash,
        "data": {"source": data.source, "fingerprint": bench.fingerprint, "bytes": int(bench.corpus.num_bytes.sum()),
                 "domains": list(bench.corpus.domains), "held_in": list(tasks), "held_out": list(plan.scale.held_out)},
        "router": {"name": tuned.config.adapters.name}, "causal": True,
        "parameters": {"trained": trained(plan.config, plan.recipe)},
        "config": plan.config.to_dict(), "recipe": dataclasses.asdict(plan.recipe),
        "final": to_dict(tuned.config.adapters),
        "steps": steps, "tokens": steps * data.batch_size * data.seq_len,
        "train_flops_per_token": rounded(sum(t.flops * t.steps for t in tuners) / max(steps, 1), 6),
        "seconds": round(sum(tuner.seconds for tuner in tuners), 1),
        "losses": curve(tuners[-1].losses),
        "results": dict.fromkeys(OF_ADAPTERS) if failure else {n: rounded(v, 6) for n, v in values.items()},
        "tasks": by_task(found), "specialization": None if failure else specialization(found),
        "failure": failure, **runner.circumstances(),
    }  # fmt: skip
    if plan.entry.name == REFERENCE:
        run["base"] = by_task(scored(bench.base.model))
    run["timing"] = runner.timing(began, load)
    jax.clear_caches()
    gc.collect()
    return run


def follow(plan: Plan, base: Loaded, corpus: Corpus) -> tuple[Loaded, list[Tuner]]:
    """What the stages of the recipe make of the base, and who trained."""
    recipe, tasks = plan.recipe, plan.held_in
    for_one, for_all = recipe.steps(plan.config.train.steps, len(tasks))
    tuners: list[Tuner] = []
    config, begin = plan.config, P.arrays(base.model)
    if recipe.alone:
        owns = [corpus.select(corpus.domain_ids == i) for i in range(len(tasks))]
        owns = [own for own in owns if len(own)]  # a task that is not installed makes no expert
        models: Sequence[Loaded] = [base] * len(owns)
        for settings, steps in zip(recipe.alone, for_one, strict=True):
            tuners.append(Tuner(staged(plan.config, settings)))
            # experts begin from different draws, as those of different people do
            models = [
                tuners[-1].run(P.arrays(model.model), own, steps, plan.seed * 100 + i)
                for i, (model, own) in enumerate(zip(models, owns, strict=True))
            ]
        made = join_experts(base, models, recipe.join, seed=plan.seed)
        if made.model.instruction_size is not None:
            known = [task for i, task in enumerate(tasks) if (corpus.domain_ids == i).any()]
            made = describe_experts(made, [INSTRUCTIONS[task] for task in known])
        config, begin = dataclasses.replace(plan.config, model=made.config), P.arrays(made.model)
    for changes, steps in zip(recipe.then, for_all, strict=True):
        tuners.append(Tuner(staged(config, changes, alone=False)))
        made = tuners[-1].run(begin, corpus, steps, plan.seed)
        begin = P.arrays(made.model)
    return made, tuners


# ------------------------------------------------------------------------------------------------------------- numbers


def results(found: Score, model: Decoder, held_in: Sequence[str], held_out: Sequence[str]) -> dict[str, float | None]:
    """Every statistic of `claims.OF_ADAPTERS`; None where it does not apply. Tasks weigh alike."""
    mean = lambda values, tasks: float(np.mean([values[task] for task in tasks if task in values]))
    bits = found.specialization.bits
    each = found.experts_per_token
    return {
        "held_in_loss": mean(found.loss, held_in),
        "held_in_exact": mean(found.exact, held_in),
        "held_out_loss": mean(found.loss, held_out),
        "held_out_exact": mean(found.exact, held_out),
        "specialization": float(np.mean(bits)) if len(bits) and np.isfinite(bits).all() else None,
        "experts_per_token": float(np.mean(list(each.values()))) if each else None,
        "active_parameters": active_parameters(model, each),
    }


def active_parameters(model: Decoder, experts_per_token: Mapping[int, float]) -> float:
    """Numbers of the adapters that one token uses: of its experts A and B, what they share, and what decides."""
    total = 0.0
    for _, block, layers in model.blocks():
        for adapter in block.each_adapter().values():
            _, _, D, N = adapter.dims
            # a layer may have fewer experts than are stored, and of smaller rank
            ranks_LE = (np.asarray(adapter.scale[...]) != 0).sum(-1)
            for layer, ranks_E in zip(layers, ranks_LE, strict=True):
                live = max(1, int((ranks_E > 0).sum()))
                used = min(experts_per_token.get(layer, live), live) if adapter.num_experts > 1 else 1
                rows = float(ranks_E.sum()) / live
                total += used * rows * N + (1 if adapter.shared_a else used) * rows * D
            own = {name: value for name, value in P.arrays(adapter).items() if name not in ("a", "b", "scale")}
            total += sum(value.size for value in own.values())
    decides = P.arrays(model.adapters) if model.two_passes else {}
    return total + sum(value.size for value in decides.values())


def by_task(found: Score) -> dict[str, dict[str, float]]:
    """{task: {"loss", "exact", "questions"}}."""
    return {
        task: {"loss": rounded(found.loss[task], 5), "exact": rounded(found.exact[task], 4), "questions": n}
        for task, n in found.questions.items()
    }


def specialization(found: Score) -> dict[str, Any] | None:
    """What `analysis.Specialization.from_dict` takes, in few digits; None without experts."""
    table = found.specialization
    if not table.load:
        return None
    return {
        "domains": list(table.domains), "layers": list(table.layers), "tokens": rounded(table.tokens, 6),
        "load": [rounded(matrix, 4) for matrix in table.load], "bits": rounded(table.bits, 4),
    }  # fmt: skip


def curve(losses: Sequence[float]) -> dict[str, list]:
    """Means over at most 40 stretches of the last stage, by the step that each ends with."""
    parts = np.array_split(np.arange(len(losses)), min(_POINTS, len(losses)))
    values = np.asarray(losses)
    return {"step": [int(part[-1]) + 1 for part in parts],
            "loss": rounded([float(values[part].mean()) for part in parts], 5)}  # fmt: skip


def outcome(run: Mapping[str, Any]) -> str:
    """A run in one line."""
    took = f"{run['timing']['wall_seconds']:.0f} s in all"
    if run["failure"]:
        return f"failed, which is a result: {run['failure']} ({took})"
    r = run["results"]
    return (
        f"held in {r['held_in_loss']:.4f}, {r['held_in_exact']:.0%} exact; held out {r['held_out_loss']:.4f}, "
        f"{r['held_out_exact']:.0%} exact ({took})"
    )
