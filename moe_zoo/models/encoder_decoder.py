"""An encoder that reads one sequence both ways, and a decoder that writes another and looks at what was read.

B batch, S tokens of the text that is written, L of the source that is read, D model, V vocabulary, N heads.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.blocks.block import Block
from moe_zoo.blocks.cross import CrossBlock
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import stack
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, join, overlay, positive, to_dict
from moe_zoo.layers.attention import AttentionConfig
from moe_zoo.layers.cross_attention import CrossAttention, PairView, SelfAttention
from moe_zoo.layers.distance import RelativeBias, sines
from moe_zoo.layers.embedding import Embedding, Head
from moe_zoo.layers.norm import make_norm
from moe_zoo.models.config import MODELS, ModelConfig
from moe_zoo.models.decoder import (
    Decoder,
    ModelAux,
    Run,
    SegmentBlocks,
    count_positions,
)
from moe_zoo.models.making import last_norm, make_block, shared_modules

#: what attention can be set to here; all else stays at its default
_ATTENTION = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "qkv_bias", "output_bias", "softmax_scale", "norm_eps",
    "rotary_dim", "rope_theta",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(ModelConfig):
    """The settings of the decoder, and what is other in the encoder: `encoder` changes them, `layers` at the least.

    `positions`: "relative", a learned bias of the scores by distance in `relative_buckets`, of which the last is for
    `relative_max_distance` and more (T5), or "sinusoidal", sines added to the embeddings, where the first token has
    the position `position_offset`. Nothing is rotated (`attention.rotary_dim` 0).
    """

    encoder: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    positions: Literal["relative", "sinusoidal"] = "relative"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    position_offset: int = 0

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "position_offset", zero=True)
        if self.relative_buckets < 4 or self.relative_buckets % 2 or self.relative_max_distance < self.relative_buckets:
            raise ConfigError(
                f"{join(path, 'relative_buckets')}: {self.relative_buckets} up to relative_max_distance="
                f"{self.relative_max_distance}; expected an even number from 4 up to that distance"
            )
        if self.positions == "sinusoidal" and (self.hidden_size % 2 or self.hidden_size < 4):
            raise ConfigError(f"{join(path, 'hidden_size')}: {self.hidden_size}; sines need an even number from 4 on")
        encoder = self.encoder_config(path)
        _check_attention(self.attention, join(path, "attention"))
        _check_attention(encoder.attention, join(path, "encoder.attention"))
        self._check_parts(path, encoder)

    def _check_parts(self, path: str, encoder: ModelConfig) -> None:
        for name, usual in (("mixer", "attention"), ("adapters", "none"), ("depth", "none")):
            if getattr(self, name).name != usual or getattr(encoder, name).name != usual:
                raise ConfigError(f"{join(path, name)}: an encoder-decoder goes with {usual!r} only")
        for name, usual in (("norm_placement", "pre"), ("variants", {}), ("skip_multiplier", 1.0)):
            if getattr(self, name) != usual:
                raise ConfigError(f"{join(path, name)}: an encoder-decoder goes with {usual!r} only")
        if self.ngram.orders:
            raise ConfigError(f"{join(path, 'ngram')}: an encoder-decoder goes without")
        if "bhyt" in (self.norm, encoder.norm):
            raise ConfigError(f"{join(path, 'norm')}: 'bhyt' predicts over self-attention alone; 'bhyt_star' measures")
        for name in ("vocab_size", "hidden_size", "dtype", "embedding_multiplier", "embedding_scale"):
            if getattr(encoder, name) != getattr(self, name):
                raise ConfigError(f"{join(path, 'encoder')}.{name}: belongs to the whole model")
        kinds = {kind for part in (self, encoder) for segment in part.segments(path) for kind in segment.pattern}
        if not kinds <= {"dense", "moe"}:
            raise ConfigError(f"{join(path, 'layers')}: expected dense or moe, got {', '.join(sorted(kinds))}")

    def encoder_config(self, path: str = "model") -> ModelConfig:
        """The settings of the encoder as those of a model of its own."""
        own = {field.name for field in dataclasses.fields(ModelConfig)}
        settings = {name: value for name, value in to_dict(self).items() if name in own}
        return build(ModelConfig, overlay(settings, self.encoder), join(path, "encoder"))

    @property
    def num_encoder_layers(self) -> int:
        return self.encoder_config().num_layers


class Encoder(nnx.Module):
    """Blocks that see all of their sequence, and a norm."""

    def __init__(self, config: ModelConfig, whole: EncoderDecoderConfig):
        self.config = config
        self.segments = _segments(config, 0, _encoder_block)
        self.norm = last_norm(config)
        if whole.positions == "relative":
            self.relative = _relative(whole, config, both_ways=True)


class EncoderDecoder(Decoder):
    """Built abstractly, as a decoder is. The encoder's layers have the first numbers, the decoder's the next."""

    def __init__(self, config: EncoderDecoderConfig, mesh: Mesh | None = None):
        """`mesh`: where it will run, if on more than one device."""
        D, encoder = config.hidden_size, config.encoder_config()
        self.config, self.mesh = config, mesh
        for part in (config, encoder):
            if shared_modules(part):
                raise ConfigError(f"model.router: {part.router.name!r} is one for all layers, of a decoder alone")
        self.shared = nnx.Dict({})
        self.embed = Embedding(config.vocab_size, D, scale=config.embedding_scale)
        self.encoder = Encoder(encoder, config)
        self.segments = _segments(config, encoder.num_layers, _decoder_block)
        self.norm = last_norm(config)
        if config.positions == "relative":
            self.relative = _relative(config, config, both_ways=False)
        if not config.tie_word_embeddings:
            self.head = Head(config.vocab_size, D, config.lm_head_bias)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        source: Int[Array, "B L"] | None = None,
        source_valid: Bool[Array, "B L"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        valid: Bool[Array, "B S"] | None = None,
        cache: dict | None = None,
        train: bool = False,
        step: Int[Array, ""] | None = None,
        key: Array | None = None,
        record: bool = False,
        last: bool = False,
    ) -> tuple[Float[Array, "B S V"], ModelAux, dict | None]:
        """Logits (float32) of the decoder's `tokens`, Aux of both parts, and the new cache.

        `source`: what the encoder reads; a cache (`init_cache`) has read it already. The rest is as in `Decoder`:
        `valid` and `source_valid` False mark padding, with a cache the S tokens continue the cached ones, `record` puts
        every token's routing into the Aux' terms, `last` gives logits of the last token only.
        """
        if (source is None) == (cache is None):
            raise ValueError("expected a source, or a cache, which has read it; got both or neither")
        how = dict(train=train, step=step, key=key, record=record)
        memory, losses, layers, at = None, {}, {}, None
        if cache is None:
            memory, read = self.encode(source, source_valid, **how)
            losses, layers = read.losses, read.layers
        else:
            at, source_valid = cache["at"], cache["source_valid"]
        S = tokens.shape[1]
        if positions is None:
            positions = count_positions(tokens.shape, None, valid) if at is None else at + jnp.arange(S)[None]
            positions = jnp.broadcast_to(positions, tokens.shape)
        keys = S if cache is None else cache["segments"][0][0]["mixer"]["k"].shape[-2]
        bias = self.relative(S, keys, 0 if at is None else at) if hasattr(self, "relative") else None
        view = PairView(positions, None, valid, bias=bias, memory=memory, memory_valid=source_valid)
        ctx = self._context(tokens, positions, valid, at=at, **how)
        ctx = ctx.replace(carry=self._carry(self.segments, tokens.size))
        state = self._layers(self._embedded(tokens, positions), ctx, view, cache, "segments", {})
        for name, loss in state.losses.items():
            losses[name] = losses.get(name, 0.0) + loss
        logits = self._logits(state.x[:, -1:] if last else state.x)
        new_cache = None
        if cache is not None:
            new_cache = {"at": at + S, "source_valid": source_valid, "segments": state.caches}
        return logits, ModelAux(losses, layers | state.layers), new_cache

    def encode(
        self,
        source: Int[Array, "B L"],
        valid: Bool[Array, "B L"] | None = None,
        *,
        train: bool = False,
        step: Int[Array, ""] | None = None,
        key: Array | None = None,
        record: bool = False,
    ) -> tuple[Float[Array, "B L D"], Run]:
        """What the decoder looks at, and the run that made it, with its losses and layers."""
        B, L = source.shape
        encoder, positions = self.encoder, count_positions(source.shape, None, valid)
        bias = encoder.relative(L, L) if hasattr(encoder, "relative") else None
        view = PairView(positions, None, valid, bias=bias, ahead=True)
        ctx = self._context(source, positions, valid, train=train, step=step, key=key, record=record)
        ctx = ctx.replace(carry=self._carry(encoder.segments, source.size))
        state = Run(self._embedded(source, positions), ctx, view, None, None, {})
        for index, segment in enumerate(encoder.segments):
            state.run_segment(index, segment, self.config.remat if train else "none")
        state.layers = {f"encoder.{path}": aux for path, aux in state.layers.items()}
        return encoder.norm(state.x), state

    def init_cache(
        self,
        batch: int,
        max_seq: int,
        source: Int[Array, "B L"] | None = None,
        source_valid: Bool[Array, "B L"] | None = None,
    ) -> dict:
        """A decoding cache for `max_seq` tokens. The encoder runs here, once; every layer's keys and values of what it
        made are in the cache.
        """
        if source is None or source.shape[0] != batch:
            shape = None if source is None else list(source.shape)
            raise ValueError(f"source: expected ids [{batch}, L], which the cache begins with; got {shape}")
        empty = super().init_cache(batch, max_seq)
        memory, _ = self.encode(source, source_valid)
        for segment, caches in zip(self.segments, empty["segments"], strict=True):
            for block, cache in zip(segment.blocks, caches, strict=True):
                cache["cross"] = jax.vmap(lambda block: block.cross.keys_values(memory))(block)
        valid = jnp.ones(source.shape, bool) if source_valid is None else source_valid
        return {"at": empty["at"], "source_valid": valid, "segments": empty["segments"]}

    def blocks(self):
        """(path, stacked block, layer ids) of every block, the encoder's first."""
        for s, segment in enumerate(self.encoder.segments):
            for p, block in enumerate(segment.blocks):
                yield f"encoder.segments.{s}.blocks.{p}", block, segment.layer_ids[p]
        yield from super().blocks()

    @property
    def causal(self) -> bool:
        """Whether no token that is written depends on later ones: the encoder's routers have no part in that."""
        blocks = (block for segment in self.segments for block in segment.blocks)
        return all(block.ffn.router.causal for block in blocks if block.routed)

    def flops_per_token(self, context: float, rows_per_token: dict[str, float] | None = None) -> float:
        """Forward FLOPs of one token that is written and one that is read."""
        rows, flops = rows_per_token or {}, super().flops_per_token(context, rows_per_token)
        for path, block, ids in self.blocks():
            if path.startswith("encoder."):
                flops += len(ids) * block.flops_per_token(context, rows.get(path))
        return flops

    def _embedded(self, tokens, positions):
        x = self._embed(tokens, positions, None, jnp.dtype(self.config.dtype))[0]
        if self.config.positions == "relative":
            return x
        return x + sines(positions + self.config.position_offset, self.config.hidden_size).astype(x.dtype)

    def _logits(self, x):
        x = self.norm(x)
        logits = self.embed.attend(x) if self.config.tie_word_embeddings else self.head(x)
        logits = logits / self.config.logits_scaling if self.config.logits_scaling != 1.0 else logits
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def _context(self, tokens, positions, valid, at=None, **how) -> RoutingContext:
        B, S = tokens.shape
        flat = lambda x: None if x is None else x.reshape(B * S)
        return RoutingContext(
            batch=B, seq=S, mesh=self.mesh, valid=flat(valid), positions=flat(positions), token_ids=flat(tokens), at=at,
            **how,
        )  # fmt: skip

    def _carry(self, segments, num_tokens: int) -> dict[str, Any]:
        """The depth carry of the routers of one part, by their names."""
        routed = [block.ffn for segment in segments for block in segment.blocks if block.routed]
        carries = {ffn.router_name: ffn.router.init_carry(num_tokens) for ffn in routed}
        return {name: carry for name, carry in carries.items() if carry is not None}


def make_model(config, mesh: Mesh | None = None):
    """The model that has these settings, abstract: a decoder, with an encoder before it, or one of `MODELS`."""
    if not isinstance(config, ModelConfig):
        return MODELS.get(config.name)(config, mesh)
    return (EncoderDecoder if isinstance(config, EncoderDecoderConfig) else Decoder)(config, mesh)


def _check_attention(attention: AttentionConfig, path: str) -> None:
    usual = AttentionConfig()
    for field in dataclasses.fields(attention):
        if field.name not in _ATTENTION and getattr(attention, field.name) != getattr(usual, field.name):
            raise ConfigError(
                f"{join(path, field.name)}: encoder-decoders have plain attention, which can be set: "
                f"{', '.join(_ATTENTION)}"
            )
    if attention.rotary_dim != 0:
        raise ConfigError(f"{join(path, 'rotary_dim')}: expected 0, encoder-decoders rotate nothing")


def _relative(whole: EncoderDecoderConfig, part: ModelConfig, both_ways: bool) -> RelativeBias:
    return RelativeBias(
        part.attention.num_attention_heads,
        buckets=whole.relative_buckets,
        max_distance=whole.relative_max_distance,
        both_ways=both_ways,
    )


def _segments(config: ModelConfig, first: int, make) -> nnx.List:
    """Stacked blocks of one part, its layers numbered from `first`."""
    made = []
    for segment in config.segments():
        P, R = len(segment.pattern), segment.repeats
        ids = [tuple(first + r * P + p for r in range(R)) for p in range(P)]
        blocks = [make(config, kind) for kind in segment.pattern]
        made.append(SegmentBlocks([stack(block, layers) for block, layers in zip(blocks, ids)], ids))
        first += P * R
    return nnx.List(made)


def _encoder_block(config: ModelConfig, kind: str) -> Block:
    return Block(**_parts(config, kind))


def _decoder_block(config: ModelConfig, kind: str) -> CrossBlock:
    D = config.hidden_size
    cross = CrossAttention(config.attention, hidden_size=D, out_scale=_out_scale(config))
    cross_norm = make_norm(config.norm, D, config.norm_eps, "mixer", config.tanh_norm)
    return CrossBlock(cross=cross, cross_norm=cross_norm, **_parts(config, kind))


def _parts(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Of a block that any decoder has, with attention as it is here."""
    block = make_block(config, kind, config)
    attention = SelfAttention(config.attention, hidden_size=config.hidden_size, out_scale=_out_scale(config))
    return dict(
        mixer=attention, ffn=block.ffn, mixer_norm=block.mixer_norm, ffn_norm=block.ffn_norm,
        multiplier=config.residual_multiplier,
    )  # fmt: skip


def _out_scale(config: ModelConfig) -> float:
    """As in `make_block`."""
    return (2 * config.num_layers) ** -0.5
