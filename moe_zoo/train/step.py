"""The state of a run and the one jitted step that advances it."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_zoo.adapters import steering
from moe_zoo.core import param as P
from moe_zoo.core.aux import reduce_stacked
from moe_zoo.core.registry import ConfigError
from moe_zoo.models import Decoder, make_model
from moe_zoo.sharding import batch_sharding, sharding_of
from moe_zoo.train import accumulation, distributed, guard
from moe_zoo.train.config import Config
from moe_zoo.train.objective import Objective
from moe_zoo.train.optimizer import learning_rate, make_optimizer, opt_shardings, rate_scales

#: {"trainable", "frozen", "buffers": {path: array}, "opt": optax state, "objective", "guard": dict, "step", "seed"}
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which paths are trained, which are fixed, which are buffers. Cut before the gradient: frozen costs nothing."""

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    buffers: tuple[str, ...]


def partition(model, freeze: tuple[str, ...] = ()) -> Partition:
    """Sorts the model's variables. `freeze`: patterns (`*.router.*`) over our paths, the last that matches decides, and
    one behind "!" says what is trained after all; each must match something. Buffers, which no gradient moves, are not
    frozen by it, and what the model itself keeps frozen is not trained.
    """
    groups = {"trainable": [], "frozen": [], "buffers": []}
    variables = P.flat(model)
    matching = lambda path: [p for p in freeze if fnmatch.fnmatch(path, p.removeprefix("!"))]
    free = [path for path, var in variables.items() if not isinstance(var, P.Frozen | P.Buffer)]
    used = {p for path in variables for p in matching(path) if path in free or not p.startswith("!")}
    for pattern in freeze:
        if pattern not in used:
            what = "parameter that is not frozen anyway" if pattern.startswith("!") else "parameter"
            raise ConfigError(f"train.freeze: {pattern!r} matches no {what}; paths look like {next(iter(variables))!r}")
    for path, var in variables.items():
        fixed = isinstance(var, P.Frozen) or not (matching(path) or ["!"])[-1].startswith("!")
        groups["buffers" if isinstance(var, P.Buffer) else "frozen" if fixed else "trainable"].append(path)
    if not groups["trainable"]:
        raise ConfigError(f"train.freeze: {list(freeze)} leaves nothing to train")
    return Partition(*(tuple(groups[name]) for name in ("trainable", "frozen", "buffers")))


class Trainer:
    """The abstract model, its shardings, and the compiled functions over plain state."""

    def __init__(self, config: Config, mesh: Mesh, objective: Objective):
        self.config, self.mesh, self.objective = config, mesh, objective
        self.abstract = make_model(config.model, mesh)
        self.names = P.layer_names(self.abstract)
        self.partition = partition(self.abstract, config.train.freeze)
        variables = P.flat(self.abstract)
        self.shardings = {n: sharding_of(mesh, v.logical_axes, v.get_value().shape, n) for n, v in variables.items()}
        self.shapes = {n: v.get_value() for n, v in variables.items()}
        self.tx = make_optimizer(config.optim, {n: variables[n].logical_axes for n in self.partition.trainable})
        self.rate_scales = rate_scales(config.optim, self.partition.trainable)
        self.state_shardings = self._state_shardings()
        self.batch_sharding = batch_sharding(mesh)
        self.train_step = jax.jit(
            self._train_step,
            donate_argnums=0,
            in_shardings=(self.state_shardings, self.batch_sharding, self.replicated),
            out_shardings=(self.state_shardings, self.replicated),
        )

    @property
    def replicated(self):
        return NamedSharding(self.mesh, PartitionSpec())

    def init_state(
        self,
        counts_V: np.ndarray | None = None,
        given: Mapping[str, jax.Array | np.ndarray] | None = None,
        domains: Sequence[str] = (),
    ) -> State:
        """Fresh weights, drawn on the host and placed shard by shard; zero moments.

        `counts_V`, `domains`: how often each token id occurs in the training data, and the names of its domains, for
        routers that ask (`Router.from_corpus`).
        `given`: values by path to begin from instead; raises ConfigError where a shape differs.
        """
        fitted = {} if counts_V is None else self.abstract.from_corpus(counts_V, domains)
        # given weights go with the tables that they were trained with; a buffer follows the data, whose ids may differ
        of_data = {path: value for path, value in fitted.items() if path in self.partition.buffers}
        given = fitted | dict(given or {}) | of_data
        for path in given.keys() & self.shapes.keys():
            if given[path].shape != self.shapes[path].shape:
                raise ConfigError(
                    f"{path}: the weights to begin from have shape {list(given[path].shape)}, the model's settings ask "
                    f"for {list(self.shapes[path].shape)}"
                )
        given |= steering.begun(self.abstract, given)
        # no alias: the state is donated, and the caller keeps what it gave
        place = lambda var, path, x: distributed.put(x.astype(self.shapes[path].dtype), self.shardings[path])
        values = P.arrays(P.materialize(self.abstract, self.config.train.seed, place, given))
        if any(block.refreshes for _, block, _ in self.abstract.blocks()):
            follow = lambda values: P.replace(self.abstract, values).refreshed(jnp.int32(0))
            where = {name: self.shardings[name] for name in jax.eval_shape(follow, values)}
            values |= jax.jit(follow, out_shardings=where)(values)
        state = {
            group: {n: values[n] for n in getattr(self.partition, group)}
            for group in ("trainable", "frozen", "buffers")
        }
        make_opt = jax.jit(self.tx.init, out_shardings=self.state_shardings["opt"])
        state["opt"] = make_opt(state["trainable"])
        # jitted, so that equal values are separate buffers: the state is donated
        state["objective"] = jax.jit(self.objective.init_state, out_shardings=self.replicated)()
        state["guard"] = jax.jit(guard.init, out_shardings=self.replicated)()
        state["step"] = distributed.put(np.zeros((), np.int32), self.replicated)
        # not a constant of the program: runs that differ in their seed share what XLA compiled
        state["seed"] = distributed.put(np.asarray(self.config.train.seed, np.int32), self.replicated)
        return state

    def abstract_state(self) -> State:
        """Shapes, types and shardings of the state, for restoring a checkpoint onto this mesh."""
        pick = lambda names: {n: self.shapes[n] for n in names}
        part = self.partition
        state = {"trainable": pick(part.trainable), "frozen": pick(part.frozen), "buffers": pick(part.buffers)}
        state["opt"] = jax.eval_shape(self.tx.init, state["trainable"])
        state["objective"] = jax.eval_shape(self.objective.init_state)
        state["guard"] = jax.eval_shape(guard.init)
        state["step"] = state["seed"] = jax.ShapeDtypeStruct((), jnp.int32)
        shaped = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
        return jax.tree.map(shaped, state, self.state_shardings)

    def model(self, state: State) -> Decoder:
        """The module with the state's arrays."""
        return P.replace(self.abstract, {**state["trainable"], **state["frozen"], **state["buffers"]})

    def _state_shardings(self):
        groups = {
            g: {n: self.shardings[n] for n in getattr(self.partition, g)} for g in ("trainable", "frozen", "buffers")
        }
        trained = {n: self.shapes[n] for n in self.partition.trainable}
        groups["opt"] = opt_shardings(self.tx, trained, self.shardings, self.replicated)
        groups["objective"] = jax.tree.map(lambda _: self.replicated, jax.eval_shape(self.objective.init_state))
        groups["guard"] = jax.tree.map(lambda _: self.replicated, jax.eval_shape(guard.init))
        groups["step"] = groups["seed"] = self.replicated
        return groups

    def _train_step(self, state: State, batch, progress):
        """(state, batch {name: [B, S]}, progress in [0, 1]) -> (state, statistics)."""
        step = state["step"]
        key = jax.random.fold_in(jax.random.key(state["seed"]), step)
        gradients, stats = self._gradients(state, self.objective.weighted(batch), step, key)
        norms = guard.gradient_norms(gradients, self.names)
        norm = guard.global_norm(norms)
        good, watch = guard.judge(self.config.train.guard, state["guard"], stats["scalars"]["loss"].value(), norm)
        rate = learning_rate(self.config.optim, step, progress)
        change = lambda old, gradients, stats: self._moved(state | old, gradients, stats, norm, rate)
        # a branch and no choice per array: the arrays that a step may change are then changed in place
        old = {name: state[name] for name in ("trainable", "buffers", "opt", "objective")}
        new = jax.lax.cond(good, change, lambda old, *_: old, old, gradients, stats)
        new |= {"frozen": state["frozen"], "guard": watch, "step": step + 1, "seed": state["seed"]}
        stats["scalars"] = {k: s.value() for k, s in stats["scalars"].items()} | {
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped_steps": watch["skipped"],
            "skipped_in_a_row": watch["in_a_row"],
        }
        stats["gradient_norms"] = norms
        # a name with a slash is of one linear layer, for its own `after_step`: matrices that nobody logs
        logged = lambda layer: {name: stat for name, stat in layer.items() if "/" not in name}
        stats["layers"] = {path: logged(layer) for path, layer in stats["layers"].items()}
        return new, stats

    def _moved(self, state, gradients, stats, norm, rate):
        """What a good step makes of the arrays that it may change. `norm` of all gradients, for clipping."""
        if (most := self.config.optim.clip_norm) is not None:
            factor = jnp.minimum(1, most / norm)
            gradients = jax.tree.map(lambda g: (g * factor).astype(g.dtype), gradients)
        model = self.model(state)
        gradients = steering.steered(model, gradients, "gradients")
        updates, opt = self.tx.update(gradients, state["opt"], state["trainable"])
        updates = steering.steered(model, updates, "updates")
        move = lambda p, u, scale: p + (rate * scale).astype(p.dtype) * u.astype(p.dtype)
        trainable = jax.tree.map(move, state["trainable"], updates, self.rate_scales)
        held = steering.held(model)
        buffers = state["buffers"] | model.after_step(stats["layers"])
        buffers |= steering.refreshed(self.model(state | {"buffers": buffers}), state["step"])
        moved = self.model(state | {"buffers": buffers, "trainable": trainable})
        return {
            "trainable": steering.kept(held, trainable, state["trainable"]),
            "buffers": buffers | moved.refreshed(state["step"]),
            "opt": steering.kept(held, opt, state["opt"]),
            "objective": self.objective.update(state["objective"], stats),
        }

    def _gradients(self, state, batch, step, key):
        """Sums of gradients and statistics over the micro-batches."""
        M = self.config.train.accumulation
        fixed = {**state["frozen"], **state["buffers"]}

        def loss(trainable, micro, micro_key):
            model = P.replace(self.abstract, {**trainable, **fixed})
            return self.objective.loss(model, micro, state["objective"], step=step, key=micro_key, fraction=1 / M)

        grad = jax.grad(loss, has_aux=True)
        if M == 1:
            return grad(state["trainable"], batch, key)

        # row r of the batch goes to micro-batch r % M, so that each one is spread over the devices as the batch is
        cut = jax.tree.map(lambda x: x.reshape(x.shape[0] // M, M, *x.shape[1:]).swapaxes(0, 1), batch)
        xs = cut, jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(M))
        load = accumulation.Load(self.abstract)
        step_load = load.of_step(lambda micro, key: loss(state["trainable"], micro, key)[1]["layers"], xs)

        def one(carry, xs):
            total, before = carry
            micro, micro_key = xs
            micro = micro | load.inputs(step_load, before)
            gradients, stats = grad(state["trainable"], micro, micro_key)
            return (jax.tree.map(jnp.add, total, gradients), load.added(before, stats["layers"])), stats

        zeros = jax.tree.map(jnp.zeros_like, state["trainable"])
        (gradients, _), stats = jax.lax.scan(one, (zeros, load.zeros()), xs)
        return gradients, reduce_stacked(stats)
