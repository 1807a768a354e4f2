"""Makes the runs that the store does not have yet, one after the other, each by the ordinary training loop.

A run trains in a folder of its own and goes on from its checkpoint after a kill; when it is in the store the folder is
removed. Several processes may work on one store: a run belongs to whoever holds the lock of its folder.
"""

import contextlib
import datetime
import fcntl
import gc
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from moe_zoo.compare import record
from moe_zoo.compare.claims import STATISTICS
from moe_zoo.compare.entries import Plan
from moe_zoo.compare.store import Store
from moe_zoo.data import Corpus
from moe_zoo.models.counting import count_parameters, router_parameters
from moe_zoo.sharding import make_mesh
from moe_zoo.train import loop
from moe_zoo.train.evaluate import evaluate
from moe_zoo.train.log_writers import read_metrics
from moe_zoo.train.step import Trainer


def run_all(
    plans: Sequence[Plan],
    store: Store,
    corpus: Corpus,
    workdir: Path,
    *,
    say: Callable[[str], None],
    until: float | None,
    make: Callable[[Plan, Corpus, Path], dict[str, Any] | None] | None = None,
    outcome: Callable[[dict[str, Any]], str] | None = None,
) -> bool:
    """Trains what is not in the store, in the order of `plans`; starts nothing after the time `until` (of
    `time.monotonic`). False if it was stopped by a signal before it was through.

    `make`: a run's line of the store (`run_one`); `outcome`: what is said of it.
    """
    make, outcome = make or run_one, outcome or _outcome
    workdir = Path(workdir).absolute()
    use_compilation_cache(workdir / "compiled")
    for number, plan in enumerate(plans, 1):
        key = plan.key(corpus.fingerprint)
        head = f"[{number}/{len(plans)}] {plan.entry.name}, seed {plan.seed}"
        if until is not None and time.monotonic() > until:
            say(f"{head}: not started, the time is up; the same command goes on from here")
            return True
        with locked(workdir / f"{key}.lock") as mine:
            if key in store.keys():
                say(f"{head}: in the store")
                continue
            if not mine:
                say(f"{head}: another process is at it")
                continue
            say(f"{head}: {plan.match.says()}")
            run = make(plan, corpus, workdir / key)
            if run is None:
                return False
            store.append(run)
            say(f"{head}: {outcome(run)}")
            shutil.rmtree(workdir / key, ignore_errors=True)
        with contextlib.suppress(OSError):
            (workdir / f"{key}.lock").unlink()
    return True


def run_one(plan: Plan, corpus: Corpus, workdir: Path) -> dict[str, Any] | None:
    """Trains and scores one run: its line of the store; None if a signal stopped it."""
    config, began, load = plan.config, time.perf_counter(), os.getloadavg()[0]
    facts = describe(plan, corpus)
    failure, test = None, None
    try:
        done = loop.train(config, workdir)
    except loop.TrainingError as error:
        if isinstance(error.__cause__, OSError) or not workdir.is_dir():
            raise  # the disk's fault and not the entry's
        failure = str(error)
    else:
        if not done["finished"]:
            return None
        trainer = done["trainer"]
        test = evaluate(
            trainer.model(done["state"]), done["parts"]["test"], done["tokenizer"], seq_len=config.data.seq_len,
            stride=config.data.eval_stride, batch_size=config.data.eval_batch_size, max_rows=plan.scale.test_rows,
            sharding=trainer.batch_sharding,
        )  # fmt: skip
        del done
    run = facts | measure(plan, workdir, test) | {"failure": failure}
    run["timing"] = timing(began, load)
    jax.clear_caches()
    gc.collect()
    return run


def describe(plan: Plan, corpus: Corpus) -> dict[str, Any]:
    """What is known of a run before it is made."""
    config = plan.config
    trainer = Trainer(config, make_mesh(config.mesh), config.train.objective.make())
    routed = [block.ffn for _, block, _ in trainer.abstract.routed()]
    router = routed[0].router if routed else None
    return {
        "key": plan.key(corpus.fingerprint), "entry": plan.entry.name, "seed": plan.seed, "scale": plan.scale.name,
        "fits": list(plan.fits), "match": plan.match.says(), "width": plan.match.width,
        "config_hash": plan.config_hash, "cost_hash": plan.cost_hash,
        "data": {"source": Path(config.data.source).name, "fingerprint": corpus.fingerprint,
                 "bytes": int(corpus.num_bytes.sum()), "domains": list(corpus.domains)},
        **circumstances(),
        "router": {
            "name": config.model.router.name if routed else None,
            "decision": router.decision.__name__ if routed else None,
            "parameters": router_parameters(trainer.abstract),
            "num_experts": routed[0].num_experts if routed else 0,
        },
        "causal": trainer.abstract.causal,
        "parameters": count_parameters(trainer.abstract, trainer.partition.trainable),
        "config": config.to_dict(),
    }  # fmt: skip


def circumstances() -> dict[str, Any]:
    """When, with which code, on what."""
    return {
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": loop.code_version(),
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
    }  # fmt: skip


def timing(began: float, load: float) -> dict[str, Any]:
    """How long a run took, and how busy the machine was. `began`: of `time.perf_counter`; `load`: before it."""
    return {
        "wall_seconds": round(time.perf_counter() - began, 1), "clock": record.clock(jax.devices()[0].device_kind),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def measure(plan: Plan, workdir: Path, test: dict[str, Any] | None) -> dict[str, Any]:
    """What is known afterwards; of a run that failed, the curves up to there."""
    config = plan.config
    history = read_metrics(workdir / "metrics.jsonl")
    trainer = Trainer(config, make_mesh(config.mesh), config.train.objective.make())
    lines = [line for line in history if line["kind"] == "train"]
    by = record.clock(jax.devices()[0].device_kind)
    cost = record.cost_of(trainer.abstract, config.data.seq_len, lines, by, trainer.objective.passes)
    found = {"curves": record.curves(history, cost), "results": dict.fromkeys(STATISTICS), "steps": int(cost.step[-1])}
    if test is None:
        return found
    return found | {
        "results": record.results(cost, history, test),
        "domains": record.rounded(test["bits_per_byte"]["domains"], 5),
        "specialization": record.specialization(test),
        "test_tokens": test["tokens"],
    }


@contextlib.contextmanager
def locked(path: Path) -> Iterable[bool]:
    """Whether this process got the lock of that name; given back at the end, and by a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def use_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs between processes, unless the user has chosen a place for that."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _outcome(run: dict[str, Any]) -> str:
    took = f"{run['timing']['wall_seconds']:.0f} s in all"
    if run["failure"]:
        return f"failed at step {run['steps']}, which is a result: {run['failure']} ({took})"
    value = run["results"]["test_bits_per_byte"]
    return (
        f"{value:.4f} test bits per byte, {run['results']['train_flops_per_token'] / 1e6:.2f} MFLOP per token ({took})"
    )
