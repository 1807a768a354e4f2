"""`bench.py train --gpu`: a whole training step of a 1B-class MoE on the GPU at hand, beside transformers.

    python scripts/bench.py train --gpu                 # writes docs/results/train_gpu.md and .json
    python scripts/bench.py train --gpu --tiny          # a tiny decoder on a CPU: to see that everything runs

Needs jax with CUDA, flax, optax and jaxtyping; the peers torch with CUDA and transformers >= 5, and are left out, with
the reason, where something is missing. Neither grain, ml-collections, orbax nor tokamax is imported.

Both sides train the decoder of one published configuration (gpu_train_case.py) on random tokens, in bfloat16, with
AdamW and gradients clipped to norm 1. Ours is the step of the training loop, losses of the routers, guard and
statistics included, with weights, gradients and moments in float32. transformers has `grouped_mm` experts, torch's
fused AdamW, its scaled-dot-product attention, no losses of routers, and weights, gradients and moments in bfloat16,
which is half the memory; once as it is, once through torch.compile.

Contenders sit down in turn, then once more the other way round, each in a process of its own that has the card to
itself: warm-up steps, then rounds of steps begun one after the other and waited for at the end of the round. Compared
are medians over all rounds. Results are written after every sitting. FLOPs are those of a model that recomputes
nothing, half of attention's square counted; the card's dense rate is the data sheet's, and beside it that of a matrix
product of 8192 x 8192 x 8192 in our process.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_process
import gpu_static
import gpu_train_case
import gpu_train_page
import numpy as np
from gpu_train_case import Size

_WARM_UP, _BATCHES = 3, 4
_RATE, _BETAS, _DECAY, _CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


# --- in a contender's process ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Session:
    """A contender ready to train. `step` begins one and returns its loss, `wait` for it; `peak` has bytes, if known."""

    step: Callable[[], Any]
    wait: Callable[[Any], Any]
    warm: Callable[[], None]
    peak: Callable[[], int | None]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def ours(size: Size, on_gpu: bool) -> Session:
    """Compiled before there is any state: what XLA tries out meanwhile does not count as the step's memory."""
    import jax

    device = jax.devices()[0]
    if on_gpu and device.platform != "gpu":
        raise RuntimeError(f"jax finds {device.platform}")
    trainer = gpu_train_case.our_trainer(size)
    batches = [gpu_train_case.our_batch(gpu_train_case.random_tokens(size, n)) for n in range(_BATCHES)]
    batches = [jax.device_put(batch, trainer.batch_sharding) for batch in batches]
    progress = np.float32(0)
    begin = time.perf_counter()
    compiled = trainer.train_step.lower(trainer.abstract_state(), batches[0], progress).compile()
    memory = compiled.memory_analysis()
    about = {
        "compile_s": time.perf_counter() - begin,
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "dense_flops_per_s": dense_rate(8192 if on_gpu else 512),
        **gpu_train_case.counted(trainer, size.seq),
    }
    state, number = trainer.init_state(), 0

    def step():
        nonlocal state, number
        state, stats = compiled(state, batches[number % _BATCHES], progress)
        number += 1
        return stats["scalars"]["loss"]

    peak = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")
    return Session(step, jax.block_until_ready, lambda: None, peak, about)


def dense_rate(n: int) -> float:
    """FLOPs per second of one n x n x n product of random bfloat16 matrices, median of 20."""
    import jax
    import jax.numpy as jnp

    rng, product, seconds = np.random.default_rng(0), jax.jit(jnp.matmul), []
    a, b = (jnp.asarray(rng.standard_normal((n, n), np.float32), jnp.bfloat16) for _ in range(2))
    product(a, b).block_until_ready()
    for _ in range(20):
        begin = time.perf_counter()
        product(a, b).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / statistics.median(seconds)


def transformers(size: Size, on_gpu: bool, compiled: bool = False) -> Session:
    """OlmoeForCausalLM, drawn on the device."""
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no CUDA device")
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    settings = {k: v for k, v in size.published().items() if k not in ("architectures", "model_type")}
    config = OlmoeConfig(**settings, use_cache=False, pad_token_id=None, eos_token_id=None)
    begin = time.perf_counter()
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=_BETAS, weight_decay=_DECAY, fused=True)
    forward = torch.compile(model) if compiled else model
    tokens = [gpu_train_case.random_tokens(size, n)[:, :-1].astype(np.int64) for n in range(_BATCHES)]
    tokens, number = [torch.from_numpy(ids).to(device) for ids in tokens], 0

    def step():
        nonlocal number
        ids = tokens[number % _BATCHES]
        number += 1
        optimizer.zero_grad(set_to_none=True)
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        return loss.detach()

    about = {"compile_s": time.perf_counter() - begin, "parameters": sum(p.numel() for p in model.parameters())}
    if not on_gpu:
        return Session(step, float, lambda: None, lambda: None, about)
    wait = lambda loss: torch.cuda.synchronize()
    return Session(step, wait, torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated, about)


CONTENDERS: dict[str, Callable[[Size, bool], Session]] = {
    "ours": ours,
    "transformers": transformers,
    "transformers_compiled": functools.partial(transformers, compiled=True),
}
OURS = "ours"


def sit(name: str, size: Size, rounds: int, steps: int, on_gpu: bool) -> dict[str, Any]:
    """The whole sitting of a contender: losses of the first and the last step, and per round seconds a step."""
    session = CONTENDERS[name](size, on_gpu)
    begin = time.perf_counter()
    first = session.step()
    session.wait(first)
    session.about["first_step_s"] = time.perf_counter() - begin
    for _ in range(_WARM_UP):
        last = session.step()
    session.wait(last)
    session.warm()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(steps):
            last = session.step()
        session.wait(last)
        seconds.append((time.perf_counter() - begin) / steps)
    losses = {"first_loss": float(first), "last_loss": float(last)}
    return {"seconds": seconds, "peak_bytes": session.peak(), **losses, **session.about}


# --- in the caller's -------------------------------------------------------------------------------------------------


def missing(name: str) -> str | None:
    """What the contender needs and is not installed."""
    needs = ("jax", "flax", "optax", "jaxtyping") if name == OURS else ("torch", "transformers")
    lacking = [package for package in needs if not importlib.util.find_spec(package)]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def sitting(name: str, size: str, args: argparse.Namespace) -> dict[str, Any]:
    """`sit` in a process of its own; or {"raised"}."""
    if why_not := missing(name):
        return {"raised": why_not}
    on_gpu = not args.tiny
    chosen = gpu_train_case.sized(size, args.batch, args.seq)
    numbers = map(str, (chosen.batch, chosen.seq, args.rounds, args.steps, int(on_gpu)))
    environment = gpu_process.environment("train_gpu")
    if not on_gpu:
        environment["JAX_PLATFORMS"] = "cpu"
    try:
        done = subprocess.run(
            [sys.executable, __file__, name, size, *numbers],
            capture_output=True, text=True, env=environment, timeout=args.timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"raised": f"not done after {args.timeout:g} s"}
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        return {"raised": gpu_static.last_error(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def run(args: argparse.Namespace) -> None:
    """All sittings; the table, printed, and on a GPU written."""
    names = args.peers.split(",") if args.peers else [n for n in CONTENDERS if not (args.tiny and "compiled" in n)]
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise SystemExit(f"bench.py train --gpu: no contender {unknown[0]!r}; known: {', '.join(CONTENDERS)}")
    otherwise = "--gpu --tiny runs on a CPU, --gpu-static says what can be told without a GPU"
    about = {
        "device": "CPU" if args.tiny else gpu_process.device_kind("bench.py train --gpu", otherwise),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {p: importlib.metadata.version(p) for p in _PACKAGES if importlib.util.find_spec(p)},
        "python": sys.version.split()[0],
    }
    measured = []
    for name in ["tiny"] if args.tiny else args.sizes:
        size = gpu_train_case.sized(name, args.batch, args.seq)
        row = {**about, "size": name, **dataclasses.asdict(size), "sittings": {n: [] for n in names}}
        measured.append(row)
        for turn in range(args.sittings):
            for contender in names[:: -1 if turn % 2 else 1]:
                print(f"{name}: {contender}, sitting {turn + 1} of {args.sittings}", file=sys.stderr, flush=True)
                row["sittings"][contender].append(sitting(contender, name, args))
                if not args.tiny:
                    gpu_train_page.keep({"measured": measured}, Path(args.out))
    print(*map(gpu_train_page.measured_section, measured), sep="\n\n")
    raise SystemExit(any("raised" in row["sittings"].get(OURS, [{}])[-1] for row in measured))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `--gpu` and `--gpu-static`."""
    known = [name for name in gpu_train_case.SIZES if name != "tiny"]
    group = parser.add_argument_group("with --gpu or --gpu-static")
    names = lambda flag, of, default: group.add_argument(
        flag, type=_some_of(list(of)), default=[default], metavar="A,B", help=f"of {', '.join(of)} (default {default})"
    )
    names("--sizes", known, "1b")
    names("--gpus", gpu_static.GPUS, "h100")
    group.add_argument("--batch", type=int, help="rows of a step (default: the size's)")
    group.add_argument("--seq", type=int, help="tokens of a row (default: the size's)")
    group.add_argument("--tiny", action="store_true", help="a tiny decoder, with --gpu on a CPU; nothing is written")
    group.add_argument("--sittings", type=int, default=2, help="processes of each contender, one after the other")
    group.add_argument("--timeout", type=float, default=1800, help="seconds for one process")
    group.add_argument("--out", default=str(gpu_train_page.PAGE), help="the page; rows go beside it as .json")


def _some_of(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no {name} here; known: {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    contender, size_name, *rest = sys.argv[1:]
    n_batch, n_seq, n_rounds, n_steps, gpu = map(int, rest)
    print(json.dumps(sit(contender, gpu_train_case.sized(size_name, n_batch, n_seq), n_rounds, n_steps, bool(gpu))))
