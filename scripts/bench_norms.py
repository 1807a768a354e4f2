"""`bench.py norms`: what the two norms of a block cost, for every kind that a decoder can choose, beside RMSNorm.

    JAX_PLATFORMS=cpu python scripts/bench.py norms

One sees what enters the block, the other what the mixer made of it: two arrays, and for BHyT one statistic, from which
the second is predicted. Forward, and forward and backward (gradients of both arrays and of all parameters). Then a
model of `--layers` with each of them: its loss and all gradients.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import compare, print_table

from moe_zoo.core import param as P
from moe_zoo.layers.norm import make_norm
from moe_zoo.layers.tanh_norm import PredictingBHyT, TanhNormConfig, growth
from moe_zoo.models import Decoder
from moe_zoo.train.config import load_config

BASELINE = "rms"
KINDS = (BASELINE, "layer", "dyt_no_bias", "dyt", "bhyt_star", "bhyt")


def functions(kind: str, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """{"forward", "forward + backward": a call of the compiled function}."""
    B, S, D = args.batch, args.seq, args.d_model
    made = lambda place, predicted: make_norm(kind, D, 1e-6, place, TanhNormConfig(seq_len=S), predicted)
    norms = P.materialize(nnx.Dict(mixer=made("mixer", None), ffn=made("ffn", 0.5)), 0)
    floats, buffers = nnx.split_state(nnx.state(norms), nnx.Param, ...)
    graphdef = nnx.graphdef(norms)
    rng = np.random.default_rng(0)
    x, h, dx, dh = (jnp.asarray(rng.standard_normal((B, S, D)), args.dtype) for _ in range(4))
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))

    def both(floats, x, h):
        norms = nnx.merge(graphdef, floats, buffers)
        one, two = norms["mixer"], norms["ffn"]
        if not isinstance(two, PredictingBHyT):
            return one(x), two(h)
        square, predicted = two.squares(x, positions, one)
        return one(x, square), two(h, predicted)

    def gradients(floats, x, h):
        out, pullback = jax.vjp(both, floats, x, h)
        return out, pullback((dx, dh))

    call = lambda f: functools.partial(jax.jit(f), floats, x, h)
    return {"forward": call(both), "forward + backward": call(gradients)}


def whole(kind: str, args: argparse.Namespace) -> Callable[[], Any]:
    """A call that computes the loss of a model of such norms, and all gradients."""
    settings = [("model.norm", kind), ("model.layers", args.layers), ("model.hidden_size", str(args.d_model))]
    config = load_config("quickstart:cpu", settings).model
    graphdef, state = nnx.split(P.materialize(Decoder(config), 0))
    floats, rest = nnx.split_state(state, nnx.Param, ...)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (args.batch, args.seq)), jnp.int32)

    def loss(floats, tokens):
        logits, aux, _ = nnx.merge(graphdef, floats, rest)(tokens, train=True)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
        return aux.total_loss() - chosen.mean()

    return functools.partial(jax.jit(jax.value_and_grad(loss)), floats, tokens)


def _bench(args: argparse.Namespace) -> None:
    D, H = args.d_model, args.d_model // 4
    contenders = {kind: functions(kind, args) for kind in KINDS}
    for what in ("forward", "forward + backward"):
        timings = compare({kind: calls[what] for kind, calls in contenders.items()}, args.rounds, args.repeats)
        title = f"{what}, two norms of [{args.batch}, {args.seq}, {D}], {args.dtype}"
        print_table(title, timings, BASELINE)
    if args.layers:
        timings = compare({kind: whole(kind, args) for kind in KINDS}, args.rounds, 1)
        print_table(f"loss and gradients of {args.layers}, hidden size {D}", timings, BASELINE)
    rng = np.random.default_rng(0)
    v, o = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((D, 4, H), (4, H, D)))
    once = compare({"growth": functools.partial(jax.jit(growth), v, o)}, args.rounds, args.repeats)
    print_table("what bhyt looks at again every `refresh_every` steps, per layer", once, "growth")


def add_norms(subparsers: Any) -> None:
    """The norms of a block, of every kind."""
    parser = subparsers.add_parser("norms", help="what a block's norms cost: LayerNorm, DyT, BHyT beside RMSNorm")
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--d_model", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", default="2*dense", help="of the model; empty: no model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="calls per round")
    parser.set_defaults(run=_bench)
