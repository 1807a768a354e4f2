"""One file serves every decoder: embedding, segments of scanned blocks, norm, head.

B batch, S sequence, T = B * S tokens, D model, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.adapters.adapter import add_adapters
from moe_zoo.blocks.block import Block
from moe_zoo.core.aux import Aux, Stat, is_stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import arrays, flat, freeze, replace, stack
from moe_zoo.depth.attention import DEPTH
from moe_zoo.layers.attention import RotaryKey, View
from moe_zoo.layers.embedding import Embedding, Head
from moe_zoo.layers.ngram import NgramEmbedding
from moe_zoo.models.config import ModelConfig
from moe_zoo.models.making import last_norm, make_block, shared_modules, shared_selectors

_UNROLL = 4  # scan(unroll=4) measured 10% less CPU time and 20% less wall time than unroll=1
_REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelAux:
    """`losses` summed over layers. `layers`: path of a stacked block -> (layer ids [R], Aux with leading axis R)."""

    losses: dict[str, Array]
    layers: dict[str, tuple[Int[Array, "R"], Aux]]

    def total_loss(self) -> Float[Array, ""]:
        return sum(self.losses.values(), jnp.zeros((), jnp.float32))

    @property
    def stats(self) -> dict[str, dict[str, Stat]]:
        return {path: aux.stats for path, (_, aux) in self.layers.items()}

    def terms(self) -> dict[str, dict[str, Any]]:
        return {path: aux.terms for path, (_, aux) in self.layers.items()}


class SegmentBlocks(nnx.Module):
    """The stacked blocks of one segment, one entry per position of its pattern."""

    def __init__(self, blocks: list[Block], layer_ids: list[tuple[int, ...]]):
        self.blocks = nnx.List(blocks)
        self.layer_ids = tuple(layer_ids)

    @property
    def repeats(self) -> int:
        return len(self.layer_ids[0])


class Decoder(nnx.Module):
    """A causal language model. Built abstractly: `core.param.materialize` gives it weights."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None = None):
        """`mesh`: where it will run, if on more than one device; dispatchers need to know."""
        D = config.hidden_size
        self.config, self.mesh = config, mesh
        self.embed = Embedding(config.vocab_size, D, scale=config.embedding_scale)
        if config.ngram.orders:
            self.ngram = NgramEmbedding(config.ngram, vocab_size=config.vocab_size, hidden_size=D)
        first, segments = 0, []
        for segment in config.segments():
            P, R = len(segment.pattern), segment.repeats
            ids = [tuple(first + r * P + p for r in range(R)) for p in range(P)]
            segments.append(([make_block(config.variant(kind), kind, config) for kind in segment.pattern], ids))
            first += P * R
        together = shared_selectors(config)
        self.shared = nnx.Dict(shared_modules(config) | together)
        self.norm = last_norm(config)
        if not config.tie_word_embeddings:
            self.head = Head(config.vocab_size, D, config.lm_head_bias)
        if config.adapted:
            freeze(self)
            blocks = [pair for blocks, ids in segments for pair in zip(blocks, ids, strict=True)]
            adapters = add_adapters(config.adapters, blocks, num_layers=config.num_layers, hidden_size=D)
            if adapters is not None:
                self.adapters = adapters
        elif config.retrofit:
            freeze(self, but=together.get(DEPTH))
            for block in (block for blocks, _ in segments for block in blocks):
                spared = block.selects and block.selector.retrofits
                freeze(block, but=block.selector if spared else None)
        self.segments = nnx.List(
            SegmentBlocks([stack(block, layers) for block, layers in zip(blocks, ids)], ids) for blocks, ids in segments
        )

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        valid: Bool[Array, "B S"] | None = None,
        domain: Int[Array, "B S"] | None = None,
        num_domains: int = 0,
        prompt: Bool[Array, "B S"] | None = None,
        instructions: Float[Array, "B M"] | None = None,
        cache: dict | None = None,
        inputs: dict[str, Any] | None = None,
        train: bool = False,
        step: Int[Array, ""] | None = None,
        key: Array | None = None,
        record: bool = False,
        last: bool = False,
    ) -> tuple[Float[Array, "B S V"], ModelAux, dict | None]:
        """Logits (float32), Aux, and the new cache.

        `segment_ids` separate packed documents; `valid` False marks padding, which changes nothing elsewhere. With a
        `cache` (`init_cache`) the S tokens continue the cached ones. `inputs` holds arrays with a leading axis of all L
        layers, for routers (`router_bias`, `given`) and selectors (`depth`, the path of each sequence). `prompt`: the
        tokens that selectors of finished models decide by; None: all, with a cache those of its first call.
        `instructions`: an embedding of what each sequence asks for, for adapters that look at it (Glider); the same in
        every call that continues a cache. `record` puts every token's routing into the Aux' terms. `last`: only the
        logits of the last token, [B, 1, V].
        """
        B, S = tokens.shape
        at = None if cache is None else cache["at"]
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids with a cache: packed documents cannot be continued; decode one per row")
        if positions is None:
            fresh = cache is None  # what continues a cache is counted from `at`, padding included
            positions = count_positions(tokens.shape, segment_ids, valid if fresh else None) + (0 if fresh else at)
        if prompt is None and cache is not None and self.reads_prompts:
            prompt = jnp.broadcast_to(at == 0, (B, S))
        flat = lambda x: None if x is None else x.reshape(B * S)
        ctx = RoutingContext(
            batch=B, seq=S, train=train, num_domains=num_domains, mesh=self.mesh, step=step, key=key, record=record,
            valid=flat(valid), positions=flat(positions), segment_ids=flat(segment_ids),
            token_ids=flat(tokens), domain=flat(domain), prompt=flat(prompt), at=at, carry=self._init_carry(B * S),
        )  # fmt: skip
        shared, shared_cache = self._before_layers(ctx, cache)
        shared, inputs = self._with_adapters(shared, inputs or {}, instructions)
        ctx = ctx.replace(shared=shared)
        dtype = jnp.dtype(self.config.dtype)
        view = View(positions, segment_ids, valid, train=train).with_rotary(self._rotary_keys(), dtype)
        x, ngram_cache = self._embed(tokens, positions, cache, dtype)
        first_cache = None
        if self.two_passes:
            passed = self._layers(x, ctx, view, cache, "first", inputs)
            ctx = ctx.replace(shared={**shared, "adapters": self.adapters.second(self.norm(passed.x))})
            first_cache = passed.caches
        state = self._layers(x, ctx, view, cache, "segments", inputs)
        x = self.norm(state.x[:, -1:] if last else state.x)
        logits = self.embed.attend(x) if self.config.tie_word_embeddings else self.head(x)
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        wide = jnp.promote_types(logits.dtype, jnp.float32)
        new_cache = None
        if cache is not None:
            new_cache = {"at": at + S, "ngram": ngram_cache, "shared": shared_cache, "segments": state.caches}
            new_cache |= {"first": first_cache} if self.two_passes else {}
        return logits.astype(wide), ModelAux(state.losses, state.layers), new_cache

    def _layers(self, x, ctx: RoutingContext, view: View, cache, key: str, inputs) -> "Run":
        """All segments, one after the other, with the caches that are `cache[key]`."""
        state = Run(x, ctx, view, None if cache is None else cache[key], ctx.at, inputs)
        for index, segment in enumerate(self.segments):
            state.run_segment(index, segment, self.config.remat if ctx.train else "none")
        return state

    @property
    def two_passes(self) -> bool:
        """Whether adapters want a first pass to decide by (X-LoRA)."""
        return hasattr(self, "adapters") and self.adapters.two_passes

    @property
    def instruction_size(self) -> int | None:
        """Numbers of an instruction's embedding; None: no adapters look at it."""
        return self.adapters.instruction_size if hasattr(self, "adapters") else None

    @property
    def adapted_tokens(self) -> int | None:
        """For how many decoded tokens adapters act before the model goes on without (MoGU); None: for all."""
        return self.config.adapters.config.adapted_tokens if self.config.adapted else None

    def without_adapters(self) -> "Decoder":
        """The base, with the same arrays."""
        bare = dataclasses.replace(self.config, adapters=ModelConfig().adapters)
        base, values = Decoder(bare, self.mesh), arrays(self)
        if self.quantized:
            base.quantize_experts()
        return replace(base, {path: values[path] for path in flat(base)})

    def set_layers_apart(self) -> None:
        """Cuts the stacked layers into segments of one repeat each. The arrays are copies, and every path changes.

        For a program that runs the layers over and over: a stack is cut, and copied, each time that it is run.
        """
        apart = []
        for segment in self.segments:
            for r in range(segment.repeats):
                blocks = [jax.tree.map(lambda x, r=r: x[r : r + 1], block) for block in segment.blocks]
                apart.append(SegmentBlocks(blocks, [(ids[r],) for ids in segment.layer_ids]))
        self.segments = nnx.List(apart)

    def init_cache(self, batch: int, max_seq: int) -> dict:
        """An empty decoding cache for `max_seq` tokens: every mixer's and router's own pytree, stacked over repeats."""
        dtype = jnp.dtype(self.config.dtype)

        def one(block, repeats):
            single = block.init_cache(batch, max_seq, dtype)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), single)

        segments = [[one(block, segment.repeats) for block in segment.blocks] for segment in self.segments]
        ngram = self.ngram.init_cache(batch) if self.config.ngram.orders else None
        shared = {name: module.init_cache(batch, max_seq) for name, module in self.shared.items()}
        cache = {"at": jnp.zeros((), jnp.int32), "ngram": ngram, "shared": shared, "segments": segments}
        return cache | ({"first": segments} if self.two_passes else {})

    def blocks(self):
        """(path, stacked block, layer ids) of every block."""
        for s, segment in enumerate(self.segments):
            for p, block in enumerate(segment.blocks):
                yield f"segments.{s}.blocks.{p}", block, segment.layer_ids[p]

    def routed(self):
        """(path, stacked block, layer ids) of every routed block."""
        return (found for found in self.blocks() if found[1].routed)

    def quantize_experts(self) -> bool:
        """Declares the matrices of all routed experts as int8, before there are values. Whether there are any."""
        for _, block, _ in self.routed():
            block.ffn.experts.quantize()
        return self.quantized

    @property
    def quantized(self) -> bool:
        """Whether routed experts hold int8."""
        return any(block.ffn.experts.quantized for _, block, _ in self.routed())

    @property
    def causal(self) -> bool:
        """Whether every router claims that no token depends on later ones; generation makes sense only then."""
        return all(block.causal for _, block, _ in self.blocks())

    @property
    def selects(self) -> bool:
        """Whether there are blocks that only some tokens go through."""
        return any(block.selects for _, block, _ in self.blocks())

    @property
    def competes(self) -> bool:
        """Whether in training tokens compete, for blocks or within them, in a way that looks at later ones."""
        return any(block.competes or block.mixer_competes for _, block, _ in self.blocks())

    @property
    def reads_prompts(self) -> bool:
        """Whether there are blocks that decide by what a prompt is."""
        return any(block.selects and block.selector.retrofits for _, block, _ in self.blocks())

    def as_trained(self) -> "Decoder":
        """The model with the same arrays, its tokens competing as in training: not causal."""
        other = nnx.merge(*nnx.split(self))
        for _, block, _ in other.blocks():
            if block.selects:
                block.as_trained = True
            if block.mixer_competes:
                block.mixer.as_trained = True
        return other

    def from_corpus(self, counts_V: Int[np.ndarray, "V"], domains: Sequence[str]) -> dict[str, np.ndarray]:
        """Initial values by path that follow from the training data: counts of token ids, names of domains."""
        new = {}
        for path, block, ids in self.routed():
            for name, value in block.ffn.from_corpus(counts_V, domains).items():
                new[f"{path}.ffn.{name}"] = np.broadcast_to(value, (len(ids), *value.shape))
        return new

    def after_step(self, stats: dict[str, dict[str, Stat]]) -> dict[str, Array]:
        """New buffer values by path, from the step's statistics per stacked block."""
        new = {}
        for path, block, _ in self.blocks():
            if path in stats:
                values = jax.vmap(lambda block, s: block.after_step(s))(block, stats[path])
                new.update({f"{path}.{name}": value for name, value in values.items()})
        return new

    def refreshed(self, step: Int[Array, ""]) -> dict[str, Array]:
        """New values by path of buffers that follow from parameters, where it is their turn at `step`."""
        new = {}
        for path, block, _ in self.blocks():
            values = jax.vmap(lambda block: block.refreshed(step))(block) if block.refreshes else {}
            new.update({f"{path}.{name}": value for name, value in values.items()})
        return new

    def _embed(self, tokens, positions, cache, dtype):
        x = self.embed(tokens, dtype)
        if self.config.embedding_multiplier != 1.0:
            x = x * self.config.embedding_multiplier
        if not self.config.ngram.orders:
            return x, None
        extra, ngram_cache = self.ngram(tokens, positions, None if cache is None else cache["ngram"], dtype)
        return x + extra, ngram_cache

    def _before_layers(self, ctx: RoutingContext, cache) -> tuple[dict[str, Any], dict[str, Any]]:
        """By router name: what layers get of what they share, and its caches."""
        found = {
            name: module.before_layers(ctx, None if cache is None else cache["shared"][name])
            for name, module in self.shared.items()
        }
        return {name: value for name, (value, _) in found.items()}, {name: new for name, (_, new) in found.items()}

    def _with_adapters(self, shared, inputs, instructions) -> tuple[dict[str, Any], dict[str, Any]]:
        """`shared` and `inputs` with what adapters of all layers have in common."""
        if instructions is not None and instructions.shape[1:] != (self.instruction_size,):
            raise ValueError(
                f"instructions: embeddings {list(instructions.shape)}; adapters {self.config.adapters.name!r} look at "
                f"{f'[B, {self.instruction_size}]' if self.instruction_size else 'none'}"
            )
        if not hasattr(self, "adapters"):
            return shared, inputs
        shared = {**shared, "adapters": self.adapters.first(instructions)}
        return shared, {**inputs, "adapters": self.adapters.per_layer()}

    def _rotary_keys(self) -> set[RotaryKey]:
        keys = {block.mixer.rotary_key for segment in self.segments for block in segment.blocks if block.mixes}
        return keys - {None}

    def _init_carry(self, num_tokens: int) -> dict[str, Any]:
        """The depth carry of each kind of router in the model; layers of another kind leave it alone."""
        carries = {block.ffn.router_name: block.ffn.router.init_carry(num_tokens) for _, block, _ in self.routed()}
        if any(block.selects and block.selector.reads_attention for _, block, _ in self.blocks()):
            carries[DEPTH] = jnp.zeros(num_tokens, jnp.float32)
        return {name: carry for name, carry in carries.items() if carry is not None}

    def flops_per_token(self, context: float, rows_per_token: dict[str, float] | None = None) -> float:
        """Forward FLOPs of one token that sees `context` keys on average. The one formula used everywhere.

        `rows_per_token`: measured expert rows per token of each routed stacked block, where compute is dynamic.
        """
        rows = rows_per_token or {}
        flops = 0.0
        for s, segment in enumerate(self.segments):
            for p, block in enumerate(segment.blocks):
                flops += segment.repeats * block.flops_per_token(context, rows.get(f"segments.{s}.blocks.{p}"))
        if self.two_passes:
            flops = 2 * flops + self.adapters.flops_per_token()
        flops += sum(module.flops_per_token(context) for module in self.shared.values())
        return flops + 2.0 * self.config.hidden_size * self.config.vocab_size


def count_positions(shape, segment_ids, valid) -> Int[Array, "B S"]:
    """How many valid tokens of its own document come before each token."""
    ones = jnp.ones(shape, jnp.int32) if valid is None else valid.astype(jnp.int32)
    before = jnp.cumsum(ones, axis=1) - ones
    if segment_ids is None:
        return before
    opens = jnp.concatenate([jnp.ones_like(ones[:, :1]), jnp.diff(segment_ids, axis=1)], axis=1) != 0
    return before - jax.lax.cummax(jnp.where(opens, before, 0), axis=1)


class Run:
    """One forward pass: what goes from segment to segment."""

    def __init__(self, x, ctx: RoutingContext, view: View, cache, at, inputs):
        self.x, self.ctx, self.view, self.cached, self.at, self.inputs = x, ctx, view, cache, at, inputs
        self.losses, self.layers, self.caches = {}, {}, []

    def run_segment(self, index: int, segment: SegmentBlocks, remat: str) -> None:
        blocks = list(segment.blocks)
        ids = [jnp.asarray(ids, jnp.int32) for ids in segment.layer_ids]
        inputs = [jax.tree.map(lambda a, i=i: a[i], self.inputs) for i in ids]
        caches = None if self.cached is None else self.cached[index]

        def body(carry, xs):
            x, depth = carry
            blocks, ids, inputs, caches = xs
            auxes, new_caches = [], []
            for p, block in enumerate(blocks):
                key = None if self.ctx.key is None else jax.random.fold_in(self.ctx.key, ids[p])
                ctx = self.ctx.replace(layer=ids[p], key=key, carry=depth, inputs=inputs[p])
                cache = None if caches is None else caches[p]
                view = dataclasses.replace(self.view, layer=ids[p])
                x, aux, new, depth = block(x, view, ctx, cache, self.at)
                auxes.append(aux)
                new_caches.append(new)
            return (x, depth), (auxes, new_caches)

        if remat != "none":
            body = jax.checkpoint(body, policy=_REMAT[remat], prevent_cse=False)
        # unrolled layers are one straight line, in which XLA keeps all that is recomputed: no memory is saved
        unroll = min(_UNROLL, segment.repeats) if remat == "none" else 1
        (self.x, depth), (auxes, new_caches) = jax.lax.scan(
            body, (self.x, self.ctx.carry), (blocks, ids, inputs, caches), unroll=unroll
        )
        self.ctx = self.ctx.replace(carry=depth)
        self.caches.append(new_caches)
        for p, aux in enumerate(auxes):
            for name, loss in aux.losses.items():
                self.losses[name] = self.losses.get(name, 0.0) + loss.sum()
            if aux.stats or aux.terms:
                self.layers[f"segments.{index}.blocks.{p}"] = (ids[p], aux)


def per_layer(layers: dict[str, tuple[Array, dict]]) -> list[tuple[int, dict[str, Any]]]:
    """On the host: [(layer id, {statistic: value})] in layer order, from `{path: (ids, stats)}` of arrays."""
    rows = []
    for ids, stats in layers.values():
        values = jax.tree.map(lambda s: s.value(), stats, is_leaf=is_stat)
        rows += [(int(i), {name: value[r] for name, value in values.items()}) for r, i in enumerate(ids)]
    return sorted(rows, key=lambda row: row[0])


def per_layer_terms(layers: dict[str, tuple[Array, Aux]]) -> dict[str, list[Any]]:
    """{term: one array (or pytree of them) per layer that has it, in layer order}, from `ModelAux.layers`."""
    rows = [(int(i), r, aux.terms) for ids, aux in layers.values() for r, i in enumerate(ids)]
    found: dict[str, list[Any]] = {}
    for _, r, terms in sorted(rows, key=lambda row: row[0]):
        for name, value in terms.items():
            found.setdefault(name, []).append(jax.tree.map(lambda x, r=r: x[r], value))
    return found
