"""Polytropon (arXiv 2202.13914) and Multi-Head Adapter Routing (arXiv 2211.03831): a task mixes skills' parameters.

    u = sigmoid(Z[task]) per head and skill;  w = u / sum over skills
    A = sum_s w_s A_s, B = sum_s w_s B_s;   y = y0 + s (x A) B

The decision is a `Merge`: A and B are mixed, not outputs, so there are cross terms between skills. With h heads (MHR)
head q of the input's dims mixes A's rows and head q of the output's dims B's columns with weights of their own; h = 1
is Poly. Rows may hold tokens of several tasks, so the mixture is applied token by token in its factored form, which
is equal: t = sum_qs w_qs x_q A_qs,  y_q = sum_s w_qs t B_qs. A token of no known task has w = 1 / S.

Few shots on a new task: `freeze_experts` trains Z alone (MHR-z).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_zoo.adapters.adapter import Adapter
from moe_zoo.adapters.routed import gate_stats
from moe_zoo.adapters.targets import AdapterConfig, Linear
from moe_zoo.core.aux import Aux
from moe_zoo.core.decision import Merge
from moe_zoo.core.param import Frozen, Uniform, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import positive


@dataclasses.dataclass(frozen=True)
class PolyConfig(AdapterConfig):
    """`num_tasks`: domains of the data, by their ids. `num_skills` S, `num_splits` h. Z wants a learning rate of its
    own, a hundred times the others' in the authors' code: `optim.lr_scales=("*.logits=100",)`.
    """

    num_tasks: int = 1
    num_skills: int = 4
    num_splits: int = 1
    freeze_experts: bool = False

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "num_tasks", "num_skills", "num_splits")

    def experts(self, name: str, num_layers: int) -> int:
        return self.num_skills


class Poly(Adapter):
    """Poly and MHR: the parameters of S skills, mixed by a table of tasks, head by head."""

    Config = PolyConfig
    takes_loras = False

    def __init__(self, config: PolyConfig, linear: Linear):
        super().__init__(config, linear, kind=Frozen if config.freeze_experts else nnx.Param)
        h = config.num_splits
        for size in (linear.in_features, linear.out_features):
            if size % h:
                raise ConfigError(f"model.adapters.num_splits: {h} heads do not divide {size} dims of {linear.name!r}")
        shape = (config.num_tasks, h, config.num_skills)
        self.logits = param(shape, (None, None, None), Uniform(1e-3))

    def __call__(self, x_TD, y_TN, w_DN, ctx):
        E, R, D, N = self.dims
        h = self.config.num_splits
        w_TqS = self.decide(x_TD.shape[0], ctx).weights.reshape(-1, h, E).astype(x_TD.dtype)
        x_TqX = self.dropped(x_TD, ctx).reshape(-1, h, D // h)
        a_SRqX, b_SRqY = (p[...].astype(x_TD.dtype).reshape(E, R, h, -1) for p in (self.a, self.b))
        scale_SR = self.scale[...].astype(x_TD.dtype)
        rank_TR = jnp.einsum("tqsr,tqs,sr->tr", jnp.einsum("tqx,srqx->tqsr", x_TqX, a_SRqX), w_TqS, scale_SR)
        out_TqY = jnp.einsum("tqsy,tqs->tqy", jnp.einsum("tr,srqy->tqsy", rank_TR, b_SRqY), w_TqS)
        stats = gate_stats(w_TqS.mean(1).astype(jnp.float32), None, ctx, (self.scale[...] != 0).any())
        return y_TN + out_TqY.reshape(-1, N), Aux(stats=stats)

    def decide(self, T: int, ctx) -> Merge:
        """The weights of skills, [T h, S]."""
        c = self.config
        table = jax.nn.sigmoid(self.logits[...])
        table = table / (table.sum(-1, keepdims=True) + 1e-12)
        task_T = jnp.full(T, -1) if ctx.domain is None else ctx.domain
        known_T = (task_T >= 0) & (task_T < c.num_tasks)
        w_TqS = jnp.take(table, jnp.clip(task_T, 0, c.num_tasks - 1), axis=0)
        return Merge(jnp.where(known_T[:, None, None], w_TqS, 1 / c.num_skills).reshape(-1, c.num_skills))

    def idle_parameters(self) -> int:
        layers = (self.config.scales(self.linear) == 0).all((1, 2))
        c = self.config
        return super().idle_parameters() + int(layers.sum()) * c.num_tasks * c.num_splits * c.num_skills
