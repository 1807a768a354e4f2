"""Our own directories, for what no published family describes: every setting in config.json, safetensors by our names.

    config.json          {"architectures": ["MoeZooForCausalLM"], "model_type": "moe_zoo", "model": {every setting}}
    model*.safetensors   our arrays as they are, one tensor per layer: layers.7.ffn.experts.w_up [E, D, F]

Buffers and what is shared between layers are in it too, so any model of ours opens again as it was, by the same code
that opens what others published. A class of one's own, `"my_module:MyRouter"`, must have been imported before: what is
run is not for a file to decide.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from moe_zoo.checkpoints.hf.family import Family
from moe_zoo.checkpoints.hf.layout import Stored
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, to_dict
from moe_zoo.models import ModelConfig
from moe_zoo.models.encoder_decoder import EncoderDecoderConfig


class _ByOurName(dict):
    """Every name of ours is the tensor's."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Stored:
        return Stored(name)


@dataclasses.dataclass(frozen=True)
class Ours(Family):
    """The family of all models of ours."""

    def read(self, given: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """config.json -> ModelConfig. Raises CheckpointError naming the key."""
        if not isinstance(given.get("model"), Mapping):
            raise CheckpointError(f"{where}: it has no section 'model'")
        for name in _outside(given["model"]):
            module = name.partition(":")[0]
            if module not in sys.modules:
                raise CheckpointError(f"{where}: {name!r} is a class that moe_zoo does not have; import {module} first")
        try:
            return build(EncoderDecoderConfig if "encoder" in given["model"] else ModelConfig, given["model"], "model")
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{where}: {type(error).__name__}: {error}") from error

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """ModelConfig -> config.json."""
        return {"architectures": [self.architectures[0]], "model_type": self.model_type, "model": to_dict(config)}


def _outside(tree: Mapping[str, Any]) -> Iterator[str]:
    """Every `module:Class` that the settings name."""
    for key, value in tree.items():
        for name in (key, value if key == "name" else None):
            if isinstance(name, str) and ":" in name:
                yield name
        if isinstance(value, Mapping):
            yield from _outside(value)


OURS = Ours(
    model_type="moe_zoo",
    architectures=("MoeZooForCausalLM",),
    keys=(),
    parts=(),
    fixed={},
    layer=_ByOurName(),
    whole=_ByOurName(),
    prefix="layers.{layer}.",
    encoder_layer=_ByOurName(),
    encoder_prefix="encoder.layers.{layer}.",
)
