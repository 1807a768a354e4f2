"""From settings to the modules that a decoder is made of: blocks, their selectors, what layers share."""

from flax import nnx

from moe_zoo.blocks.block import Block
from moe_zoo.blocks.chain import Chain, ChainConfig
from moe_zoo.blocks.moe import MoE
from moe_zoo.blocks.selective import SelectiveBlock, SelectiveShortcut
from moe_zoo.blocks.shortcut import Shortcut
from moe_zoo.core.context import PROVIDABLE
from moe_zoo.core.param import flat
from moe_zoo.core.registry import ConfigError
from moe_zoo.depth.attention import DEPTH
from moe_zoo.layers.mlp import MLP
from moe_zoo.layers.norm import make_norm
from moe_zoo.mixers.mixer import LearningMixer
from moe_zoo.models.config import ModelConfig, is_routed
from moe_zoo.models.selecting import make_selector
from moe_zoo.routing.router import Shared


def shared_modules(config: ModelConfig) -> dict[str, Shared]:
    """What the routers of all layers share, by router name."""
    found = {}
    for kind in (kind for segment in config.segments() for kind in segment.pattern):
        variant = config.variant(kind)
        if is_routed(kind) and variant.router.name not in found:
            dims = variant.moe().dims(variant.hidden_size)
            found[variant.router.name] = variant.router.cls.make_shared(variant.router.config, dims)
    return {name: module for name, module in found.items() if module is not None}


def shared_selectors(config: ModelConfig) -> dict[str, Shared]:
    """What the selectors of all layers share, by the name that they find it by."""
    kinds = (kind for segment in config.segments() for kind in segment.pattern)
    chosen = [config.variant(kind).depth for kind in kinds]
    made = (depth.cls.make_shared(depth.config, config.hidden_size) for depth in chosen)
    found = [module for module in made if module is not None]
    sizes = [[var.get_value().shape for var in flat(module).values()] for module in found]
    if any(other != sizes[0] for other in sizes):
        raise ConfigError(f"model.variants: selectors that share a router give it different sizes: {sizes}")
    return {DEPTH: found[0]} if found else {}


def make_block(config: ModelConfig, kind: str, whole: ModelConfig) -> Block:
    """One abstract block of `kind` ("dense", "moe", "shortcut", "mixer", with an optional ":variant")."""
    D = config.hidden_size
    # residual branches start at 1/sqrt(2L) of their size, so the stream does not grow with depth (GPT-2)
    out_scale = (2 * whole.num_layers) ** -0.5
    dense = lambda: MLP(config.mlp, hidden_size=D, intermediate_size=config.intermediate_size, out_scale=out_scale)
    if is_routed(kind):
        sizes = {"hidden_size": D, "out_scale": out_scale}
        plain = config.chain == ChainConfig()
        ffn = MoE(config.moe(), **sizes) if plain else Chain(config.moe(), config.chain, **sizes)
        missing = [name for name in ffn.router.requires if name not in PROVIDABLE]
        if missing:
            raise ConfigError(f"model.router: {config.router.name!r} needs {missing}, which this model cannot provide")
        if "attention" in ffn.router.requires and config.mixer.name != "attention":
            raise ConfigError(
                f"model.router: {config.router.name!r} looks at the attention below it, but in {kind!r} the mixer is "
                f"{config.mixer.name!r}"
            )
        if "attention" in ffn.router.requires and (
            config.attention.experts.num_experts or config.attention.output_gate
        ):
            raise ConfigError(
                f"model.router: {config.router.name!r} looks at attention, which is not there for it with experts or a "
                "gate in it"
            )
    elif kind.partition(":")[0] == "mixer":
        ffn = None
    else:
        ffn = dense()
    norm = lambda place, predicted=None: make_norm(config.norm, D, config.norm_eps, place, config.tanh_norm, predicted)
    predicted = None if config.mixer.name == "none" else out_scale
    parts = lambda ffn: dict(
        mixer=config.mixer.cls.build(
            config.mixer.config, config.attention, hidden_size=D, out_scale=out_scale, num_layers=whole.num_layers
        ),
        ffn=ffn,
        mixer_norm=norm("mixer"),
        ffn_norm=norm("ffn", predicted),
        placement=config.norm_placement,
        after=(norm("mixer"), norm("ffn")) if config.norm_placement == "both" else (),
        multiplier=config.residual_multiplier,
        skip=config.skip_multiplier,
    )
    selector = {} if config.depth.name == "none" else {"selector": make_selector(config, kind, ffn)}
    if kind.partition(":")[0] == "shortcut":
        if issubclass(config.mixer.cls, LearningMixer):
            raise ConfigError(f"model.mixer: {config.mixer.name!r} learns, and {kind!r} has two; choose dense or moe")
        made = SelectiveShortcut if selector else Shortcut
        return made(dense=dense(), second=Block(**parts(dense())), **parts(ffn), **selector)
    return (SelectiveBlock if selector else Block)(**parts(ffn), **selector)


def last_norm(config: ModelConfig) -> nnx.Module:
    """The norm behind all layers."""
    return make_norm(config.norm, config.hidden_size, config.norm_eps, "last", config.tanh_norm)
