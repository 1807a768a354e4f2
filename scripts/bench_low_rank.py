"""`bench.py low_rank`: mixtures of LoRA beside what they are compared with, on a CPU.

    python scripts/bench.py low_rank                       # needs torch and peft (extra `parity`) for PEFT's loops
    python scripts/bench.py low_rank --parts crossover,step

op          the product alone beside E LoRAs in a row (each two narrow products, gated and added) and PEFT's loops: that
            of its Linear over active adapters, without gates, and that of X-LoRA, with them. Every contender is a
            process of its own; all add to an output that is there.
crossover   all ranks for every token, and sorted choices, by E and R
step        a training step of a frozen base (all but its embedding, so that the gradient goes all the way down), the
            same with mixtures beside q, k, v and o, and of the base itself
"""

import argparse
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import bench_train
import numpy as np
from measuring import compare

# --- the product -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """`passes`: "forward", or "both" for gradients of tokens, factors and gates, too."""

    T: int
    D: int
    N: int
    E: int
    R: int
    passes: str

    def arrays(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        draw = lambda *shape: rng.standard_normal(shape, np.float32)
        gates = rng.dirichlet(np.ones(self.E), self.T).astype(np.float32)
        a, b = draw(self.E, self.R, self.D) / self.D**0.5, draw(self.E, self.R, self.N)
        return {"x": draw(self.T, self.D), "a": a, "b": b, "gates": gates, "onto": draw(self.T, self.N)}

    def check(self, out: np.ndarray, gated: bool = True) -> None:
        """Raises if a contender computes something else."""
        v = self.arrays()
        hidden = np.einsum("td,erd->ter", v["x"], v["a"], optimize=True) * (v["gates"][:, :, None] if gated else 1)
        expected = v["onto"] + hidden.reshape(self.T, -1) @ v["b"].reshape(-1, self.N)
        np.testing.assert_allclose(out, expected, atol=1e-3)


def _jax_call(problem: Problem, function: Callable) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    v = {name: jnp.asarray(array) for name, array in problem.arrays().items()}
    problem.check(np.asarray(jax.jit(function)(*v.values())))
    if problem.passes == "forward":
        run, args = jax.jit(function), tuple(v.values())
    else:
        *floats, onto = v.values()

        @jax.jit
        def run(dout, onto, *floats):
            out, pullback = jax.vjp(lambda *floats: function(*floats, onto), *floats)
            return out, pullback(dout)

        args = (jnp.ones_like(onto), onto, *floats)
    return lambda: jax.block_until_ready(run(*args))


def _ours(problem: Problem) -> Callable[[], Any]:
    from pallas_kernels import low_rank_matmul

    return _jax_call(problem, lambda x, a, b, gates, onto: low_rank_matmul(x, a, b, gates, onto_TN=onto))


def _in_a_row(problem: Problem) -> Callable[[], Any]:
    def function(x, a, b, gates, y):
        for e in range(problem.E):
            y = y + gates[:, e, None] * ((x @ a[e].T) @ b[e])
        return y

    return _jax_call(problem, function)


def _peft_layer(problem: Problem):
    """A linear layer of PEFT with E active LoRAs, whose base gives an output that is there; and its input."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    class Given(torch.nn.Linear):
        def forward(self, x):
            return self.out.clone()

    v = {name: torch.from_numpy(array) for name, array in problem.arrays().items()}
    base, config = Given(problem.D, problem.N, bias=False), LoraConfig(r=problem.R, lora_alpha=problem.R)
    names = [f"e{e}" for e in range(problem.E)]
    layer = Linear(base, names[0], config, r=problem.R, lora_alpha=problem.R)
    for name in names[1:]:
        layer.update_layer(name, problem.R, lora_alpha=problem.R, config=config)
    for e, name in enumerate(names):
        layer.lora_A[name].weight.data.copy_(v["a"][e])
        layer.lora_B[name].weight.data.copy_(v["b"][e].T)
    layer.set_adapter(names)
    base.out = v["onto"][None]
    x, gates = v["x"][None].requires_grad_(), v["gates"][None, :, None].requires_grad_()
    return layer, x, gates


def _torch_call(problem: Problem, forward: Callable, leaves: list, gated: bool) -> Callable[[], Any]:
    import torch

    with torch.no_grad():
        problem.check(forward()[0].numpy(), gated)
    if problem.passes == "forward":
        return torch.no_grad()(forward)

    def both():
        for leaf in leaves:
            leaf.grad = None
        out = forward()
        out.backward(torch.ones_like(out))

    return both


def _peft(problem: Problem) -> Callable[[], Any]:
    layer, x, _ = _peft_layer(problem)
    return _torch_call(problem, lambda: layer(x), [x, *layer.parameters()], gated=False)


def _peft_xlora(problem: Problem) -> Callable[[], Any]:
    from types import SimpleNamespace

    from peft import XLoraConfig
    from peft.tuners.xlora.layer import XLoraLinearLayer

    layer, x, gates = _peft_layer(problem)
    config = XLoraConfig(hidden_size=problem.D, adapters={name: name for name in layer.active_adapters})
    gated = XLoraLinearLayer(SimpleNamespace(disabled=False), layer, layer.forward, 0, config)
    return _torch_call(problem, lambda: gated.forward(x, scalings=gates), [x, gates, *layer.parameters()], gated=True)


PRODUCTS = {"low_rank_matmul": _ours, "in a row": _in_a_row, "peft": _peft, "peft x-lora": _peft_xlora}


def run_op(args: argparse.Namespace) -> None:
    """PRODUCTS on every shape, forward and both ways."""
    names = list(PRODUCTS)
    if importlib.util.find_spec("peft") is None:
        print("PEFT is not installed: left out")
        names = names[:2]
    for T, D, E, R in args.shapes:
        for passes in ("forward", "both"):
            problem = Problem(T, D, D, E, R, passes)
            workers = [bench_train.Contender(name, __file__, *dataclasses.astuple(problem)) for name in names]
            run = bench_train.interleaved(workers, args.rounds, args.calls, spread=None)
            gflop = (1 if passes == "forward" else 3) * 4 * T * D * E * R / 1e9
            print(f"T {T}, D = N = {D}, E {E}, R {R}, {passes}, {gflop:.1f} GFLOP: {run.of}, ratios to low_rank_matmul")
            run.print(names[0], unit_ms=True)


# --- where sorting pays ----------------------------------------------------------------------------------------------


def run_crossover(args: argparse.Namespace) -> None:
    """Dense and grouped, K choices of a token, forward + backward."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import low_rank_matmul

    T, D = args.tokens, args.d_model
    print(f"T {T}, D = N = {D}, forward + backward, CPU ms (lower quartiles): dense, grouped")
    for K in args.k:
        for R in args.ranks:
            found = []
            for E in args.num_experts:
                v = {n: jnp.asarray(a) for n, a in Problem(T, D, D, E, R, "both").arrays().items()}
                ids = np.random.default_rng(0).random((T, E)).argsort(axis=1)[:, :K].astype(np.int32)

                def both(form, x, a, b, gates, dout, ids=ids):
                    run = lambda *floats: low_rank_matmul(*floats, ids, form=form)
                    out, pullback = jax.vjp(run, x, a, b, gates)
                    return out, pullback(dout)

                operands = v["x"], v["a"], v["b"], v["gates"][:, :K], v["onto"]
                calls = {f: functools.partial(jax.jit(functools.partial(both, f)), *operands) for f in FORMS}
                timings = compare(calls, args.rounds, 2)
                found.append([E, *(timings[f].cpu_s * 1e3 for f in FORMS), *(timings[f].wall_s * 1e3 for f in FORMS)])
            cells = "".join(f"   E {E}: {d:.0f}, {g:.0f} (wall {dw:.0f}, {gw:.0f})" for E, d, g, dw, gw in found)
            print(f"  K {K}, R {R}:{cells}")


FORMS = ("dense", "grouped")


# --- a training step -------------------------------------------------------------------------------------------------

#: a decoder of 1,024 dims; the small vocabulary leaves the step to its layers
BASE = {
    "model.vocab_size": 264, "model.hidden_size": 1024, "model.layers": "4*dense", "model.intermediate_size": 2816,
    "model.ngram.orders": "[]", "model.attention.num_attention_heads": 16, "optim.name": "adamw",
    "optim.lr_scales": "[]", "data.batch_size": 4, "data.seq_len": 256,
}  # fmt: skip
_MIXTURE = {
    "model.adapters.num_experts": 8, "model.adapters.r": 8,
    "model.adapters.target_modules": "('mixer.q','mixer.k','mixer.v','mixer.o')",
}  # fmt: skip
STEPS: dict[str, dict[str, Any]] = {
    "frozen base": {"train.freeze": "('segments.*','norm.*','head.*')"},
    "loramoe": {"model.adapters.name": "loramoe", **_MIXTURE},
    "mola": {"model.adapters.name": "mola", **_MIXTURE},
    "mole": {"model.adapters.name": "mole", **_MIXTURE},
    "base": {},
}


def trainer_of(name: str):
    """The trainer of one of STEPS."""
    import jax

    from moe_zoo.sharding import make_mesh
    from moe_zoo.train.config import load_config
    from moe_zoo.train.step import Trainer

    config = load_config("quickstart", [(key, str(value)) for key, value in (BASE | STEPS[name]).items()])
    return Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())


def _step(name: str) -> Callable[[], None]:
    import jax

    trainer = trainer_of(name)
    rows, seq = BASE["data.batch_size"], BASE["data.seq_len"]
    state, batch = trainer.init_state(), jax.device_put(bench_train.a_batch(rows, seq), trainer.batch_sharding)

    def step():
        nonlocal state
        state, stats = trainer.train_step(state, batch, np.float32(0))
        jax.block_until_ready(stats)

    return step


def run_step(args: argparse.Namespace) -> None:
    """STEPS, as ratios to the frozen base."""
    from moe_zoo.models.counting import train_flops_per_token

    tokens = BASE["data.batch_size"] * BASE["data.seq_len"]
    models = {name: trainer_of(name).abstract for name in args.steps}
    forward = {name: model.flops_per_token((BASE["data.seq_len"] + 1) / 2) for name, model in models.items()}
    base = forward["frozen base"]
    print("GFLOP of a step, and the adapters' share of the frozen base's")
    for name, model in models.items():
        total = 2 * base if name == "frozen base" else train_flops_per_token(model, BASE["data.seq_len"])
        share = "" if name == "base" else f"{100 * (total / (2 * base) - 1):8.1f}%"
        print(f"  {name:14}{total * tokens / 1e9:9.0f}{share}")
    workers = [bench_train.Contender(name, __file__, "step") for name in args.steps]
    run = bench_train.interleaved(workers, args.rounds, args.calls, spread=args.spread)
    print(
        f"a training step, D 1024, 4 layers, {tokens} tokens, E 8, R 8 on q, k, v, o: {run.of}, ratios to frozen base"
    )
    run.print("frozen base")


# --- command line ----------------------------------------------------------------------------------------------------

PARTS = {"op": run_op, "crossover": run_crossover, "step": run_step}


def _run(args: argparse.Namespace) -> None:
    for part in args.parts.split(","):
        PARTS[part](args)


def add_low_rank(subparsers: Any) -> None:
    """The low-rank product beside loops over LoRAs, its two forms, and a training step with it."""
    parser = subparsers.add_parser(
        "low_rank",
        help="mixtures of LoRA beside loops over LoRAs, and what they add to a training step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    shape = lambda text: tuple(map(int, text.split(",")))
    shapes = [(2048, 1024, 16, 8), (4096, 1024, 16, 8), (4096, 1024, 8, 8), (4096, 1024, 64, 8)]
    parser.add_argument("--shapes", type=shape, nargs="+", default=shapes, metavar="T,D,E,R", help="of op")
    parser.add_argument("--tokens", type=int, default=4096, help="of crossover")
    parser.add_argument("--d_model", type=int, default=1024, help="of crossover")
    parser.add_argument("--k", type=int, nargs="+", default=[2], help="of crossover: choices of a token")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16], help="of crossover")
    parser.add_argument("--num_experts", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="of crossover")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), help="of step; with 'frozen base'")
    parser.add_argument(
        "--spread", type=float, default=bench_train.SPREAD, help="of step: more of it, and a round is void"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=10, help="of a round, of op and step")
    parser.set_defaults(run=_run)


if __name__ == "__main__":
    name, *rest = sys.argv[2:]
    if rest == ["step"]:
        bench_train.worker(lambda: _step(name))
    else:
        bench_train.worker(lambda: PRODUCTS[name](Problem(*map(int, rest[:-1]), rest[-1])))
