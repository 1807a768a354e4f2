"""Which linear layers of a model get an adapter, by name, and how large each one is.

A linear layer is named as its weight, layer by layer: `layers.3.mixer.q`, `layers.3.ffn.w_up`. A pattern (`*`, `?`,
`[01]`) matches the whole name or what stands behind a dot in it: `q`, `mixer.*`, `layers.3.ffn.w_up`.
"""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterable

import numpy as np

from moe_zoo.core.registry import ConfigError, nearest
from moe_zoo.core.schema import join, positive


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer y = x W of a block, stacked over `layers`: the name of its weight below the block, its sizes with
    the logical axes that they lie on, how many layers the model has, and its place among all names that have adapters.
    `bank`: how many experts have one each; 0: it is no expert's.
    """

    name: str
    in_features: int
    out_features: int
    axes: tuple[str | None, str | None]
    layers: tuple[int, ...] = (0,)
    num_layers: int = 1
    place: int = 0
    bank: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight in one layer, with inputs and outputs flat."""
        return (self.bank,) * bool(self.bank) + (self.in_features, self.out_features)

    def names(self) -> list[str]:
        """Its name in every layer of the stack."""
        return [f"layers.{i}.{self.name}" for i in self.layers]


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What all adapters have; names are PEFT's where it has one.

    `target_modules`: patterns over linear layers, each of which must match one; `layers_to_transform`: in these layers
    only. `r` is the rank of one expert; `scale` is `lora_alpha` / r, with `use_rslora` / sqrt(r) (arXiv 2312.03732).
    `rank_pattern`, `alpha_pattern`: other numbers for layers by pattern, the first that matches counts. `lora_dropout`
    acts on what the adapters see, not on the base.
    """

    target_modules: tuple[str, ...] = ("mixer.*",)
    layers_to_transform: tuple[int, ...] | None = None
    r: int = 8
    lora_alpha: float = 16.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)
    lora_dropout: float = 0.0

    def validate(self, path: str) -> None:
        positive(self, path, "r")
        if not self.target_modules:
            raise ConfigError(f"{join(path, 'target_modules')}: empty; expected patterns like 'mixer.q' or 'ffn.*'")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"{join(path, 'lora_dropout')}: expected a number in [0, 1), got {self.lora_dropout}")
        for pattern, rank in self.rank_pattern.items():
            if rank < 1:
                raise ConfigError(f"{join(path, 'rank_pattern')}.{pattern}: expected a rank > 0, got {rank}")

    def targets(self, name: str) -> bool:
        """Whether the linear layer of this per-layer name gets an adapter."""
        inside = self.layers_to_transform is None or layer_of(name) in self.layers_to_transform
        return inside and any(matches(name, pattern) for pattern in self.target_modules)

    def rank(self, name: str) -> int:
        """The rank of one expert there."""
        return _first(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """What an expert's output is multiplied by there."""
        rank = self.rank(name)
        return _first(self.alpha_pattern, name, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def experts(self, name: str, num_layers: int) -> int:
        """How many experts the linear layer of this per-layer name has."""
        return 1

    @property
    def adapted_tokens(self) -> int | None:
        """For how many decoded tokens adapters act when text is generated, before the base goes on alone; None: all."""
        return None

    def scales(self, linear: Linear) -> np.ndarray:
        """f32[layers, E, R]: the factor of every rank of every expert. E and R are the largest of the stack; what a
        layer does not have of them, and a layer that is no target, is zero: it computes nothing and never moves.
        """
        names = linear.names()
        experts = [self.experts(name, linear.num_layers) for name in names]
        out = np.zeros((len(names), max(experts), max(map(self.rank, names))), np.float32)
        for row, name, E in zip(out, names, experts, strict=True):
            if self.targets(name):
                row[:E, : self.rank(name)] = self.scaling(name)
        return out


def _first(patterns: dict, name: str, default):
    return next((value for pattern, value in patterns.items() if matches(name, pattern)), default)


def layer_of(name: str) -> int:
    """The layer of a per-layer name, `layers.3.mixer.q`."""
    return int(name.split(".")[1])


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name, or what stands behind a dot in it."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def check_patterns(config: AdapterConfig, names: Iterable[str], path: str = "model.adapters") -> None:
    """Raises ConfigError for a pattern that matches no linear layer of the model, naming those there are."""
    names = list(names)
    below = sorted({re.sub(r"layers\.\d+\.", "", name) for name in names})
    layers = set(map(layer_of, names))
    if unknown := sorted(set(config.layers_to_transform or ()) - layers):
        raise ConfigError(f"{path}.layers_to_transform: {unknown[0]}; the model has layers 0 to {max(layers)}")
    for key in ("target_modules", "rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(matches(name, pattern) for name in names):
                last = [name.rpartition(".")[2] for name in below]
                # `self_attn.q_proj` is how others call `mixer.q`
                close = nearest(pattern, below) or nearest(pattern.rpartition(".")[2].removesuffix("_proj"), last)
                raise ConfigError(
                    f"{path}.{key}: {pattern!r} matches no linear layer{close}; there are {', '.join(below)}, each "
                    "behind 'layers.N.'"
                )


def linear_names(block, layers: tuple[int, ...]) -> list[str]:
    """The per-layer name of every linear layer of a block that stands for `layers`."""
    return [name for linear in linear_layers(block, layers, 1) for name in linear.names()]


def linear_layers(block, layers: tuple[int, ...], num_layers: int) -> list[Linear]:
    """Every linear layer of a block that is not stacked yet, from what its parts say of themselves (`linears`)."""
    found = []
    ffn = getattr(block, "ffn", None)
    parts = {"mixer": getattr(block, "mixer", None), "ffn": ffn}
    parts |= {f"ffn.{name}": getattr(ffn, name, None) for name in ("shared", "experts")}
    for prefix, part in parts.items():
        for name, inputs in getattr(part, "linears", {}).items():
            if not hasattr(part, name):
                continue
            var = getattr(part, name)
            shape, axes, bank = var.get_value().shape, var.logical_axes, 0
            if prefix == "ffn.experts":
                bank, shape, axes = shape[0], shape[1:], axes[1:]
            sizes = math.prod(shape[:inputs]), math.prod(shape[inputs:])
            where = tuple(layers), num_layers
            found.append(Linear(f"{prefix}.{name}", *sizes, (axes[0], axes[inputs]), *where, bank=bank))
    return found
