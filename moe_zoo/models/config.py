"""The settings of a decoder, and the little language for its layers.

    layers = "1*dense 26*moe"       DeepSeek-V2-Lite: one dense block, then 26 routed ones
    layers = "6*(dense moe)"        a routed block every second layer
    layers = "28*shortcut"          LongCat-Flash: experts beside two dense blocks (`blocks/shortcut.py`)
    layers = "12*(moe:local moe)"   `local` is a variant: the same settings but for what `variants.local` changes
    layers = "6*(moe moe:attention)"   a mixer's name is the variant with `mixer` changed to it, if no other is declared
    layers = "2*(mixer dense:none)"    a mixer alone, a feed-forward part alone
    layers = "6*(dense dense:mod)"     so is a selector's: every second block takes some of the tokens (`depth`)

Every `n*...` becomes one segment, scanned n times.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from moe_zoo.adapters import ADAPTERS
from moe_zoo.blocks.chain import ChainConfig
from moe_zoo.blocks.moe import MoEConfig
from moe_zoo.core.registry import ConfigError, Registry, nearest
from moe_zoo.core.schema import Choice, build, build_choice, choice, choices, join, overlay, positive, to_dict
from moe_zoo.depth import SELECTORS
from moe_zoo.dispatch import DISPATCHERS
from moe_zoo.experts import EXPERTS
from moe_zoo.layers.attention import AttentionConfig
from moe_zoo.layers.mlp import FeedForwardConfig
from moe_zoo.layers.ngram import NgramConfig
from moe_zoo.layers.norm import NormKind
from moe_zoo.layers.tanh_norm import TanhNormConfig, why_not_predicted
from moe_zoo.losses import LOSSES
from moe_zoo.mixers import MIXERS
from moe_zoo.routing import ROUTERS

#: what a run may train besides a decoder: a name in the settings, and the model's class
MODELS = Registry(
    "model",
    {
        "biformer": "moe_zoo.models.biformer:BiFormer",
        "ponder": "moe_zoo.models.ponder:Ponder",
        "dyn_token_routing_vit": "moe_zoo.models.dyn_token_routing:DynTokenRoutingViT",
    },
    base="moe_zoo.models.classifier:Classifier",
)

KINDS = ("dense", "moe", "shortcut", "mixer")
_WHOLE_MODEL = (
    "vocab_size", "hidden_size", "layers", "ngram", "tie_word_embeddings", "lm_head_bias", "embedding_multiplier",
    "embedding_scale", "logits_scaling", "adapters", "dtype", "remat", "variants",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model. Numbers carry Hugging Face's names.

    `intermediate_size` is the width of dense blocks, `moe_intermediate_size` of one routed expert. `shared_expert_size`
    adds an always-active expert, of the formula `mlp` as dense blocks are, `expert_sum_bias` a bias behind the sum of
    all (JetMoE). `norm_placement` "post" norms what a branch adds instead of what it sees (OLMo 2), "both" both,
    "stream" what it sees and is added to (MiniMax-01), times `skip_multiplier`; embeddings and residual branches are
    multiplied, logits divided by the three numbers that Granite has for it. `tanh_norm`: settings of the norms dyt and
    bhyt; `embedding_scale`: where a learned factor of embeddings begins, which DyT needs, 0 for none.
    `mixer` is what mixes tokens: "attention", with the settings of `attention`, or a recurrent state with its own.
    `chain` repeats the routed layer on its own output (Chain-of-Experts).
    `depth` says which tokens go through a block (mixture of depths), all by default; usually a variant's setting. With
    selectors for finished models (`Selector.retrofits`) they alone are trained.
    `adapters` act beside linear layers; with any, they alone are trained.
    `dtype` is the compute type; parameters, router, softmax and losses are float32. `remat`: what the backward pass
    recomputes: nothing ("none"), all but matrix products ("dots"), or whole blocks ("block").
    """

    #: what it learns from
    batches: ClassVar[str] = "text"

    vocab_size: int = 264
    hidden_size: int = 256
    layers: str = "4*moe"
    intermediate_size: int = 1024
    moe_intermediate_size: int = 512
    num_experts: int = 8
    shared_expert_size: int = 0
    shared_expert_gate: bool = False
    expert_sum_bias: bool = False
    ngram: NgramConfig = NgramConfig()
    attention: AttentionConfig = AttentionConfig()
    mixer: Choice = choice(MIXERS, "attention")
    mlp: FeedForwardConfig = FeedForwardConfig()
    chain: ChainConfig = ChainConfig()
    router: Choice = choice(ROUTERS, "top_k")
    experts: Choice = choice(EXPERTS, "feed_forward")
    dispatch: Choice = choice(DISPATCHERS, "dropless")
    losses: tuple[Choice, ...] = choices(LOSSES, {"load_balance": {"coef": 0.01}, "z_loss": {"coef": 0.001}})
    adapters: Choice = dataclasses.field(
        default_factory=lambda: build_choice(ADAPTERS, "none", ""), metadata={"registry": ADAPTERS, "silent": True}
    )
    depth: Choice = dataclasses.field(
        default_factory=lambda: build_choice(SELECTORS, "none", ""), metadata={"registry": SELECTORS, "silent": True}
    )
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    tanh_norm: TanhNormConfig = dataclasses.field(default_factory=TanhNormConfig, metadata={"silent": True})
    norm_placement: Literal["pre", "post", "both", "stream"] = "pre"
    embedding_multiplier: float = 1.0
    embedding_scale: float = dataclasses.field(default=0.0, metadata={"silent": True})
    residual_multiplier: float = 1.0
    skip_multiplier: float = 1.0
    logits_scaling: float = 1.0
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: Literal["none", "dots", "block"] = "none"
    variants: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def validate(self, path: str) -> None:
        positive(
            self,
            path,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "num_experts",
            "norm_eps",
            "embedding_multiplier",
            "residual_multiplier",
            "skip_multiplier",
            "logits_scaling",
        )
        positive(self, path, "shared_expert_size", "embedding_scale", zero=True)
        if self.shared_expert_gate and not self.shared_expert_size:
            raise ConfigError(f"{join(path, 'shared_expert_gate')}: needs shared_expert_size > 0")
        if self.lm_head_bias and self.tie_word_embeddings:
            raise ConfigError(f"{join(path, 'lm_head_bias')}: needs tie_word_embeddings=false")
        if self.mixer.name == "attention":
            self._validate_attention(path)
        kinds = [kind for segment in self.segments(path) for kind in segment.pattern]
        if any(is_routed(kind) for kind in kinds):
            self._validate_routing(path)
        for kind in kinds:
            variant = self.variant(kind, path)
            if kind.partition(":")[0] == "mixer" and variant.mixer.name == "none":
                raise ConfigError(f"{join(path, 'layers')}: {kind!r} has no mixer, so there is nothing in it")
            if self.adapted and variant.depth.name != "none" and not variant.depth.cls.whole:
                raise ConfigError(
                    f"{join(path, 'adapters')}: see all tokens of a sequence or none; in {kind!r} depth "
                    f"{variant.depth.name!r} takes some"
                )
            if variant.norm == "bhyt":
                why_not_predicted(variant, path)

    def _validate_attention(self, path: str) -> None:
        D, N = self.hidden_size, self.attention.num_attention_heads
        if self.attention.head_dim is None and (D % N or (D // N) % 2):
            raise ConfigError(
                f"{join(path, 'hidden_size')}: {D} over attention.num_attention_heads={N} gives no even head size; "
                "choose sizes that divide, or set attention.head_dim"
            )

    def _validate_routing(self, path: str) -> None:
        router, config = self.router.cls, self.router.config
        if hasattr(config, "validate_for"):
            config.validate_for(self.num_experts, join(path, "router"))
        for part, registry, chosen in [
            ("dispatch", DISPATCHERS, self.dispatch),
            *((f"losses.{c.name}", LOSSES, c) for c in self.losses),
        ]:
            if router.decision not in chosen.cls.decisions:
                takes = " or ".join(d.__name__ for d in chosen.cls.decisions)
                fitting = [n for n in registry.names() if router.decision in registry.get(n).decisions]
                raise ConfigError(
                    f"{join(path, part)}: {chosen.name!r} takes {takes}, "
                    f"but router {self.router.name!r} decides by {router.decision.__name__}; "
                    f"fitting: {', '.join(fitting) or 'none'}"
                )
        for chosen in self.losses:
            if chosen.cls.uses not in router.provides:
                raise ConfigError(
                    f"{join(path, 'losses')}.{chosen.name}: needs the router's {chosen.cls.uses}, and router "
                    f"{self.router.name!r} has none; set model.losses without it"
                )

    def segments(self, path: str = "model") -> tuple["Segment", ...]:
        return parse_layers(self.layers, join(path, "layers"))

    def variant(self, kind: str, path: str = "model") -> "ModelConfig":
        """The settings of one block kind: `moe:local` is these settings changed by `variants["local"]`."""
        base, _, name = kind.partition(":")
        if not name:
            return self
        if name not in self.variants and name in MIXERS:
            return self._changed(base, {"mixer": {"name": name}}, f"{join(path, 'layers')}:{name}")
        if name not in self.variants and name in SELECTORS:
            return self._changed(base, {"depth": {"name": name}}, f"{join(path, 'layers')}:{name}")
        if name not in self.variants:
            parts = ", ".join((*MIXERS.names(), *(n for n in SELECTORS.names() if n not in MIXERS)))
            known = f"{', '.join(self.variants) or 'none declared'}, and mixers and selectors: {parts}"
            raise ConfigError(
                f"{join(path, 'layers')}: unknown variant {name!r}{nearest(name, self.variants)}; known: {known}"
            )
        where, settings = f"{join(path, 'variants')}.{name}", self.variants[name]
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{where}: expected a section with keys, got {settings!r}")
        for key in _WHOLE_MODEL:
            if key in settings:
                raise ConfigError(f"{where}.{key}: belongs to the whole model; a variant cannot change it")
        return self._changed(base, settings, where)

    def _changed(self, base: str, settings: Mapping[str, Any], where: str) -> "ModelConfig":
        changed = {**to_dict(self), "layers": f"1*{base}", "variants": {}}
        return build(ModelConfig, overlay(changed, settings), where)

    @property
    def adapted(self) -> bool:
        """Whether there are adapters, beside a base that is frozen."""
        return self.adapters.name != "none"

    @property
    def retrofit(self) -> str | None:
        """The name of a selector that is trained on a base that is frozen, if there is one."""
        kinds = [kind for segment in self.segments() for kind in segment.pattern]
        chosen = [self.variant(kind).depth for kind in dict.fromkeys(kinds)]
        return next((depth.name for depth in chosen if getattr(depth.cls, "retrofits", False)), None)

    def moe(self) -> MoEConfig:
        return MoEConfig(
            num_experts=self.num_experts,
            intermediate_size=self.moe_intermediate_size,
            vocab_size=self.vocab_size,
            router=self.router,
            experts=self.experts,
            dispatch=self.dispatch,
            losses=self.losses,
            shared=self.mlp,
            shared_size=self.shared_expert_size,
            shared_gate=self.shared_expert_gate,
            sum_bias=self.expert_sum_bias,
            num_heads=self.attention.num_attention_heads,
            head_dim=self.attention.query_size(self.hidden_size),
        )

    @property
    def num_encoder_layers(self) -> int:
        """Layers that come before the decoder's: `EncoderDecoderConfig` has some."""
        return 0

    @property
    def summary(self) -> str:
        """What a run says of it, besides its parameters."""
        return f"router {self.router.name}, {self.num_experts} experts, layers {self.layers}"

    @property
    def num_layers(self) -> int:
        return sum(len(s.pattern) * s.repeats for s in self.segments())


def is_routed(kind: str) -> bool:
    """Whether blocks of this kind have experts."""
    return kind.partition(":")[0] in ("moe", "shortcut")


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` times the blocks of `pattern`, with parameters stacked over the repeats."""

    pattern: tuple[str, ...]
    repeats: int


def parse_layers(text: str, path: str) -> tuple[Segment, ...]:
    """`"1*dense 6*(moe:local moe)"` -> segments. Raises ConfigError naming the part that cannot be read."""
    part = r"(?:(\d+)\s*\*\s*)?(?:\(([^()]*)\)|([\w:]+))"
    segments, at = [], 0
    text = text.strip()
    while at < len(text):
        match = re.compile(part + r"(?:\s+|$)").match(text, at)
        if not match:
            raise ConfigError(f"{path}: cannot read {text[at:]!r}; expected e.g. '1*dense 6*(dense moe)'")
        repeats, group, single = match.groups()
        pattern = tuple((group if group is not None else single).split())
        repeats = int(repeats) if repeats is not None else 1
        if repeats < 1 or not pattern:
            raise ConfigError(f"{path}: {match.group(0).strip()!r} has no layer in it")
        for kind in pattern:
            if kind.partition(":")[0] not in KINDS or kind.endswith(":"):
                raise ConfigError(f"{path}: unknown block {kind!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
        segments.append(Segment(pattern, repeats))
        at = match.end()
    if not segments:
        raise ConfigError(f"{path}: no layers; expected e.g. '4*moe'")
    return tuple(segments)
