"""The selector of a block, and what it does not go with."""

from moe_zoo.core.registry import ConfigError
from moe_zoo.depth.selector import Selector
from moe_zoo.models.config import ModelConfig, is_routed
from moe_zoo.routing.router import Shared


def make_selector(config: ModelConfig, kind: str, ffn) -> Selector:
    """Who goes through a block of that kind. Raises ConfigError if its router looks at all tokens, or the selector at
    attention that is not there.
    """
    if is_routed(kind):
        shared = config.router.cls.make_shared(config.router.config, config.moe().dims(config.hidden_size))
        ahead = shared is not None and type(shared).before_layers is not Shared.before_layers
        if ahead or ffn.router.init_cache(1, 1) is not None or "attention" in ffn.router.requires:
            raise ConfigError(
                f"model.depth: {config.depth.name!r} shows block {kind!r} some of the tokens, and router "
                f"{config.router.name!r} looks at all of them; choose another router"
            )
    attention = config.attention
    there = config.mixer.name, attention.latent.kv_lora_rank, attention.experts.num_experts, attention.sinks
    plain = there == ("attention", 0, 0, False) and kind.partition(":")[0] != "shortcut"
    if config.depth.cls.reads_attention and not plain:
        raise ConfigError(
            f"model.depth: {config.depth.name!r} looks at plain attention; in {kind!r} there is {config.mixer.name!r}, "
            "or latents, experts, sinks or a second block"
        )
    return config.depth.make(config.hidden_size)
