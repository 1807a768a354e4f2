"""What one run is: an entry of `configs/lora` beside the base, at a rank that trains as much as the reference does.

The trained parameters of all stages count, those of a mixture's experts that tasks train alone included. A rank is a
coarse thing, so some of the linear layers get one rank more than the others.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_zoo.adapters import ADAPTERS
from moe_zoo.adapters.targets import AdapterConfig
from moe_zoo.compare.adapters.recipe import Recipe
from moe_zoo.compare.entries import Entry, digest, learned, load_entries
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, build_choice, overlay, to_dict
from moe_zoo.models import Decoder, ModelConfig
from moe_zoo.models.counting import count_parameters
from moe_zoo.train.config import Config, config_file_value, config_from_dict, differences, load_config

#: the entry that the others are matched to, and the folder of configs that entries are in
REFERENCE, FOLDER = "lora", "lora"
#: how runs of one group were matched
MATCH = "trained"
_CLOSE = 0.05


@dataclasses.dataclass(frozen=True)
class Scale:
    """`name` is a preset of every config, whose `data.source` names the tasks; `held_out` come on top and are never
    trained. `questions`: of each task's test split that are scored. `base`: the config of the base, trained for
    `base_steps` on text and the tasks' questions without their names. `strict`: refuses what cannot be matched.
    """

    name: str
    held_out: tuple[str, ...]
    questions: int
    base: str
    base_steps: int
    strict: bool = True


SCALES = {
    scale.name: scale
    for scale in (
        Scale("tiny", ("copy",), 8, "dense:tiny", 2, strict=False),
        Scale("cpu", ("copy", "swap_reverse"), 64, "dense:cpu", 1200),
    )
}


@dataclasses.dataclass(frozen=True)
class Match:
    """How an entry was made equal: the rank of most linear layers, how many of them have one more, what is trained in
    all, here and by the reference.
    """

    rank: int
    more: int
    value: int
    target: int

    def says(self) -> str:
        """In one line."""
        more = f" ({self.rank + 1} beside {self.more} kinds of linear layers)" if self.more else ""
        return f"rank {self.rank}{more}, {self.value:,} trained, {self.value / self.target - 1:+.2%} of {REFERENCE}'s"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run that may be made. `config`: with the base's decoder and the adapters at their rank."""

    entry: Entry
    scale: Scale
    seed: int
    config: Config
    recipe: Recipe
    match: Match
    config_hash: str
    cost_hash: str
    fits: tuple[str, ...] = (MATCH,)

    @property
    def held_in(self) -> tuple[str, ...]:
        """The tasks that are trained."""
        return held_in(self.config)

    def key(self, fingerprint: str) -> str:
        """What a run is known by in the store, given the fingerprint of base and data."""
        return f"{self.entry.name}-{self.scale.name}-{self.seed}-{self.config_hash}-{fingerprint}"


def entries(names: str = "") -> dict[str, Entry]:
    """Every config of `configs/lora` with a claim, by name."""
    return load_entries(names, FOLDER)


def held_in(config: Config) -> tuple[str, ...]:
    """The tasks that a config's data source names."""
    name, _, tasks = config.data.source.partition(":")
    if name != "tasks" or not tasks:
        raise ConfigError(f"data.source: expected the tasks to train, 'tasks:copy,kind', got {config.data.source!r}")
    return tuple(tasks.split(","))


def base_config(scale: Scale, source: str) -> Config:
    """Of the decoder that all adapters of a scale act beside; `source`: of its text."""
    tree = load_config(scale.base).to_dict()
    tree["data"] |= {"source": source, "eval_stride": None}
    tree["train"] |= {"steps": scale.base_steps, "minutes": None}
    tree["checkpoint"] |= {"every": max(1, scale.base_steps // 4)}
    tree["log"] |= {"every": max(1, scale.base_steps // 60), "eval_every": max(1, scale.base_steps // 3),
                    "tensorboard": False}  # fmt: skip
    return config_from_dict(tree)


def plan(entry: Entry, scale: Scale, seed: int) -> Plan:
    """The settings of one run. Raises ConfigError if the entry changes what all must share, or cannot be matched."""
    config, reference = _configured(f"{entry.path}:{scale.name}", scale), _configured(f"lora/lora:{scale.name}", scale)
    if changed := differences(_shared(reference), _shared(config)):
        raise ConfigError(
            f"{entry.path}:{scale.name}: {'; '.join(changed[:4])}: a comparison needs these to be {REFERENCE}'s"
        )
    recipe = config_file_value(entry.path, "RECIPE") or Recipe()
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{entry.path}: RECIPE must be a Recipe of moe_zoo.compare, got {recipe!r}")
    target = trained(reference, Recipe())
    config, match = _matched(config, recipe, target)
    if scale.strict and abs(match.value / target - 1) > _CLOSE:
        raise ConfigError(f"{entry.path}: no rank trains as much as {REFERENCE}, {target:,}: {match.says()}")
    tree = config.to_dict()
    tree["train"]["seed"] = tree["data"]["seed"] = seed
    config = config_from_dict(tree)
    how = {"held_out": scale.held_out, "base": learned(base_config(scale, "")), "steps": scale.base_steps}
    return Plan(
        entry, scale, seed, config, recipe, match,
        digest(learned(config) | {"recipe": dataclasses.asdict(recipe)}), digest(_shared(config) | how),
    )  # fmt: skip


def _configured(spec: str, scale: Scale) -> Config:
    base = base_config(scale, "")
    return load_config(spec, (), {"model": to_dict(base.model), "data": {"tokenizer": base.data.tokenizer}})


def _shared(config: Config) -> dict[str, Any]:
    """What all entries must have in common: all but the adapters, and factors on the rates of single parameters."""
    tree = learned(config)
    tree["model"] = {name: value for name, value in tree["model"].items() if name != "adapters"}
    tree["optim"] = {name: value for name, value in tree["optim"].items() if name != "lr_scales"}
    tree["data"] = tree["data"] | {"tasks": list(held_in(config))}
    return tree


# -------------------------------------------------------------------------------------------------- settings of a stage


def common(config: Config) -> dict[str, Any]:
    """Of the configured adapters what every adapter has: targets, ranks, alpha."""
    own = {field.name for field in dataclasses.fields(AdapterConfig)}
    return {key: value for key, value in to_dict(config.model.adapters).items() if key in own}


def staged(config: Config, settings: Mapping[str, Any], *, alone: bool = True) -> Config:
    """The config with these adapters: of a stage that tasks train `alone`, or changes to those that are there."""
    adapters = common(config) | dict(settings) if alone else overlay(to_dict(config.model.adapters), settings)
    tree = config.to_dict()
    model = build(ModelConfig, tree["model"] | {"adapters": adapters}, "model")
    patterns = tuple(p for p in config.optim.lr_scales if not alone)
    return dataclasses.replace(config, model=model, optim=dataclasses.replace(config.optim, lr_scales=patterns))


def trained(config: Config, recipe: Recipe) -> int:
    """Parameters that all stages train. Stages in `then` go on from each other, so the largest of them counts."""
    tasks = len(held_in(config))
    count = lambda changed: count_parameters(Decoder(changed.model))["trainable"]
    alone = sum(count(staged(config, settings)) for settings in recipe.alone)
    joined = config if recipe.join is None else staged(config, {**recipe.join, "num_experts": tasks})
    then = [count(staged(joined, changes, alone=False)) for changes in recipe.then]
    return tasks * alone + max(then, default=0)


# ------------------------------------------------------------------------------------------------------------- matching


def _matched(config: Config, recipe: Recipe, target: int) -> tuple[Config, Match]:
    """The rank, and how many kinds of linear layers have one more, that come closest to `target`; both count evenly."""
    if config.model.adapters.config.rank_pattern:
        raise ConfigError("model.adapters.rank_pattern: ranks are found by the comparison; leave it out")
    kinds = sorted({name for _, block, _ in Decoder(config.model).blocks() for name in block.each_adapter()})
    # from the configured rank, since some cannot have less than so many
    first = config.model.adapters.config.r
    one, two = (trained(_ranked(config, rank), recipe) for rank in (first, first + 1))
    # with pools to draw from (MoS), a higher rank trains no more
    rank = first if one == two else max(1, first + math.floor((target - one) / (two - one)))
    found = []
    for r, more in ((first, 0), (rank + 1, 0), *((rank, more) for more in range(len(kinds)))):
        try:
            changed = _ranked(config, r, kinds[:more])
        except ConfigError:
            continue  # a rank that this adapter cannot have, or ranks that differ; the configured one is always there
        found.append((changed, Match(r, more, trained(changed, recipe), target)))
    return min(found, key=lambda pair: abs(pair[1].value - target))


def _ranked(config: Config, rank: int, more: list[str] | tuple[str, ...] = ()) -> Config:
    """The config with adapters of this rank, one more beside the linear layers `more`, each at the scale that the
    config gives a rank.
    """
    old = config.model.adapters.config
    changed = {"r": rank, "rank_pattern": {name: rank + 1 for name in more}}
    adapters = to_dict(config.model.adapters) | changed
    new = build_choice(ADAPTERS, adapters, "model.adapters").config
    # SMoRA's experts are single ranks, whatever r is
    each = old.lora_alpha / old.rank("layers.0")
    adapters["lora_alpha"] = each * new.rank("layers.0")
    adapters["alpha_pattern"] = {name: each * new.rank(f"layers.0.{name}") for name in more}
    choice = build_choice(ADAPTERS, adapters, "model.adapters")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, adapters=choice))
