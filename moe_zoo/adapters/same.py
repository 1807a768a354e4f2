"""SAME (arXiv 2602.01990): a mixture of LoRA trained on one task after the other, steadied by rules for its updates.

    p = softmax(x W_g);  y = y0 + sum_e p_e s (x A_e) B_e;   at inference the K largest, renormalised

No loss keeps old tasks; a run is a task, begun from the run of the task before (`--init-from`). Every linear layer
counts its inputs: C^t, the mean of x x^T over all tokens of this and earlier tasks, and C^(t-1), of the earlier ones.

    router    G' = V g V^T G + (1 - V V^T) G            V: the k first eigenvectors of C^t, sigma its eigenvalues
              k: the fewest with sum sigma_i^2 >= energy of all;  g_i = sigma_i / mean of sigma over `window` up to i
    experts   A' = A (C^(t-1) + mu)^(-1)                from the second task on, k eigenvectors of C^(t-1)
    freezing  U: mean of p on this task;  F: mean of p ||x||^2 on earlier ones;  both to [0, 1] over the experts
              an expert with U - F < freeze_below neither acts nor moves in training; at inference all act

The router's rule leaves what is not in V as it is, and of V turns down what stands out (g <= 1): with g = 1 nothing
changes. The expert's rule is of A's gradient or of its update, on the input's side; B has none. Under Adam a rule for
gradients loses its scale, so the default is the update.

C is D x D in float32, three of them for each linear layer, and its eigenvectors are found every `refresh_every` steps.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.adapters.routed import Routed, RoutedConfig, gate_stats, top_k_gates, valid_weights
from moe_zoo.adapters.targets import Linear
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.param import Buffer, Constant, Normal, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import at_least_f32, check_experts_per_tok

_MEANS = ("moment", "use", "energy")  # of x x^T, of p, of p ||x||^2


@dataclasses.dataclass(frozen=True)
class SameConfig(RoutedConfig):
    """`num_experts` as many as tasks (paper), `num_experts_per_tok` K at inference. `energy` delta and `max_components`
    bound k. `gain` "clipped" is the authors' code's g: the inverse of the mean singular value, over the largest such,
    in [0.8, 1.2]; "none" leaves the router to the optimizer. `curvature` mu, None: no rule for experts. `freeze_below`
    tau, -1: none frozen. `where`: the rules act on what the optimizer gets, or on what it gives.
    """

    num_experts_per_tok: int = 2
    gain: Literal["local", "clipped", "none"] = "local"
    energy: float = 0.9
    window: int = 3
    max_components: int = 64
    curvature: float | None = 0.9
    freeze_below: float = 0.1
    where: Literal["gradients", "updates"] = "updates"
    refresh_every: int = 20

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "num_experts_per_tok", "window", "max_components", "curvature", "refresh_every")
        check_experts_per_tok(self.num_experts_per_tok, self.num_experts, path)
        if not 0 < self.energy <= 1:
            raise ConfigError(f"{join(path, 'energy')}: expected a number in (0, 1], got {self.energy}")
        if self.freeze_experts:
            raise ConfigError(f"{join(path, 'freeze_experts')}: true; experts are what this entry keeps from drifting")


class Same(Routed):
    """SAME: task after task, router and experts steadied by the second moments of their inputs, idle experts frozen."""

    Config = SameConfig

    def __init__(self, config: SameConfig, linear: Linear):
        super().__init__(config, linear)
        E, R, D, _ = self.dims
        K, inputs = min(config.max_components, D), linear.axes[0]
        self.a = param((E, R, D), ("adapter", None, inputs), Normal(0.01))
        self.refresh_every = 0 if config.gain == "none" else config.refresh_every
        buffer = lambda shape, axes, value=0.0: param(shape, axes, Constant(value), kind=Buffer)
        # of this task and of those before it: how many tokens, and means over them
        for task in ("this", "past"):
            setattr(self, f"{task}_tokens", buffer((), ()))
            setattr(self, f"{task}_moment", buffer((D, D), (inputs, None)))
            setattr(self, f"{task}_use", buffer((E,), ("expert_logits",)))
            setattr(self, f"{task}_energy", buffer((E,), ("expert_logits",)))
        # what follows from them: V and g of C^t, eigenvectors and eigenvalues of C^(t-1), 0 beyond k
        self.router_basis, self.router_gain = buffer((D, K), (inputs, None)), buffer((K,), (None,), 1.0)
        self.past_basis, self.past_values = buffer((D, K), (inputs, None)), buffer((K,), (None,))

    def gate(self, x_TD, hidden_TER, ctx):
        probs_TE = jax.nn.softmax(self.among_live(self.logits(x_TD, hidden_TER)))
        gates_TE = self.chosen(probs_TE, ctx)
        on = self.live().any().astype(jnp.float32)
        stats = gate_stats(gates_TE, probs_TE, ctx, on)
        if ctx.train:
            stats["frozen_experts"] = Stat.mean(on * self.frozen().sum(), on)
            sums = batch_sums(at_least_f32(x_TD), probs_TE, valid_weights(x_TD.shape[0], ctx))
            stats |= {f"{self.linear.name}/{name}": Stat.sum(jax.lax.stop_gradient(v)) for name, v in sums.items()}
        return gates_TE, Aux(stats=stats)

    def chosen(self, probs_TE, ctx):
        if not ctx.train:
            return top_k_gates(probs_TE, self.config.num_experts_per_tok, renormalise=True)
        gates_TE = jnp.where(self.frozen(), 0, probs_TE)
        return gates_TE / (gates_TE.sum(-1, keepdims=True) + 1e-20)

    def frozen(self) -> Bool[Array, "E"]:
        """The experts that wait in this step. None before the task has been seen; never all that there are."""
        live_E = self.live()
        use_E, needed_E = spread(self.this_use[...], live_E), spread(self.past_energy[...], live_E)
        score_E = jnp.where(live_E, use_E - needed_E, -jnp.inf)
        best_E = jnp.arange(self.num_experts) == jnp.argmax(score_E)
        return live_E & (score_E < self.config.freeze_below) & ~best_E & (self.this_tokens[...] > 0)

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        sums = {name: stats[f"{self.linear.name}/{name}"].value().astype(jnp.float32) for name in _MEANS}
        total = self.this_tokens[...] + sums["use"].sum()  # probabilities sum to 1 for each token
        mean = lambda name: joined(getattr(self, f"this_{name}")[...], self.this_tokens[...], sums[name], total)
        return {"this_tokens": total} | {f"this_{name}": mean(name) for name in _MEANS}

    def refreshed(self) -> dict[str, Array]:
        c, so_far = self.config, self._so_far()["past_moment"]
        values_K, basis_DK, kept_K = principal(so_far, c.energy, self.router_gain[...].shape[0])
        gain_K = local_gain(values_K, c.window) if c.gain == "local" else clipped_gain(values_K, c.window, kept_K)
        return {"router_basis": basis_DK, "router_gain": jnp.where(kept_K, gain_K, 1)}

    def begun(self) -> dict[str, Array]:
        new = self._so_far()
        values_K, basis_DK, kept_K = principal(new["past_moment"], self.config.energy, self.past_values[...].shape[0])
        nothing = {f"this_{name}": jnp.zeros_like(new[f"past_{name}"]) for name in ("tokens", *_MEANS)}
        return new | nothing | {"past_basis": basis_DK, "past_values": jnp.where(kept_K, values_K, 0)}

    def _so_far(self) -> dict[str, Array]:
        """Means over earlier tasks and this one."""
        n, a = self.this_tokens[...], self.past_tokens[...]
        past, this = ({name: getattr(self, f"{task}_{name}")[...] for name in _MEANS} for task in ("past", "this"))
        means = {f"past_{name}": joined(past[name], a, n * this[name], a + n) for name in _MEANS}
        return {"past_tokens": a + n} | means

    def steered(self, values, where):
        c = self.config
        if where != c.where:
            return {}
        new = {}
        if c.gain != "none" and "router" in values:
            new["router"] = turned_down(values["router"], self.router_basis[...], self.router_gain[...])
        if c.curvature is not None and "a" in values:
            a_ERD = preconditioned(values["a"], self.past_basis[...], self.past_values[...], c.curvature)
            new["a"] = jnp.where(self.past_tokens[...] > 0, a_ERD, values["a"])
        return new

    def held(self):
        frozen_E11 = self.frozen()[:, None, None]
        return {"a": frozen_E11, "b": frozen_E11}


def batch_sums(
    x_TD: Float[Array, "T D"], probs_TE: Float[Array, "T E"], weight_T: Float[Array, "T"]
) -> dict[str, Array]:
    """Sums over the tokens of x x^T, p and p ||x||^2; over those of all devices, as a layer sees the global batch."""
    weighed_TE = probs_TE * weight_T[:, None]
    return {
        "moment": (x_TD * weight_T[:, None]).T @ x_TD,
        "use": weighed_TE.sum(0),
        "energy": (x_TD**2).sum(-1) @ weighed_TE,
    }


def joined(mean: Array, count: Array, more: Array, total: Array) -> Array:
    """The mean over `total` of what has `mean` over `count` of them and the sum `more` over the others."""
    return (mean * count + more) / jnp.maximum(total, 1)


def spread(values_E: Float[Array, "E"], live_E: Bool[Array, "E"]) -> Float[Array, "E"]:
    """From 0, the least of the live, to 1, the largest; all 0 where they are equal."""
    low, high = jnp.where(live_E, values_E, jnp.inf).min(), jnp.where(live_E, values_E, -jnp.inf).max()
    return jnp.where(high > low, (values_E - low) / jnp.where(high > low, high - low, 1), 0)


def principal(
    moment_DD: Float[Array, "D D"], energy: float, K: int
) -> tuple[Float[Array, "K"], Float[Array, "D K"], Bool[Array, "K"]]:
    """The K largest eigenvalues, descending, their eigenvectors, and which are needed for `energy` of sum sigma^2."""
    values_D, basis_DD = jnp.linalg.eigh(moment_DD)
    values_D, basis_DD = jnp.maximum(values_D[::-1], 0), basis_DD[:, ::-1]
    squares_D = values_D**2
    before_D = jnp.cumsum(squares_D) - squares_D
    kept_D = (before_D < energy * squares_D.sum()) & (values_D > 0)
    return values_D[:K], basis_DD[:, :K], kept_D[:K]


def trailing_mean(values_K: Float[Array, "K"], window: int) -> Float[Array, "K"]:
    """The mean of the last `window` values up to each, of fewer at the beginning."""
    sums_K = jnp.convolve(values_K, jnp.ones(window, values_K.dtype))[: values_K.shape[0]]
    return sums_K / jnp.minimum(jnp.arange(values_K.shape[0]) + 1, window)


def local_gain(values_K: Float[Array, "K"], window: int) -> Float[Array, "K"]:
    """sigma over its mean in the window, which ends at it; at most 1 for descending values."""
    mean_K = trailing_mean(values_K, window)
    return jnp.where(mean_K > 0, values_K / jnp.where(mean_K > 0, mean_K, 1), 1)


def clipped_gain(values_K: Float[Array, "K"], window: int, kept_K: Bool[Array, "K"]) -> Float[Array, "K"]:
    """As the authors' code has it, of standard deviations: the least of those kept has 1, the largest down to 0.8."""
    inverse_K = jnp.where(kept_K, 1 / (trailing_mean(jnp.sqrt(values_K), window) + 1e-6), 0)
    return jnp.clip(inverse_K / jnp.maximum(inverse_K.max(), 1e-30), 0.8, 1.2)


def turned_down(
    router_DE: Float[Array, "D E"], basis_DK: Float[Array, "D K"], gain_K: Float[Array, "K"]
) -> Float[Array, "D E"]:
    """V g V^T G + (1 - V V^T) G."""
    return router_DE + basis_DK @ ((gain_K - 1)[:, None] * (basis_DK.T @ router_DE))


def preconditioned(
    a_ERD: Float[Array, "E R D"], basis_DK: Float[Array, "D K"], values_K: Float[Array, "K"], mu: float
) -> Float[Array, "E R D"]:
    """A (V S V^T + mu)^(-1), exactly, for orthonormal V; a value of 0 is as if its vector were not there."""
    return a_ERD / mu + ((a_ERD @ basis_DK) * (1 / (values_K + mu) - 1 / mu)) @ basis_DK.T
