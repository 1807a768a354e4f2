"""X-LoRA as PEFT keeps it on disk: settings, the classifier's tensors, and a directory for each LoRA that it mixes.

    adapter_config.json        peft_type XLORA; `adapters`: name -> directory, in the order of its outputs
    adapter_model.safetensors  base_model.internal_xlora_classifier.layers.0.weight [n E, D], .bias [n E]

n is 1, or with `layerwise_scalings` the number of linear layers that have LoRAs, in the model's order. PEFT 0.21.2
opens such a directory and writes another: no classifier, and LoRAs without half of their layers.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from moe_zoo.checkpoints import peft
from moe_zoo.checkpoints.native import CheckpointError

_PREFIX = "base_model.internal_xlora_classifier."
_TENSORS = ("layers.0.weight", "layers.0.bias")

_is_bool = lambda x: type(x) is bool
_number = lambda x: type(x) in (int, float) and math.isfinite(x)
#: settings that ours has by the same name: what PEFT takes where one is absent, and what may stand there
_SETTINGS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "layerwise_scalings": (False, _is_bool, "true or false"),
    "softmax_temperature": (1.0, lambda x: _number(x) and x > 0, "a number > 0"),
    "top_k_lora": (None, lambda x: x is None or type(x) is int and x > 0, "a whole number > 0 or null"),
    "enable_softmax_topk": (False, _is_bool, "true or false"),
    "scaling_pass_value": (0.0, _number, "a number"),
    "global_scaling_weight": (1.0, _number, "a number"),
}
#: what PEFT's classifier could be besides, and is not here
_PLAIN = {"xlora_depth": 1, "enable_softmax": True}


@dataclasses.dataclass(frozen=True)
class PeftXLora:
    """`settings` by our names; `adapters`: the LoRAs' directories; `weight`, `bias` of the classifier."""

    settings: Mapping[str, Any]
    adapters: Sequence[Path]
    weight: Float[np.ndarray, "X D"]
    bias: Float[np.ndarray, "X"]


def read(folder: str | Path) -> PeftXLora:
    """Raises CheckpointError for what is no X-LoRA of ours, lacks tensors, or contradicts itself."""
    path, given = Path(folder) / peft.CONFIG, peft.read_settings(folder)
    for key, plain in _PLAIN.items():
        if given.get(key, plain) != plain:
            raise CheckpointError(f"{path}: {key}={given[key]!r} is not supported; expected {plain!r}")
    settings = {}
    for key, (absent, fits, expected) in _SETTINGS.items():
        settings[key] = given.get(key, absent)
        if not fits(settings[key]):
            raise CheckpointError(f"{path}: {key}: expected {expected}, got {json.dumps(settings[key])[:200]}")
    adapters = given.get("adapters")
    if not isinstance(adapters, dict) or not adapters or not all(isinstance(x, str) for x in adapters.values()):
        raise CheckpointError(f"{path}: adapters: expected directories by name, got {json.dumps(adapters)[:200]}")
    folders = [_folder(Path(folder), name, place) for name, place in adapters.items()]
    weight, bias = _classifier(folder)
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or weight.shape[0] % len(folders):
        raise CheckpointError(
            f"{Path(folder) / peft.WEIGHTS}: a classifier of weight {list(weight.shape)} and bias {list(bias.shape)}, "
            f"over {len(folders)} adapters"
        )
    settings["freeze_experts"] = not given.get("use_trainable_adapters")
    return PeftXLora(settings, folders, weight.astype(np.float32), bias.astype(np.float32))


def _folder(folder: Path, name: str, place: str) -> Path:
    """Where an adapter is: where its settings say, as PEFT takes it, or below the directory, if that was moved."""
    for path in (Path(place), folder / name):
        if os.path.isfile(path / peft.CONFIG):
            return path
    raise CheckpointError(f"{folder / peft.CONFIG}: adapters.{name}: neither {place} nor {folder / name} has a LoRA")


def _classifier(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        tensors = peft.read_tensors(folder, (_PREFIX,))
    except CheckpointError as error:
        if not str(error).endswith("has no tensors"):
            raise
        tensors = {}
    if sorted(tensors) != sorted(_TENSORS):
        has = ", ".join(sorted(tensors)) or "nothing (PEFT 0.21.2 saves no classifier; put its state dict's there)"
        raise CheckpointError(
            f"{Path(folder) / peft.WEIGHTS}: expected {_PREFIX}layers.0.weight and .bias, found {has}"
        )
    return tensors[_TENSORS[0]], tensors[_TENSORS[1]]


def save(folder: str | Path, x: PeftXLora, settings: Mapping[str, Any]) -> None:
    """Writes settings and classifier; the adapters are there already. `settings`: further keys of the former."""
    text = {
        "peft_type": "XLORA", "task_type": "CAUSAL_LM", "inference_mode": True, "hidden_size": x.weight.shape[1],
        "use_trainable_adapters": not x.settings["freeze_experts"], **_PLAIN,
        **{key: x.settings[key] for key in _SETTINGS},
        # PEFT 0.21.2 finds adapters only by their number
        "adapters": {str(e): str(Path(path).absolute()) for e, path in enumerate(x.adapters)},
    }  # fmt: skip
    peft.write(folder, text | dict(settings), dict(zip(_TENSORS, (x.weight, x.bias))), _PREFIX)
