"""LoRA as PEFT keeps it on disk: adapter_config.json and adapter_model.safetensors, in and out.

Tensors are `base_model.model.MODULE.lora_A.weight` [r, in], `.lora_B.weight` [out, r] and, of DoRA,
`.lora_magnitude_vector` [out], where MODULE is the linear layer's path in the published model. What PEFT writes and a
LoRA of ours cannot be (biases, whole trained modules, embeddings, experts' 3-d weights) is an error that names it.
"""

import collections
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_zoo.checkpoints.hf.safetensors import Files, read_header
from moe_zoo.checkpoints.hf.safetensors import write as write_file
from moe_zoo.checkpoints.native import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")

#: settings whose other values change what the files mean, and the values that do not
_PLAIN = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
}


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """One linear layer's update: y += scale (x A^T) B^T, with `magnitude` scaled as DoRA is."""

    a: np.ndarray
    b: np.ndarray
    alpha: float
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclasses.dataclass(frozen=True)
class PeftLora:
    """An adapter's directory: its settings as written, and its modules by path in the published model."""

    settings: Mapping[str, Any]
    modules: Mapping[str, LoraModule]
    use_rslora: bool = False
    use_dora: bool = False


def read(folder: str | Path) -> PeftLora:
    """Raises CheckpointError when it is no LoRA, has what a LoRA of ours cannot have, or contradicts itself."""
    folder, settings = Path(folder), read_settings(folder)
    _check_settings(settings, folder / CONFIG)
    tensors: dict[str, dict[str, np.ndarray]] = {}
    for name, array in read_tensors(folder).items():
        match = _KEY.fullmatch(name)
        if not match:
            raise CheckpointError(f"{folder / WEIGHTS}: tensor {name!r} is no part of a LoRA of linear layers")
        tensors.setdefault(match[1], {})[match[2]] = array
    modules = {module: _module(module, parts, settings, folder / WEIGHTS) for module, parts in sorted(tensors.items())}
    return PeftLora(settings, modules, bool(settings.get("use_rslora")), bool(settings.get("use_dora")))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json of any kind of adapter. Raises CheckpointError."""
    path = Path(folder) / CONFIG
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {str(error)[:200]}; expected a PEFT adapter's settings"
        ) from error
    return settings


def read_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """Views of adapter_model.safetensors, by name below the model. Raises CheckpointError."""
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():
        pickle = (Path(folder) / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{weights} is missing{' (adapter_model.bin is a pickle, which is never read here)' * pickle}"
        )
    files = Files(read_header(weights))
    if not files.tensors:
        raise CheckpointError(f"{weights} has no tensors")
    for name in files.tensors:
        if not name.startswith(_PREFIX):
            raise CheckpointError(
                f"{weights}: tensor {name!r} is of no adapter: expected a name that begins {_PREFIX!r}"
            )
    return {name.removeprefix(_PREFIX): np.asarray(files[name]) for name in files.tensors}


def _check_settings(settings: Mapping[str, Any], path: Path) -> None:
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {settings.get('peft_type')!r} is not supported; expected 'LORA'")
    for key, plain in _PLAIN.items():
        if settings.get(key, plain[0]) not in plain:
            raise CheckpointError(f"{path}: {key}={settings[key]!r} is not supported; expected {plain[0]!r}")
    for key, value in settings.items():
        if key.endswith("_config") and value:
            raise CheckpointError(f"{path}: {key} is set, which changes the base model or the adapter; not supported")
    for key in ("r", "lora_alpha"):
        if type(settings.get(key, 8)) not in (int, float):
            raise CheckpointError(f"{path}: {key}: expected a number, got {settings[key]!r}")


def _module(module: str, parts: dict[str, np.ndarray], settings: Mapping[str, Any], where: Path) -> LoraModule:
    lacks = [key for key in ("lora_A", "lora_B") if key not in parts]
    if lacks:
        raise CheckpointError(f"{where}: {module!r} has no {lacks[0]}")
    a, b, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
    rank = of_pattern(settings.get("rank_pattern"), module, settings.get("r", 8))
    alpha = float(of_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8)))
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        raise CheckpointError(
            f"{where}: {module!r} has A {list(a.shape)} and B {list(b.shape)}; the settings make its rank {rank}"
        )
    if bool(settings.get("use_dora")) != (magnitude is not None):
        raise CheckpointError(
            f"{where}: {module!r} has {'a' if magnitude is not None else 'no'} lora_magnitude_vector, and use_dora is "
            f"{json.dumps(bool(settings.get('use_dora')))}"
        )
    return LoraModule(a, b, alpha, scaling(alpha, rank, bool(settings.get("use_rslora"))), magnitude)


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern, a regular expression, that is the module's path or its end, as PEFT matches."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def save(folder: str | Path, adapter: PeftLora, layer_of: Mapping[str, tuple[int, str]], num_layers: int) -> None:
    """Writes the directory. `layer_of`: module path -> (layer, path below it), for settings that are short.

    Settings of `adapter` that do not follow from its modules are written as they are. Raises CheckpointError with the
    system's words when the disk says no; then what was there before is as it was.
    """
    text = {**_DEFAULTS, **adapter.settings, **_settings(adapter, layer_of, num_layers)}
    tensors = {}
    for module, m in adapter.modules.items():
        tensors[f"{module}.lora_A.weight"] = m.a
        tensors[f"{module}.lora_B.weight"] = m.b
        if m.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = m.magnitude
    write(folder, text, tensors)


def write(folder: str | Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """A directory of these settings and tensors, by name below the model. Raises CheckpointError."""
    folder = Path(folder)
    temporary = folder / f".saving-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        entries = [(_PREFIX + name, array.dtype, array.shape) for name, array in sorted(tensors.items())]
        write_file(temporary / WEIGHTS, entries, lambda name: tensors[name.removeprefix(_PREFIX)])
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        for name in (WEIGHTS, CONFIG):
            os.replace(temporary / name, folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


#: what PEFT asks for and nothing of ours decides
_DEFAULTS = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": None,
    "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "lora_dropout": 0.0, "init_lora_weights": True,
    "modules_to_save": None, "exclude_modules": None, "layers_pattern": None,
}  # fmt: skip


def _settings(adapter: PeftLora, layer_of: Mapping[str, tuple[int, str]], num_layers: int) -> dict[str, Any]:
    """The shortest settings that name these modules, ranks and alphas."""
    modules = adapter.modules
    usual = lambda values: collections.Counter(values).most_common(1)[0][0]
    rank, alpha = usual([m.rank for m in modules.values()]), usual([m.alpha for m in modules.values()])
    number = lambda value: int(value) if float(value).is_integer() else value
    exact = re.escape
    targets, layers = _targets(modules, layer_of)
    return {
        "target_modules": targets,
        "layers_to_transform": None if layers is None or len(layers) == num_layers else layers,
        "r": rank,
        "lora_alpha": number(alpha),
        "rank_pattern": {exact(name): m.rank for name, m in modules.items() if m.rank != rank},
        "alpha_pattern": {exact(name): number(m.alpha) for name, m in modules.items() if m.alpha != alpha},
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
    }


def _targets(modules: Mapping[str, Any], layer_of: Mapping[str, tuple[int, str]]) -> tuple[list[str], list[int] | None]:
    """(target_modules, the layers that they are in): paths below the layer where all layers have the same ones."""
    below: dict[str, set[int]] = {}
    for module in modules:
        layer, path = layer_of[module]
        below.setdefault(path, set()).add(layer)
    layers = next(iter(below.values()))
    if all(found == layers for found in below.values()):
        return sorted(below), sorted(layers)
    return sorted(modules), None
