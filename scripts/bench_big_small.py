"""What a choice between a big and a small network saves: one routed layer of Duo-LLM beside the dense networks.

    python scripts/bench.py big_small
    python scripts/bench.py big_small --shares 0.1 0.3 --d_model 512

Inference, without a router: the tokens' networks are given, a share of them the big one, evenly mixed. "dropless" sorts
rows and has each network compute its own, "everywhere" has both compute all tokens.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import compare, print_table

from moe_zoo.core import param as P
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.dispatch import DISPATCHERS
from moe_zoo.experts.big_small import BigSmall, BigSmallConfig


def run_big_small(args: argparse.Namespace) -> None:
    """A table: the dense networks, then each dispatcher at each share."""
    T, D, rng = args.tokens, args.d_model, np.random.default_rng(0)
    config = BigSmallConfig(ratio=args.ratio)
    bank = P.materialize(BigSmall(config, num_experts=2, hidden_size=D, intermediate_size=4 * D, out_scale=1.0), 0)
    x_TD = jnp.asarray(rng.standard_normal((T, D)), jnp.float32)
    dense = jax.jit(lambda mlp, x: mlp(x))
    contenders = {"dense, big": functools.partial(dense, bank.big, x_TD)}
    contenders["dense, small"] = functools.partial(dense, bank.small, x_TD)
    for name in ("dropless", "everywhere"):
        # what everywhere computes does not depend on who chose what
        for share in args.shares if name == "dropless" else [0.5]:
            experts_T = rng.permutation((np.arange(T) >= share * T).astype(np.int32))
            what = f"dropless, {share:.0%} big" if name == "dropless" else name
            contenders[what] = functools.partial(_layer(name), bank, x_TD, jnp.asarray(experts_T))
    timings = compare(contenders, args.rounds, args.repeats)
    title = f"{T} tokens, D {D}, widths {4 * D} and {4 * D // args.ratio}, forward"
    print_table(title, timings, "dense, big")


@functools.cache
def _layer(name: str) -> Any:
    def run(bank, x_TD, experts_T):
        choice = TokenChoice(experts_T[:, None], jnp.ones((len(x_TD), 1)), 2)
        return DISPATCHERS.get(name)()(x_TD, choice, bank, RoutingContext(batch=1, seq=len(x_TD)))[0]

    return jax.jit(run)


def add_big_small(subparsers: Any) -> None:
    """One routed layer of two networks."""
    parser = subparsers.add_parser("big_small", help="Duo-LLM's layer: what tokens that take the small network save")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--ratio", type=int, default=16)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="calls per round")
    parser.set_defaults(run=run_big_small)
