"""Mixture of depths beside the dense decoder whose weights it has: the time of reading a prompt and of each new token.

    python scripts/bench.py depth
    python scripts/bench.py depth --capacity=0.25 --batches=1,2,8

Every second block takes some of the tokens. Weights are random; the predictors, which decide who goes through while
generating, are shifted until they choose `capacity` of random text, and how many went through is said beside the times.
A new token's time is that of a whole generation less that of its prompt and first token, over the tokens.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import Timing, compare

from moe_zoo.core import param as P
from moe_zoo.core.schema import build
from moe_zoo.inference import generate
from moe_zoo.inference.generate import bucket
from moe_zoo.models import Decoder, ModelConfig


def decoder(args: argparse.Namespace, layers: str) -> Decoder:
    """An abstract decoder of the sizes asked for."""
    D = args.hidden_size
    depth = {"name": "mod", "capacity": args.capacity}
    settings = {
        "hidden_size": D, "intermediate_size": 4 * D, "layers": layers, "attention": {"num_attention_heads": D // 64},
        "variants": {"some": {"depth": depth}},
    }  # fmt: skip
    return Decoder(build(ModelConfig, settings, "model"))


def shifted(model: Decoder, ids_BS: np.ndarray, capacity: float, rounds: int = 12) -> Decoder:
    """The model with its predictors' last layers moved by a constant each, by bisection: they then choose `capacity` of
    these tokens. What a SiLU returns is positive on average, so a constant moves all logits alike.
    """
    (path,) = [name for name in P.arrays(model) if name.endswith("selector.predict_out")]
    values = P.arrays(model)
    moved = lambda by_R: P.replace(model, values | {path: values[path] + by_R[:, None]})
    stats = lambda by_R: moved(by_R)(ids_BS)[1].stats[path.partition(".selector.")[0]]["depth_share"].value()
    stats = jax.jit(stats)
    low, high = (jnp.full(values[path].shape[0], end) for end in (-2.0, 2.0))
    for _ in range(rounds):
        middle = (low + high) / 2
        many = stats(middle) > capacity
        low, high = jnp.where(many, low, middle), jnp.where(many, middle, high)
    return moved((low + high) / 2)


def run_depth(args: argparse.Namespace) -> None:
    """A table per batch."""
    n, rng = args.layers // 2, np.random.default_rng(0)
    ids = rng.integers(0, 256, (8, args.prompt)).astype(np.int32)
    some = shifted(P.materialize(decoder(args, f"{n}*(dense dense:some)"), 0), ids[:2], args.capacity)
    models = {"dense": P.materialize(decoder(args, f"{n}*(dense dense)"), 0), "mod": some}
    context = args.prompt / 2
    flops = {name: model.flops_per_token(context) for name, model in models.items()}
    print(
        f"D {args.hidden_size}, {args.layers} layers, capacity {args.capacity} of every second; prompts of "
        f"{args.prompt}, {args.new} new tokens, {args.rounds} rounds; FLOPs: {flops['dense'] / flops['mod']:.2f} times "
        "fewer"
    )
    for batch in map(int, args.batches.split(",")):
        _measure(models, ids, batch, args)


def _measure(models: dict[str, Decoder], ids_BS: np.ndarray, batch: int, args: argparse.Namespace) -> None:
    prompts = [ids_BS[row % len(ids_BS)] for row in range(batch)]
    write = lambda model, new: generate(model, prompts, new, seed=0)
    calls = {
        f"{name} {new}": functools.partial(write, model, new) for name, model in models.items() for new in (1, args.new)
    }
    timings = compare(calls, args.rounds, 1)
    text = np.stack([np.concatenate([p, new]) for p, new in zip(prompts, write(models["mod"], args.new), strict=True)])
    print(f"batch {batch}; went through: {_went(models['mod'], text, args.prompt)}")
    print(f"  {'':16}{'dense':>10}{'mod':>10}{'faster':>8}{'CPU':>8}   (ms by the clock; ratios by it and of CPU time)")
    first = {name: timings[f"{name} 1"] for name in models}
    each = {name: _less(timings[f"{name} {args.new}"], first[name], args.new - 1) for name in models}
    for what, of in (("prompt", first), ("each new token", each)):
        dense, mod = of["dense"], of["mod"]
        print(
            f"  {what:16}{dense.wall_s * 1e3:10.2f}{mod.wall_s * 1e3:10.2f}{dense.wall_s / mod.wall_s:8.2f}"
            f"{dense.cpu_s / mod.cpu_s:8.2f}",
            flush=True,
        )


def _less(whole: Timing, first: Timing, tokens: int) -> Timing:
    return Timing((whole.cpu_s - first.cpu_s) / tokens, (whole.wall_s - first.wall_s) / tokens)


def _went(model: Decoder, text_BS: np.ndarray, prompt: int) -> str:
    """The share of prompts' and of new tokens that blocks took, counted in the cache that reading them leaves."""

    @jax.jit
    def taken(ids):
        cache = model.init_cache(ids.shape[0], bucket(text_BS.shape[1]))
        _, _, cache = model(ids, cache=cache, last=True)
        return jnp.mean(cache["segments"][0][1]["taken"].sum(-1))

    before, after = float(taken(text_BS[:, :prompt])), float(taken(text_BS))
    return f"{before / prompt:.3f} of the prompt, {(after - before) / (text_BS.shape[1] - prompt):.3f} of what is new"


def add_depth(subparsers: Any) -> None:
    """Prompt and new tokens of a decoder whose every second block takes some tokens, beside the dense one."""
    parser = subparsers.add_parser("depth", help="mixture of depths beside its dense parent: prompt and new tokens")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--capacity", type=float, default=0.125)
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(run=run_depth)
