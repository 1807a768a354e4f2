"""`bench.py routers`: what deciding costs, for every registered router, beside plain top-k in the same run.

    JAX_PLATFORMS=cpu python scripts/bench.py routers --out docs/results/routers_cpu.json

A router's `__call__` alone, and moved: with the dispatcher that takes its decisions and experts so narrow that moving
rows is most of their cost. Forward, and both: with backward (gradients of all parameters and of the tokens, from the
gates, or the outputs, and from the router's own loss terms). Default settings: two experts per token where a router has
a number. Exit code 1 if a router costs more than its class says it may (`Router.cost`).
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import Timing, compare

from moe_zoo.core import param as P
from moe_zoo.core.context import AttentionView, RoutingContext
from moe_zoo.core.decision import Dense, ExpertChoice, Soft, TokenChoice
from moe_zoo.core.sight import Sight
from moe_zoo.dispatch import DISPATCHERS
from moe_zoo.experts.feed_forward import FeedForward
from moe_zoo.routing import ROUTERS
from moe_zoo.routing.router import Dims

BASELINE = "top_k"
VOCABULARY = 264
WIDTH = 16  # of an expert
HEADS = 4  # of the attention below
#: who moves what; rows of decisions with a varying number of experts are budgeted, as in training
DISPATCH = {
    TokenChoice: ("dropless", {}),
    Dense: ("dropless", {"row_budget": 2.0}),
    ExpertChoice: ("slots", {}),
    Soft: ("slots", {}),
}
WHAT = ("alone, forward", "alone, both", "moved, forward", "moved, both")


@dataclasses.dataclass(frozen=True)
class Case:
    """A router of `E` experts on `batch` sequences of `seq` tokens."""

    name: str
    E: int
    batch: int
    seq: int
    D: int

    def attention(self, x_TD) -> AttentionView:
        """The tokens as queries, keys, values and output: what a router costs counts, not what attention does."""
        x_BSD = x_TD.reshape(self.batch, self.seq, self.D)
        x_BNSH = x_BSD.reshape(self.batch, self.seq, HEADS, -1).swapaxes(1, 2)
        places = jnp.broadcast_to(jnp.arange(self.seq), (self.batch, self.seq))
        o_NHD = jnp.eye(self.D).reshape(HEADS, -1, self.D)
        return AttentionView(x_BNSH / x_BNSH.shape[-1] ** 0.5, x_BNSH, x_BNSH, o_NHD, x_BSD, Sight(places, places))

    def functions(self) -> dict[str, Callable[[], Any]]:
        """{one of WHAT: a call of the compiled function}."""
        cls = ROUTERS.get(self.name)
        config = cls.Config()
        dims = Dims(self.E, self.D, VOCABULARY, HEADS, self.D // HEADS)
        bank = FeedForward(
            FeedForward.Config(), num_experts=self.E, hidden_size=self.D, intermediate_size=WIDTH, out_scale=1.0
        )
        shared = cls.make_shared(config, dims)
        parts = {"router": cls(config, dims), "bank": bank} | ({} if shared is None else {"shared": shared})
        graphdef, state = nnx.split(P.materialize(nnx.Dict(**parts), 0))
        dispatcher, settings = DISPATCH[cls.decision]
        dispatcher = DISPATCHERS.get(dispatcher)
        dispatcher = dispatcher(dispatcher.Config(**settings))
        rng, T = np.random.default_rng(0), self.batch * self.seq
        x_TD = jnp.asarray(rng.standard_normal((T, self.D)), jnp.float32)
        ids_T = jnp.asarray(rng.integers(0, 256, T), jnp.int32)

        def context(layer, x_TD) -> RoutingContext:
            ctx = RoutingContext(
                attention=self.attention(x_TD) if "attention" in cls.requires else None,
                batch=self.batch, seq=self.seq, train=True, step=jnp.int32(0), key=jax.random.key(0), token_ids=ids_T,
                domain=ids_T % 4, valid=jnp.ones(T, bool), carry=layer["router"].init_carry(T),
            )  # fmt: skip
            return ctx if shared is None else ctx.replace(shared=layer["shared"].before_layers(ctx, None)[0])

        def alone(state, x_TD):
            layer = nnx.merge(graphdef, state)
            ctx = context(layer, x_TD)
            routing = layer["router"](x_TD, ctx)
            extra = sum(map(jnp.sum, jax.tree.leaves((routing.aux.losses, routing.aux.terms))), jnp.float32(0))
            return routing.decision.masked(ctx.valid), extra

        def moved(state, x_TD):
            layer = nnx.merge(graphdef, state)
            decision, extra = alone(state, x_TD)
            return dispatcher(x_TD, decision, layer["bank"], context(layer, x_TD))[0], extra

        def both(f):
            """With gradients, from random ones of all floats that `f` returns."""
            weights = [
                jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
                for leaf in jax.tree.leaves(jax.eval_shape(f, state, x_TD))
                if jnp.issubdtype(leaf.dtype, jnp.floating)
            ]

            def loss(floats, rest, x_TD):
                out = jax.tree.leaves(f(nnx.merge_state(floats, rest), x_TD))
                found = [leaf for leaf in out if jnp.issubdtype(leaf.dtype, jnp.floating)]
                return sum(map(jnp.vdot, found, weights)), out

            floats, rest = nnx.split_state(state, lambda _, var: jnp.issubdtype(var.dtype, jnp.floating), ...)
            run = jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))
            return functools.partial(run, floats, rest, x_TD)

        forward = lambda f: functools.partial(jax.jit(f), state, x_TD)
        return dict(zip(WHAT, (forward(alone), both(alone), forward(moved), both(moved)), strict=True))


def measure(names: list[str], E: int, args: argparse.Namespace) -> dict[str, dict[str, Timing]]:
    """{one of WHAT: {router: seconds}}, each against the others in interleaved rounds."""
    functions = {name: Case(name, E, args.batch, args.seq, args.d_model).functions() for name in names}
    return {what: compare({n: f[what] for n, f in functions.items()}, args.rounds, args.repeats) for what in WHAT}


def broken(results: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """One line for each figure above its router's bound."""
    lines = []
    for name, by_experts in results.items():
        bound = ROUTERS.get(name).cost
        for E, ratios in by_experts.items():
            for what, ratio in ratios.items():
                most = bound.alone if what.startswith("alone") else bound.moved
                if ratio > most:
                    lines.append(f"{name}, E = {E}, {what}: {ratio:.2f} x top-k, at most {most} is allowed")
    return lines


def _bench(args: argparse.Namespace) -> None:
    names = [BASELINE, *(name for name in ROUTERS.names() if name != BASELINE)]
    if args.routers:
        names = [BASELINE, *(name for name in args.routers.split(",") if name != BASELINE)]
    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    base = {}
    for E in args.num_experts:
        timings = measure(names, E, args)
        base[str(E)] = {what: 1e3 * timings[what][BASELINE].cpu_s for what in WHAT}
        for name in names:
            ratio = {what: timings[what][name].cpu_s / timings[what][BASELINE].cpu_s for what in WHAT}
            results[name][str(E)] = {what: round(value, 3) for what, value in ratio.items()}
        _print(E, results, base[str(E)])
    wrong = broken(results)
    if args.out:
        out = {
            "what": "CPU seconds over those of top_k in the same run: lower quartiles of interleaved rounds",
            "tokens": args.batch * args.seq, "sequences": args.batch, "d_model": args.d_model, "expert_width": WIDTH,
            "rounds": args.rounds, "repeats": args.repeats, "jax": jax.__version__,
            "top_k_cpu_ms": {E: {k: round(v, 3) for k, v in row.items()} for E, row in base.items()},
            "ratios": results,
            "bounds": {name: dataclasses.asdict(ROUTERS.get(name).cost) for name in names},
        }  # fmt: skip
        Path(args.out).write_text(json.dumps(out, indent=1) + "\n")
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(1)


def _print(E: int, results: dict, base: dict[str, float]) -> None:
    print(f"E = {E}: CPU time over top-k's, which takes {', '.join(f'{base[w]:.2f} ms {w}' for w in WHAT)}")
    print(f"  {'':16}" + "".join(f"{what:>16}" for what in WHAT) + "   bounds")
    for name, row in results.items():
        bound = ROUTERS.get(name).cost
        print(
            f"  {name:16}" + "".join(f"{row[str(E)][what]:16.2f}" for what in WHAT)
            + f"   {bound.alone:g}, {bound.moved:g}" + (f": {bound.why}" if bound.why else "")
        )  # fmt: skip


def add_routers(subparsers: Any) -> None:
    """Every registered router beside top-k."""
    parser = subparsers.add_parser("routers", help="what deciding costs: every router beside top-k")
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--num_experts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--routers", default="", help="comma-separated; all if not given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="calls per round")
    parser.add_argument("--out", default="", help="a JSON file for the results")
    parser.set_defaults(run=_bench)
