"""The selector of a block, and what it does not go with."""

from moe_zoo.core.registry import ConfigError
from moe_zoo.depth.selector import Selector
from moe_zoo.models.config import ModelConfig, is_routed
from moe_zoo.routing.router import Shared


def make_selector(config: ModelConfig, kind: str, ffn) -> Selector:
    """Who goes through a block of that kind. Raises ConfigError if its router looks at all tokens, or the selector at
    attention that is not there, or a token would compete with those of other sequences beside what is of each.
    """
    if is_routed(kind):
        shared = config.router.cls.make_shared(config.router.config, config.moe().dims(config.hidden_size))
        ahead = shared is not None and type(shared).before_layers is not Shared.before_layers
        if ahead or ffn.router.init_cache(1, 1) is not None or "attention" in ffn.router.requires:
            raise ConfigError(
                f"model.depth: {config.depth.name!r} shows block {kind!r} some of the tokens, and router "
                f"{config.router.name!r} looks at all of them; choose another router"
            )
    selector = config.depth.make(config.hidden_size)
    if selector.over_batch and (found := _by_sequence(config, kind)):
        raise ConfigError(
            f"model.depth: {config.depth.name!r} with best_of='batch' shows block {kind!r} the whole batch as one "
            f"sequence, and {found} looks at each sequence; choose another, or best_of='sequence'"
        )
    attention = config.attention
    there = config.mixer.name, attention.latent.kv_lora_rank, attention.experts.num_experts, attention.sinks
    plain = there == ("attention", 0, 0, False) and kind.partition(":")[0] != "shortcut"
    if config.depth.cls.reads_attention and not plain:
        raise ConfigError(
            f"model.depth: {config.depth.name!r} looks at plain attention; in {kind!r} there is {config.mixer.name!r}, "
            "or latents, experts, sinks or a second block"
        )
    return selector


def _by_sequence(config: ModelConfig, kind: str) -> str | None:
    """What of a block means another thing if sequences are not told apart; None if nothing does."""
    if config.mixer.name == "routed_attention":
        return "model.mixer 'routed_attention'"
    if not is_routed(kind):
        return None
    for part in ("router", "dispatch"):
        if getattr(getattr(config, part).config, "group", None) == "sequence":
            return f"model.{part}.group 'sequence'"
    for loss in config.losses:
        if getattr(loss.config, "over", None) == "sequence" or getattr(loss.config, "sequences", None):
            return f"model.losses.{loss.name} of sequences"
    return None
