"""BiFormer (arXiv 2303.08810): four stages of blocks over ever coarser grids, attention routed between regions.

    x += DWConv3x3(x);   x += BRA(LN x);   x += MLP(LN x)

A stage halves the grid's sides. `topk` says what its blocks attend with: K > 0 is bi-level routing to K regions, -2
attention of all to all.

B batch, Y x X grid, S = Y * X tokens, D model, C classes.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moe_zoo.blocks.block import Block
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import stack
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.grid import Depthwise, Downsample, GridView, Stem, light
from moe_zoo.layers.mlp import MLP, FeedForwardConfig
from moe_zoo.layers.norm import LayerNorm
from moe_zoo.mixers.bi_level import BiLevel, BiLevelConfig, FullGrid, Regions, Select
from moe_zoo.models.classifier import Classifier, ImagesConfig, PooledHead, collected, run_stack
from moe_zoo.models.decoder import ModelAux

FULL = -2  # of `topk`, as the authors write it


@dataclasses.dataclass(frozen=True)
class BiFormerConfig(ImagesConfig):
    """`depths`, `hidden_sizes`, `topk`, `num_heads`: one number per stage. `windows`: regions per side, in every stage;
    `select`: which of them (`BiLevelConfig`).
    The defaults are BiFormer-T's. An image's side is divided by 4 before the first stage and by 2 before the others.
    """

    name: str = "biformer"
    image_size: int = 224
    channels: int = 3
    depths: tuple[int, ...] = (2, 2, 8, 2)
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 512)
    topk: tuple[int, ...] = (1, 4, 16, FULL)
    num_heads: tuple[int, ...] = (2, 4, 8, 8)
    windows: int = 7
    mlp_ratio: int = 3
    lce_size: int = 5
    select: Select = "alike"

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "windows", "mlp_ratio", "lce_size")
        for name in ("hidden_sizes", "topk", "num_heads"):
            if len(getattr(self, name)) != len(self.depths) or not self.depths:
                raise ConfigError(
                    f"{join(path, name)}: {list(getattr(self, name))}; expected one for each of the "
                    f"{len(self.depths)} stages of depths={list(self.depths)}"
                )
        if min(self.hidden_sizes) < 1 or self.hidden_sizes[0] % 2:  # the patch embedding begins with half of it
            raise ConfigError(
                f"{join(path, 'hidden_sizes')}: {list(self.hidden_sizes)}; expected numbers above 0, the first one even"
            )
        for stage, (view, k) in enumerate(zip(self.views, self.topk, strict=True)):
            if k != FULL and k < 1:
                raise ConfigError(
                    f"{join(path, 'topk')}[{stage}]: {k}; expected regions >= 1, or {FULL} for all tokens"
                )
            self.attention(stage).validate(path)
            if k != FULL:
                Regions.of(view, self.windows)

    def attention(self, stage: int) -> BiLevelConfig:
        """The settings of one stage's attention."""
        topk = 1 if self.topk[stage] == FULL else self.topk[stage]
        return BiLevelConfig(self.num_heads[stage], self.windows, topk, self.lce_size, self.select)

    @property
    def views(self) -> list[GridView]:
        """The grid of each stage."""
        sides = [-(-self.image_size // (4 << stage)) for stage in range(len(self.depths))]
        return [GridView(side, side) for side in sides]

    @property
    def num_layers(self) -> int:
        return sum(self.depths)

    @property
    def summary(self) -> str:
        sides = ", ".join(str(view.height) for view in self.views)
        return f"bi-level routing to {list(self.topk)} regions, {list(self.depths)} blocks on grids of sides {sides}"


class GridBlock(Block):
    """A block whose tokens first learn where they are: x += DWConv3x3(x)."""

    def __init__(self, *, hidden_size: int, **parts):
        super().__init__(**parts)
        self.position = Depthwise((hidden_size,), ("embed",), 3)

    def __call__(self, x_BSD, view: GridView, ctx: RoutingContext, cache: dict | None = None, at=None):
        """Returns (x, Aux, cache, carry)."""
        x_BSD = x_BSD + self.position(view.unfold(x_BSD)).reshape(x_BSD.shape)
        return super().__call__(x_BSD, view, ctx, cache, at)


class BiFormer(Classifier):
    """Bi-level routing attention in the first stages, full attention in the last, a head on the mean of its tokens."""

    Config = BiFormerConfig

    def __init__(self, config: BiFormerConfig, mesh: Mesh | None = None):
        super().__init__(config, mesh)
        norm = lambda size: LayerNorm(size, config.norm_eps)
        sizes = config.hidden_sizes
        self.stem = Stem(config.channels, sizes[0], norm)
        self.down = nnx.List([Downsample(a, b, norm(b)) for a, b in zip(sizes, sizes[1:])])
        ends = [sum(config.depths[: stage + 1]) for stage in range(len(sizes))]
        self.layer_ids = tuple(tuple(range(end - depth, end)) for end, depth in zip(ends, config.depths))
        self.stages = nnx.List([stack(self._block(stage), ids) for stage, ids in enumerate(self.layer_ids)])
        self.head = PooledHead(sizes[-1], config.num_classes, config.norm_eps)

    def __call__(
        self, batch: dict[str, Array], *, valid=None, train=False, step=None, key=None, record=False
    ) -> tuple[Float[Array, "B C"], ModelAux]:
        """Logits and Aux of `batch["images"]`, uint8 [B, side, side, channels]."""
        x = self.stem(light(batch["images"], jnp.dtype(self.config.dtype)))
        stacks = {}
        for stage, view in enumerate(self.config.views):
            view = dataclasses.replace(view, mesh=self.mesh)
            x = self.down[stage - 1](x) if stage else x
            B, Y, X, D = x.shape
            ctx = RoutingContext(batch=B, seq=Y * X, train=train, mesh=self.mesh, step=step, key=key, record=record)
            x, aux = run_stack(self.stages[stage], self.layer_ids[stage], x.reshape(B, Y * X, D), view, ctx)
            stacks[f"stages.{stage}"] = (self.layer_ids[stage], aux)
            x = view.unfold(x)
        return self.head(x.reshape(x.shape[0], -1, x.shape[-1])), collected(stacks)

    def blocks(self):
        for stage, block in enumerate(self.stages):
            yield f"stages.{stage}", block, self.layer_ids[stage]

    def flops_per_example(self) -> float:
        config, total = self.config, 0.0
        for stage, view in enumerate(config.views):
            block, made = self._block(stage), self.down[stage - 1] if stage else self.stem
            each = block.mixer.flops(view) + block.ffn.flops_per_token() + block.position.flops_per_token
            total += view.height * view.width * (made.flops_per_token + config.depths[stage] * each)
        return total + 2 * config.hidden_sizes[-1] * config.num_classes

    def _block(self, stage: int) -> GridBlock:
        config, D = self.config, self.config.hidden_sizes[stage]
        # residual branches start at 1/sqrt(2L) of their size, as a decoder's
        out_scale = (2 * config.num_layers) ** -0.5
        full = config.topk[stage] == FULL
        mlp = FeedForwardConfig(activation="gelu", gated=False, bias=True)
        return GridBlock(
            hidden_size=D,
            mixer=(FullGrid if full else BiLevel)(config.attention(stage), hidden_size=D, out_scale=out_scale),
            ffn=MLP(mlp, hidden_size=D, intermediate_size=config.mlp_ratio * D, out_scale=out_scale),
            mixer_norm=LayerNorm(D, config.norm_eps),
            ffn_norm=LayerNorm(D, config.norm_eps),
        )
