"""What a family of published models is: the classes it goes by, its config.json, its tensor names.

    Family(model_type, architectures, keys, parts, fixed, layer, whole)

`keys` pair one number of theirs with one of ours, `parts` read and write what is no single number (rotary positions,
the order of layers), `fixed` is what all models of the family have in common. Forwards they make a `ModelConfig`,
backwards a config.json; `mismatches` are the settings that do not survive the way there and back.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.safetensors import Tensor
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import Choice, build, set_path, to_dict
from moe_zoo.models import EncoderDecoderConfig, ModelConfig

_REQUIRED = object()
_ABSENT = object()

#: what training settings may differ in without changing what the model computes
_NO_MATTER = ("losses", "dispatch", "dtype", "remat", "router.init_std", "router.bias_update_rate")
_MOE_ONLY = ("moe_intermediate_size", "num_experts", "shared_expert_size", "shared_expert_gate", "router", "experts")


@dataclasses.dataclass(frozen=True)
class Key:
    """`theirs` in config.json is `ours` in ModelConfig (dotted; several paths hold the same value).

    `default`: what their class takes where config.json is silent. `values`: their spelling -> ours. `also`: other names
    that their classes have had for it.
    """

    theirs: str
    ours: tuple[str, ...]
    default: Any = _REQUIRED
    values: tuple[tuple[Any, Any], ...] = ()
    also: tuple[str, ...] = ()

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        value = next((given[name] for name in (self.theirs, *self.also) if name in given), self.default)
        if value is _REQUIRED:
            raise CheckpointError(f"it has no {self.theirs!r}")
        if self.values:
            known = dict(self.values)
            if value not in known:
                raise CheckpointError(f"{self.theirs}: {value!r} is not supported; known: {', '.join(map(str, known))}")
            value = known[value]
        return dict.fromkeys(self.ours, value)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        try:
            value = look_up(config, self.ours[0])
        except AttributeError:  # another router than the family's: the way back will say so
            return {}
        for theirs, ours in self.values:
            if ours == value:
                return {self.theirs: theirs}
        return {self.theirs: value}


class Part(Protocol):
    """What no single key can say."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """config.json -> {our dotted path: value}."""
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """ModelConfig -> keys of config.json."""
        ...


@dataclasses.dataclass(frozen=True)
class Only:
    """Keys whose other values this family does not support: `{key: (supported values, the first is the default)}`."""

    allowed: Mapping[str, tuple]

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        for key, values in self.allowed.items():
            if given.get(key, values[0]) not in values:
                raise CheckpointError(
                    f"{key}: {given[key]!r} is not supported; expected {' or '.join(map(str, values))}"
                )
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {key: values[0] for key, values in self.allowed.items()}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of published models. `layer` and `whole`: our per-layer (whole) parameter name -> where it is stored.

    `unused`: patterns of tensors that are in the files but in no model of ours. `extra_layers`: layers behind the last
    predict tokens further ahead; they are left out. `unpack` makes tensors of what is stored as several. `written_as`:
    the family that such models are saved as, where not all of the files is read. `derived`: tensors that follow from
    config.json, which are written because their class asks for them, and not read. `of_layers(kinds)`, where a layer of
    theirs is several of ours: for each of ours the number of theirs, and what its names begin with in `layer`.
    `settings`: what config.json becomes. Of an encoder-decoder `layer` and `prefix` are the decoder's, `encoder_layer`
    and `encoder_prefix` the encoder's.
    """

    model_type: str
    architectures: tuple[str, ...]
    keys: tuple[Key, ...]
    parts: tuple[Part, ...]
    fixed: Mapping[str, Any]
    layer: Mapping[str, Stored]
    whole: Mapping[str, Stored]
    unused: tuple[str, ...] = ()
    extra_layers: bool = False
    unpack: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    prefix: str = "model.layers.{layer}."
    written_as: "Family | None" = None
    derived: Callable[[ModelConfig, Mapping[str, Any]], dict[str, np.ndarray]] = lambda config, given: {}
    of_layers: Callable[[list[str]], list[tuple[int, str]]] = lambda kinds: [(i, "") for i in range(len(kinds))]
    settings: type[ModelConfig] = ModelConfig
    encoder_layer: Mapping[str, Stored] = dataclasses.field(default_factory=dict)
    encoder_prefix: str = ""

    def places(self, config: ModelConfig) -> list[tuple[Mapping[str, Stored], str, str]]:
        """Per layer of ours, an encoder's first: its table, the published prefix of its tensors, and what its names
        begin with in the table.
        """
        encoder = [self.encoder_prefix.format(layer=i) for i in range(config.num_encoder_layers)]
        decoder = [(self.prefix.format(layer=i), begin) for i, begin in self.of_layers(expand(config))]
        return [(self.encoder_layer, prefix, "") for prefix in encoder] + [(self.layer, *place) for place in decoder]

    def read(self, given: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """config.json -> ModelConfig. Raises CheckpointError naming the key."""
        values: dict[str, Any] = {"router": {"name": "top_k"}, "experts": {"name": "feed_forward"}}
        try:
            for part in (*self.keys, *self.parts):
                for path, value in part.read(given).items():
                    set_path(values, path, value)
            for path, value in self.fixed.items():
                set_path(values, path, value)
            return build(self.settings, values, "model")
        except (ConfigError, CheckpointError) as error:
            raise CheckpointError(f"{where}: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{where}: {type(error).__name__}: {error}") from error

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """ModelConfig -> config.json."""
        given = {"architectures": [self.architectures[0]], "model_type": self.model_type}
        for part in (*self.keys, *self.parts):
            given |= part.write(config)
        return given

    def mismatches(self, config: ModelConfig) -> list[str]:
        """Settings that a model of this family cannot have, each as `path=value`. Raises CheckpointError if no model
        of the family comes near them.
        """
        if type(config) is not self.settings:
            raise CheckpointError(f"{self.architectures[0]} is another kind of model than {type(config).__name__} says")
        mine, theirs = essential(config), essential(self.read(self.write(config)))
        keys = sorted(mine.keys() | theirs.keys())
        differ = [key for key in keys if mine.get(key, _ABSENT) != theirs.get(key, _ABSENT)]
        # an encoder has what the decoder has, and its own
        differ = [key for key in differ if not key.startswith("encoder.") or key.removeprefix("encoder.") not in differ]
        return [f"model.{key}={mine.get(key)} (there {theirs.get(key)})" for key in differ]


def essential(config: ModelConfig) -> dict[str, Any]:
    """Dotted path -> value of all settings that change what the model computes."""
    kinds = {kind.partition(":")[0] for segment in config.segments() for kind in segment.pattern}
    skipped = _NO_MATTER + (() if kinds & {"dense", "shortcut"} else ("intermediate_size",))
    skipped += () if kinds & {"moe", "shortcut"} else _MOE_ONLY
    if not kinds & {"dense", "shortcut"} and not ("moe" in kinds and config.shared_expert_size):
        skipped += ("mlp",)
    values = flatten(to_dict(config))
    values["layers"] = " ".join(expand(config))
    values["attention.num_key_value_heads"] = (
        config.attention.num_key_value_heads or config.attention.num_attention_heads
    )
    values["attention.head_dim"] = (
        config.attention.head_dim or config.hidden_size // config.attention.num_attention_heads
    )
    if not config.attention.latent.kv_lora_rank:
        values = {key: value for key, value in values.items() if not key.startswith("attention.latent.")}
    if not config.attention.experts.num_experts:
        values = {key: value for key, value in values.items() if not key.startswith("attention.experts.")}
    if config.attention.qk_norm == "none" and not config.attention.latent.kv_lora_rank:
        values.pop("attention.norm_eps")
    if config.attention.qk_norm == "none":
        values.pop("attention.qk_norm_kind")
    values["gate_on"] = getattr(config.dispatch.config, "gate_on", "output")
    if places := getattr(config.dispatch.config, "expert_capacity", None):
        values["expert_capacity"] = f"{places} per {config.dispatch.config.group}"
    if not config.ngram.orders:
        values = {key: value for key, value in values.items() if not key.startswith("ngram.")}
    if isinstance(config, EncoderDecoderConfig):
        encoder = {f"encoder.{name}": value for name, value in essential(config.encoder_config()).items()}
        values = {name: value for name, value in values.items() if not name.startswith("encoder.")} | encoder
    return {k: v for k, v in values.items() if not any(k == s or k.startswith(f"{s}.") for s in skipped)}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def look_up(config: ModelConfig, path: str) -> Any:
    """The value at a dotted path of built settings."""
    for name in path.split("."):
        config = getattr(config.config if isinstance(config, Choice) and name != "name" else config, name)
    return config


def expand(config: ModelConfig) -> list[str]:
    """The kind of every layer, in order."""
    return [kind for segment in config.segments() for _ in range(segment.repeats) for kind in segment.pattern]


def compress(kinds: list[str]) -> str:
    """The inverse: the shortest `layers` of one repeated pattern, or of runs."""
    if not kinds:
        raise CheckpointError("num_hidden_layers: expected at least 1")
    n = len(kinds)
    for size in range(1, min(8, n // 2) + 1):
        if n % size == 0 and kinds == kinds[:size] * (n // size):
            return f"{n // size}*({' '.join(kinds[:size])})" if size > 1 else f"{n}*{kinds[0]}"
    runs: list[list] = []
    for kind in kinds:
        if runs and runs[-1][1] == kind:
            runs[-1][0] += 1
        else:
            runs.append([1, kind])
    return " ".join(f"{count}*{kind}" for count, kind in runs)


def key(theirs: str, *ours: str, **more) -> Key:
    """`key("hidden_size")`: the same name on both sides."""
    return Key(theirs, ours or (theirs,), **more)


WHOLE = {
    "embed.table": Stored("model.embed_tokens.weight"),
    "norm.scale": Stored("model.norm.weight"),
    "head.kernel": linear("lm_head.weight"),
}
