"""What training asks of a model that names the class of an example, and what such models have in common.

B batch, S tokens of an example, D model, C classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from moe_zoo.blocks.block import Block
from moe_zoo.core.aux import Aux
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import Constant, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import positive
from moe_zoo.layers.grid import GridView
from moe_zoo.layers.norm import LayerNorm
from moe_zoo.models.decoder import _UNROLL, ModelAux


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """What the settings of every such model have. `num_classes`: of the data."""

    #: what it learns from
    batches: ClassVar[str] = "labelled"
    #: adapters beside its layers, selectors put on a finished model: none
    adapted: ClassVar[bool] = False
    retrofit: ClassVar[None] = None

    num_classes: int = 10
    norm_eps: float = 1e-6
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    def validate(self, path: str) -> None:
        positive(self, path, "num_classes", "norm_eps")

    @property
    def num_layers(self) -> int:
        raise NotImplementedError

    @property
    def tokens_per_example(self) -> int:
        """Where it looks closest."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """What a run says of it, besides its parameters."""
        raise NotImplementedError

    def check_examples(self, data) -> None:
        """Raises ConfigError if it cannot learn from these (`data.Labelled`)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ImagesConfig(ClassifierConfig):
    """Of models of square images, `image_size` pixels of a side."""

    image_size: int = 32
    channels: int = 1

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "image_size", "channels")

    @property
    def views(self) -> list[GridView]:
        """The grids of tokens that it looks at, the finest first."""
        raise NotImplementedError

    @property
    def tokens_per_example(self) -> int:
        return self.views[0].height * self.views[0].width

    def check_examples(self, data) -> None:
        wanted = (self.image_size, self.image_size, self.channels)
        given = data.fields["images"].shape[1:] if "images" in data.fields else None
        if given != wanted:
            raise ConfigError(
                f"model.image_size, model.channels: {self.image_size}, {self.channels}; the data has "
                f"{f'images of {list(given)}' if given else 'no images but ' + ', '.join(data.fields)}"
            )
        if len(data.classes) != self.num_classes:
            raise ConfigError(f"model.num_classes: {self.num_classes}; the data has {len(data.classes)}")


class Classifier(nnx.Module):
    """Built abstractly, as a decoder is. A subclass has `stages`, stacked blocks with the numbers of their layers, and
    defines `__call__` and `flops_per_example`.
    """

    Config: ClassVar[type]

    def __init__(self, config, mesh: Mesh | None = None):
        """`mesh`: where it will run, if on more than one device."""
        self.config, self.mesh = config, mesh

    def __call__(
        self,
        batch: dict[str, Array],
        *,
        valid: Bool[Array, "B"] | None = None,
        train: bool = False,
        step=None,
        key=None,
        record: bool = False,
    ) -> tuple[Float[Array, "B C"], ModelAux]:
        """Logits (float32) and Aux. `batch`: arrays by the names of the data's fields. `valid` False marks rows that
        fill a batch: they change nothing elsewhere and count in no statistic. `record`: what was decided for every
        token goes into the Aux' terms.
        """
        raise NotImplementedError

    def flops_per_example(self) -> float:
        """Forward FLOPs, at what the settings say of what is dynamic; multiply-adds count two."""
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[str, Block, tuple[int, ...]]]:
        """(path, stacked block, layer ids) of every block."""
        raise NotImplementedError

    def routed(self):
        """Those of them that have experts."""
        return (found for found in self.blocks() if found[1].routed)

    def from_corpus(self, counts_V, domains) -> dict[str, Any]:
        """Initial values that follow from a corpus: there is none."""
        return {}

    def after_step(self, stats) -> dict[str, Array]:
        """New buffer values by path: no buffers."""
        return {}

    def refreshed(self, step) -> dict[str, Array]:
        """New values of buffers that follow from parameters: none."""
        return {}


class PooledHead(nnx.Module):
    """Mean over an example's tokens, LayerNorm, a linear layer with bias."""

    def __init__(self, hidden_size: int, num_classes: int, eps: float):
        self.norm = LayerNorm(hidden_size, eps)
        self.kernel = param((hidden_size, num_classes), ("embed", None), fan_in(hidden_size))
        self.bias = param((num_classes,), (None,), Constant(0.0))

    def __call__(self, x_BSD: Float[Array, "B S D"], valid_BS: Bool[Array, "B S"] | None = None):
        """Logits [B, C], float32 or wider. Tokens that are not valid are not in the mean."""
        x_BSD = x_BSD.astype(jnp.promote_types(x_BSD.dtype, jnp.float32))
        weights_BS = jnp.ones(x_BSD.shape[:2]) if valid_BS is None else valid_BS.astype(x_BSD.dtype)
        count_B = jnp.maximum(weights_BS.sum(1), 1)
        pooled_BD = jnp.einsum("bsd,bs->bd", x_BSD, weights_BS) / count_B[:, None]
        return self.norm(pooled_BD) @ self.kernel[...] + self.bias[...]


def run_stack(block: Block, ids: Sequence[int], x, view, ctx: RoutingContext) -> tuple[Array, Aux]:
    """x through the stacked layers of one block, and their Aux with a leading axis of layers."""

    def body(x, xs):
        one, layer = xs
        key = None if ctx.key is None else jax.random.fold_in(ctx.key, layer)
        x, aux, _, _ = one(x, view, ctx.replace(layer=layer, key=key))
        return x, aux

    return jax.lax.scan(body, x, (block, jnp.asarray(ids, jnp.int32)), unroll=min(_UNROLL, len(ids)))


def collected(stacks: dict[str, tuple[Sequence[int], Aux]]) -> ModelAux:
    """One ModelAux of the Aux of several stacks by path."""
    losses: dict[str, Array] = {}
    for _, aux in stacks.values():
        for name, loss in aux.losses.items():
            losses[name] = losses.get(name, 0.0) + loss.sum()
    told = {path: (jnp.asarray(ids, jnp.int32), aux) for path, (ids, aux) in stacks.items() if aux.stats or aux.terms}
    return ModelAux(losses, told)
