"""LoRA as PEFT keeps it on disk: adapter_config.json and adapter_model.safetensors, in and out.

Tensors are `base_model.model.MODULE.lora_A.weight` [r, in], `.lora_B.weight` [out, r] and, of DoRA,
`.lora_magnitude_vector` [out], where MODULE is the linear layer's path in the published model. Of a parameter in
`target_parameters`, the stacked weights of E experts, they are [E r, in] and [out, r E] under the path of the module
that has it; where several of one module are targeted, those declared earlier have a `.base_layer` more each. What PEFT
writes and a LoRA of ours cannot be (biases, whole trained modules, embeddings) is an error that names it.
"""

import collections
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_zoo.checkpoints.hf.safetensors import NAMES, Files, read_header
from moe_zoo.checkpoints.hf.safetensors import write as write_file
from moe_zoo.checkpoints.native import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: what parameters of experts can be called, as their classes declare them: PEFT wraps the first first
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
#: of tensors' names; the second is how PEFT calls the adapters of an X-LoRA
_PREFIXES = ("base_model.model.", "base_model.lora_model.model.")
_INNER = ".base_layer"
_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")

#: settings whose other values change what the files mean, and the values that do not
_PLAIN = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
}


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """One linear layer's update: y += scale (x A^T) B^T, with `magnitude` scaled as DoRA is. `experts`: how many share
    the tensors, 0 where it is no parameter of experts.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    scale: float
    magnitude: np.ndarray | None = None
    experts: int = 0

    @property
    def rank(self) -> int:
        return self.a.shape[0] // max(self.experts, 1)


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
        parts = tensors.setdefault(match[1], {})
        if match[2] in parts:
            raise CheckpointError(f"{folder / WEIGHTS}: {match[1]!r} has two {match[2]}")
        parts[match[2]] = array
    parameters = _parameters(tensors, settings.get("target_parameters") or (), folder / WEIGHTS)
    modules = {}
    for module, parts in sorted(tensors.items()):
        name = parameters.get(module, module)
        modules[name] = _module(name, parts, settings, folder / WEIGHTS, module in parameters)
    return PeftLora(settings, modules, bool(settings.get("use_rslora")), bool(settings.get("use_dora")))


def _parameters(modules: Iterable[str], targets: Sequence[str], where: Path) -> dict[str, str]:
    """The path that tensors are under -> that of the parameter which they are of, where they are a parameter's."""
    depths: dict[str, dict[int, str]] = {}
    for module in modules:
        base = module
        while base.endswith(_INNER):
            base = base.removesuffix(_INNER)
        depths.setdefault(base, {})[(len(module) - len(base)) // len(_INNER)] = module
    found = {}
    for base, at in depths.items():
        names = [f"{base}.{name}" for name in PARAMETERS]
        targeted = [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]
        if not targeted and set(at) == {0}:
            continue
        if set(at) != set(range(len(targeted))):
            raise CheckpointError(
                f"{where}: {base!r} has tensors of {len(at)} parameters; target_parameters name {len(targeted)} of it"
            )
        found |= {at[depth]: name for depth, name in enumerate(reversed(targeted))}
    return found


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


def read_tensors(folder: str | Path, prefixes: Sequence[str] = _PREFIXES) -> dict[str, np.ndarray]:
    """Views of adapter_model.safetensors, by what is behind the prefix. Raises CheckpointError."""
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():
        pickle = (Path(folder) / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{weights} is missing{' (adapter_model.bin is a pickle, which is never read here)' * pickle}"
        )
    files = Files(read_header(weights))
    if not files.tensors:
        raise CheckpointError(f"{weights} has no tensors")
    found = {}
    for name, tensor in files.tensors.items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            raise CheckpointError(
                f"{weights}: tensor {name!r} is of no adapter: expected a name that begins {prefixes[0]!r}"
            )
        if "F" not in NAMES[tensor.dtype]:
            raise CheckpointError(f"{tensor.where} is {NAMES[tensor.dtype]}; expected floating-point numbers")
        found[name.removeprefix(prefix)] = np.asarray(files[name])
    return found


def _check_settings(settings: Mapping[str, Any], path: Path) -> None:
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {settings.get('peft_type')!r} is not supported; expected 'LORA'")
    for key, plain in _PLAIN.items():
        if settings.get(key, plain[0]) not in plain:
            raise CheckpointError(f"{path}: {key}={settings[key]!r:.200} is not supported; expected {plain[0]!r}")
    for key, value in settings.items():
        if key.endswith("_config") and value:
            raise CheckpointError(f"{path}: {key} is set, which changes the base model or the adapter; not supported")
    number = lambda x: type(x) in (int, float) and 0 < x < 1e30
    rank = lambda x: type(x) is int and x > 0
    patterns = lambda fits: lambda x: isinstance(x, dict) and all(map(fits, x.values())) and all(map(_regular, x))
    for key, fits, expected in (
        ("r", rank, "a whole number > 0"),
        ("lora_alpha", number, "a number > 0"),
        ("rank_pattern", patterns(rank), "whole numbers > 0 by regular expression"),
        ("alpha_pattern", patterns(number), "numbers > 0 by regular expression"),
        ("use_rslora", lambda x: type(x) is bool, "true or false"),
        ("use_dora", lambda x: type(x) is bool, "true or false"),
        ("target_parameters", _are_experts, f"a list of experts' weights, names that end in {', '.join(PARAMETERS)}"),
    ):
        if settings.get(key) is not None and not fits(settings[key]):
            raise CheckpointError(f"{path}: {key}: expected {expected}, got {json.dumps(settings[key])[:200]}")


def _regular(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except (re.error, RecursionError, OverflowError):
        return False


def _are_experts(names: Any) -> bool:
    is_one = lambda name: isinstance(name, str) and name.rpartition(".")[2] in PARAMETERS
    return isinstance(names, list) and all(map(is_one, names))


def _module(
    module: str, parts: dict[str, np.ndarray], settings: Mapping[str, Any], where: Path, stacked: bool
) -> LoraModule:
    lacks = [key for key in ("lora_A", "lora_B") if key not in parts]
    if lacks:
        raise CheckpointError(f"{where}: {module!r} has no {lacks[0]}")
    a, b, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
    rank = of_pattern(settings.get("rank_pattern"), module, _given(settings, "r"))
    alpha = float(of_pattern(settings.get("alpha_pattern"), module, _given(settings, "lora_alpha")))
    experts = a.shape[0] // rank if stacked and a.ndim else 0
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank * (experts if stacked else 1) > 0:
        raise CheckpointError(
            f"{where}: {module!r} has A {list(a.shape)} and B {list(b.shape)}; the settings make its rank {rank}"
            + " of each expert" * stacked
        )
    if bool(settings.get("use_dora")) != (magnitude is not None):
        raise CheckpointError(
            f"{where}: {module!r} has {'a' if magnitude is not None else 'no'} lora_magnitude_vector, and use_dora is "
            f"{json.dumps(bool(settings.get('use_dora')))}"
        )
    if magnitude is not None and magnitude.size != b.shape[0]:
        raise CheckpointError(
            f"{where}: {module!r} has B {list(b.shape)} and lora_magnitude_vector {list(magnitude.shape)}"
        )
    return LoraModule(a, b, alpha, scaling(alpha, rank, bool(settings.get("use_rslora"))), magnitude, experts)


def _given(settings: Mapping[str, Any], key: str) -> Any:
    return 8 if settings.get(key) is None else settings[key]


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def alpha_of(scale: float, rank: int, use_rslora: bool) -> float:
    """The shortest alpha that has this scale, which is known in float32."""
    alpha = scale * (math.sqrt(rank) if use_rslora else rank)
    short = (float(f"{alpha:.{digits}g}") for digits in range(1, 17))
    same = lambda x: np.float32(scaling(x, rank, use_rslora)) == np.float32(scale)
    return next(filter(same, short), alpha)


def of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern, a regular expression, that is the module's path or its end, as PEFT matches."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def save(folder: str | Path, adapter: PeftLora, layer_of: Mapping[str, tuple[int, str]], num_layers: int) -> None:
    """Writes the directory. `layer_of`: path -> (layer, path below it) of everything that could have an adapter, for
    settings that are short.

    Settings of `adapter` that do not follow from its modules are written as they are. Raises CheckpointError with the
    system's words when the disk says no; then what was there before is as it was.
    """
    text = {**_DEFAULTS, **adapter.settings, **_settings(adapter, layer_of, num_layers)}
    tensors = {}
    for name, m in adapter.modules.items():
        module = _tensors_of(name, adapter.modules) if m.experts else name
        tensors[f"{module}.lora_A.weight"] = m.a
        tensors[f"{module}.lora_B.weight"] = m.b
        if m.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = m.magnitude
    write(folder, text, tensors)


def _tensors_of(parameter: str, modules: Mapping[str, LoraModule]) -> str:
    """The path that tensors of a parameter of experts are under: inside of the ones that are declared later."""
    base, _, name = parameter.rpartition(".")
    outer = [later for later in PARAMETERS[PARAMETERS.index(name) + 1 :] if f"{base}.{later}" in modules]
    return base + _INNER * len(outer)


def write(
    folder: str | Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], prefix: str = _PREFIXES[0]
) -> None:
    """A directory of these settings and tensors, by what is behind the prefix. Raises CheckpointError."""
    folder = Path(folder)
    temporary = folder / f".saving-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        entries = [(prefix + name, array.dtype, array.shape) for name, array in sorted(tensors.items())]
        write_file(temporary / WEIGHTS, entries, lambda name: tensors[name.removeprefix(prefix)])
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
    plain, stacked = ([n for n, m in modules.items() if bool(m.experts) == is_stacked] for is_stacked in (False, True))
    targets, layers = _targets(plain, layer_of)
    return {
        "target_modules": targets,
        "target_parameters": _target_parameters(stacked, layer_of),
        "layers_to_transform": None if layers is None or len(layers) == num_layers else layers,
        "r": rank,
        "lora_alpha": number(alpha),
        "rank_pattern": {exact(name): m.rank for name, m in modules.items() if m.rank != rank},
        "alpha_pattern": {exact(name): number(m.alpha) for name, m in modules.items() if m.alpha != alpha},
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
    }


def _targets(modules: Sequence[str], layer_of: Mapping[str, tuple[int, str]]) -> tuple[list[str], list[int] | None]:
    """(target_modules, the layers that they are in): paths below the layer where all layers have the same ones."""
    below: dict[str, set[int]] = {}
    for module in modules:
        layer, path = layer_of[module]
        below.setdefault(path, set()).add(layer)
    layers = next(iter(below.values()), set())
    if layers and all(found == layers for found in below.values()):
        return sorted(below), sorted(layers)
    return sorted(modules), None


def _target_parameters(names: Sequence[str], layer_of: Mapping[str, tuple[int, str]]) -> list[str] | None:
    """Paths below the layer of what all layers have that can; PEFT looks at no `layers_to_transform` here."""
    short: dict[str, set[str]] = {}
    for name, (_, path) in layer_of.items():
        short.setdefault(path, set()).add(name)
    return sorted({path if short[path] <= set(names) else n for n in names for path in [layer_of[n][1]]}) or None
