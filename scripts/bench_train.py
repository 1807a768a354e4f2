"""Training on a CPU beside transformers: seconds per step, memory, compile time, start-up.

    python scripts/bench.py train                 # the benchmark decoder: ours, ours dense, transformers (needs torch)
    python scripts/bench.py train --peers ours,ours_e64,dense
    python scripts/bench.py startup
    python scripts/bench.py train --gpu           # a 1B-class decoder on a GPU (gpu_train.py, gpu_train_static.py)

Every contender is a process of its own, asked in turn for a few steps at a time, round after round: what the machine
does meanwhile hits all of them. A turn begins with a step that does not count: what a process held while it waited may
have left memory. transformers falls into a slow mode at random, so a round in which the steps of the peer (the last one
named) spread by more than 1.5 is thrown away, for all, and counted. Compared are lower quartiles over all steps left.
"""

import argparse
import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_train
import gpu_train_static
import numpy as np

from moe_zoo.cli import allocator

ROOT = Path(__file__).resolve().parents[1]
#: the decoder of the comparison
B, S, LAYERS, D, F, E, K, V = 8, 256, 4, 256, 512, 8, 2, 264
SPREAD = 1.5


def our_trainer(layers: str = f"{LAYERS}*moe", num_experts: int = E, dense_width: int = F * K):
    """Our decoder of these sizes, with AdamW."""
    import jax

    from moe_zoo.sharding import make_mesh
    from moe_zoo.train.config import load_config
    from moe_zoo.train.step import Trainer

    settings = {
        "model.vocab_size": V, "model.hidden_size": D, "model.layers": layers, "model.num_experts": num_experts,
        "model.moe_intermediate_size": F, "model.intermediate_size": dense_width, "model.ngram.orders": "[]",
        "model.attention.num_attention_heads": 4, "optim.name": "adamw", "optim.lr_scales": "[]",
        "model.router.num_experts_per_tok": K, "data.batch_size": B, "data.seq_len": S,
    }  # fmt: skip
    config = load_config("quickstart", [(key, str(value)) for key, value in settings.items()])
    return Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())


def our_step(**sizes) -> Callable[[], None]:
    """A function that takes one training step of ours and waits for it."""
    import jax

    trainer = our_trainer(**sizes)
    state, batch = trainer.init_state(), jax.device_put(a_batch(), trainer.batch_sharding)

    def step():
        nonlocal state
        state, stats = trainer.train_step(state, batch, np.float32(0))
        jax.block_until_ready(stats)

    return step


def a_batch(rows: int = B, seq: int = S) -> dict[str, np.ndarray]:
    """Random bytes in the shape that the loop makes."""
    tokens = np.random.default_rng(0).integers(0, 256, (rows, seq + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((rows, seq), np.int32),
        "positions": np.tile(np.arange(seq, dtype=np.int32), (rows, 1)), "domain": np.zeros((rows, seq), np.int32),
        "loss_mask": np.ones((rows, seq), bool),
    }  # fmt: skip


def transformers_step() -> Callable[[], None]:
    """The same decoder as a Mixtral of transformers with `grouped_mm` experts."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=E, num_experts_per_tok=K, max_position_embeddings=S,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.from_numpy(a_batch()["tokens"].astype(np.int64))

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


CONTENDERS: dict[str, Callable[[], Callable[[], None]]] = {
    "ours": our_step,
    "ours_e64": lambda: our_step(num_experts=64),
    "dense": lambda: our_step(layers=f"{LAYERS}*dense"),
    "transformers": transformers_step,
}


def worker(make: Callable[[], Callable[[], Any]]) -> None:
    """Answers each number n on stdin with the CPU and wall seconds of n steps after one more, one JSON line."""
    allocator.give_back()
    step = make()
    for _ in range(2):
        step()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        samples = []
        step()
        for _ in range(int(line)):
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            samples.append((time.process_time() - cpu, time.perf_counter() - wall))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"samples": samples, "peak_gb": peak}), flush=True)


class Contender:
    """A worker process: `script --worker name arguments`."""

    def __init__(self, name: str, script: str = __file__, *arguments: Any):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        if name != "transformers":  # as scripts/train.py does for itself; transformers gains nothing by it
            environment = allocator.environment(environment) or environment
        command = [sys.executable, script, "--worker", name, *map(str, arguments)]
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def steps(self, n: int) -> dict[str, Any]:
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"contender {self.name} ended with code {self.process.wait()}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@dataclasses.dataclass(frozen=True)
class Run:
    """Lower quartiles of (CPU, wall) seconds and peaks in GB, by contender. `of`: how they came about, in words."""

    of: str
    quartiles: dict[str, np.ndarray]
    peaks: dict[str, float]

    def print(self, baseline: str, unit_ms: bool = False) -> None:
        """One line per contender, with its ratios to `baseline`."""
        base, width = self.quartiles[baseline], max(14, *map(len, self.quartiles))
        unit, factor, digits = ("ms", 1e3, 1) if unit_ms else ("s", 1, 3)
        print(f"  {'':{width}}{f'CPU {unit}':>9}{'ratio':>7}{f'wall {unit}':>9}{'ratio':>7}{'peak GB':>9}")
        for name, (cpu, wall) in self.quartiles.items():
            print(
                f"  {name:{width}}{cpu * factor:9.{digits}f}{cpu / base[0]:7.2f}"
                f"{wall * factor:9.{digits}f}{wall / base[1]:7.2f}{self.peaks[name]:9.2f}"
            )


def interleaved(contenders: list[Contender], rounds: int, steps: int, spread: float | None) -> Run:
    """Asks in turn, then closes them. `spread`: a round in which the last one's steps spread by more does not count."""
    kept: dict[str, list] = {c.name: [] for c in contenders}
    peaks, thrown, done = {}, 0, 0
    while done < rounds and thrown <= 3 * rounds:
        answers = {c.name: c.steps(steps) for c in contenders}
        peaks = {name: max(peaks.get(name, 0), answer["peak_gb"]) for name, answer in answers.items()}
        peer = [wall for _, wall in answers[contenders[-1].name]["samples"]]
        if spread is not None and max(peer) / min(peer) > spread:
            thrown += 1
            continue
        done += 1
        for name, answer in answers.items():
            kept[name] += answer["samples"]
    for c in contenders:
        c.close()
    if not done:
        raise SystemExit(f"all {thrown} rounds spread by more than {spread}: the machine is too busy to measure on")
    quartiles = {name: np.quantile(np.array(samples), 0.25, axis=0) for name, samples in kept.items()}
    return Run(f"{done} rounds of {steps}" + (f", {thrown} thrown away" if spread else ""), quartiles, peaks)


def run_train(args: argparse.Namespace) -> None:
    """Interleaved rounds, then lower quartiles and their ratios to the last peer named; or a GPU's step."""
    if args.mode is not None:
        return args.mode(args)
    contenders = [Contender(name) for name in (args.peers or ",".join(CONTENDERS)).split(",")]
    run = interleaved(contenders, args.rounds, args.steps, SPREAD)
    print(f"steps, {run.of}; ratios to {contenders[-1].name!r}")
    run.print(contenders[-1].name)


def run_startup(args: argparse.Namespace) -> None:
    """Import, first step, compile time by depth, and the loop's own share of a step."""
    fresh = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    fresh = allocator.environment(fresh) or fresh

    def seconds(code: str) -> float:
        return min(_timed([sys.executable, "-c", code], fresh) for _ in range(args.repeats))

    everything = "import moe_zoo; moe_zoo.load; moe_zoo.routers()"
    print(
        f"import moe_zoo: {seconds('import moe_zoo'):.2f} s, with what it uses {seconds(everything):.2f} s "
        f"(bare interpreter {seconds('pass'):.2f} s)"
    )
    first = "import sys; sys.path.insert(0, 'scripts'); import bench_train; bench_train.our_step()()"
    print(f"process start to the end of the first step: {seconds(first):.1f} s")
    each = [{n: compile_seconds(f"{n}*moe") for n in (4, 24)} for _ in range(args.repeats)]
    times = {n: min(seconds[n] for seconds in each) for n in (4, 24)}
    print(f"compile, 4 layers {times[4]:.1f} s, 24 layers {times[24]:.1f} s: {times[24] / times[4]:.2f} x")
    print(f"the loop's own part of a step: {100 * loop_share(args.steps):.1f}%")


def _timed(command: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def compile_seconds(layers: str) -> float:
    """`lower().compile()` of the train step, without tracing."""
    import jax
    import jax.numpy as jnp

    trainer = our_trainer(layers)
    batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in a_batch().items()}
    lowered = trainer.train_step.lower(trainer.abstract_state(), batch, jax.ShapeDtypeStruct((), jnp.float32))
    began = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - began


def loop_share(steps: int) -> float:
    """What lies between steps (data, metrics, logging) as a share of the time. The loop waits for each step here, so
    that nothing is hidden beside one: an upper bound. The first step compiles and is not counted.
    """
    import tempfile

    import jax

    from moe_zoo.train import loop
    from moe_zoo.train.config import load_config

    spans = []

    class Timed(loop.Trainer):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            compiled = self.train_step

            def train_step(*operands):
                began = time.perf_counter()
                result = jax.block_until_ready(compiled(*operands))
                spans.append((began, time.perf_counter()))
                return result

            self.train_step = train_step

    settings = {
        "model.vocab_size": V, "model.hidden_size": D, "model.layers": f"{LAYERS}*moe", "model.num_experts": E,
        "model.moe_intermediate_size": F, "model.ngram.orders": "[]", "optim.name": "adamw", "optim.lr_scales": "[]",
        "data.batch_size": B, "data.seq_len": S, "train.minutes": "none", "train.steps": steps,
        "log.eval_every": 10**9, "log.every": 10, "checkpoint.every": 10**9,
    }  # fmt: skip
    config = load_config("quickstart", [(key, str(value)) for key, value in settings.items()])
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(loop, "Trainer", Timed):
        loop.train(config, folder)
    between = sum(begin - end for (_, end), (begin, _) in itertools.pairwise(spans))
    return between / (spans[-1][1] - spans[0][1])


def add_train(subparsers: Any) -> None:
    """A training step beside transformers and our own dense decoder."""
    parser = subparsers.add_parser("train", help="a training step beside transformers, on a CPU or a GPU")
    modes = parser.add_mutually_exclusive_group()
    for flag, mode, text in (
        ("--gpu", gpu_train.run, "of a 1B-class decoder, on the GPU at hand"),
        ("--gpu-static", gpu_train_static.run, "the same compiled for a GPU that is not there; needs the CUDA plugin"),
    ):
        modes.add_argument(flag, dest="mode", action="store_const", const=mode, help=text)
    known = f"{','.join(CONTENDERS)}, ratios being to the last one; with --gpu {','.join(gpu_train.CONTENDERS)}"
    parser.add_argument("--peers", help=f"default: {known}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=14, help="per round")
    gpu_train.add_arguments(parser)
    parser.set_defaults(run=run_train)


def add_startup(subparsers: Any) -> None:
    """Import, first step, compile time, the loop's overhead."""
    parser = subparsers.add_parser("startup", help="import, first step, compile time by depth, the loop's overhead")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.set_defaults(run=run_startup)


if __name__ == "__main__":
    worker(CONTENDERS[sys.argv[2]])
