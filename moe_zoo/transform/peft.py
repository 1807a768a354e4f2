"""PEFT's LoRA adapters onto a loaded model and from it: one as it is, several as the experts of a mixture."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_zoo.adapters import ADAPTERS
from moe_zoo.checkpoints import CheckpointError, hf, peft, peft_poly
from moe_zoo.checkpoints.hf.family import expand
from moe_zoo.checkpoints.hf.layout import Stored
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError, nearest
from moe_zoo.core.schema import build_choice
from moe_zoo.inference.loaded import Loaded
from moe_zoo.models.decoder import Decoder
from moe_zoo.transform.adapters import adapted_blocks, add_adapters, as_lora


def load_adapters(
    loaded: Loaded,
    paths: str | Path | Sequence[str | Path],
    adapters: str | Mapping[str, Any] = "lora",
    *,
    seed: int = 0,
) -> Loaded:
    """The model with PEFT's LoRAs beside its linear layers: one directory for `lora`, or one for each expert of the
    mixture that `adapters` names; what routes is drawn with `seed`. A directory of PEFT's Poly or MHR is `poly`.

    A linear layer that one of them leaves out has no such expert; smaller ranks are filled up with zeros. Raises
    CheckpointError for a directory that does not fit the model, ConfigError for a mixture that does not fit them.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    modules = linear_modules(loaded)
    if len(paths) == 1 and peft.read_settings(paths[0]).get("peft_type") == "POLY":
        return _load_poly(loaded, _checked(peft_poly.read(paths[0]), modules, paths[0]), modules)
    found = [peft.read(path) for path in paths]
    for one, path in zip(found, paths, strict=True):
        _checked(one.modules, modules, path)
    settings = _settings(found, modules, {"name": adapters} if isinstance(adapters, str) else dict(adapters), paths)
    plain = add_adapters(loaded, settings, seed=seed)
    return dataclasses.replace(plain, model=P.replace(plain.model, P.arrays(plain.model) | _values(plain, found)))


def save_adapter(loaded: Loaded, path: str | Path, expert: int = 0) -> None:
    """Writes an expert of the model's adapters as a directory that PEFT opens, or Poly as a whole; of other mixtures'
    gates PEFT has no files.

    Raises ConfigError if there are no adapters, or this one is no plain LoRA.
    """
    if not loaded.config.adapted:
        raise ConfigError("the model has no adapters to save; see transform.add_adapters")
    loaded = as_lora(loaded)
    modules, config = linear_modules(loaded), loaded.config.adapters.config
    of_name = {module.name: path for path, module in modules.items()}
    folder = str(loaded.published.folder) if loaded.published else None
    if loaded.config.adapters.name == "poly":
        return _save_poly(loaded, path, of_name, {"base_model_name_or_path": folder})
    found, rslora, dora = {}, config.use_rslora, getattr(config, "use_dora", False)
    for block_path, block, layers in adapted_blocks(loaded.model):
        for name, adapter in block.each_adapter().items():
            if name not in block.adapters:
                raise ConfigError(f"{name!r}: LoRA beside routed experts is not written for PEFT; merge it instead")
            if expert >= adapter.num_experts:
                raise ConfigError(f"expert: {expert}, of {adapter.num_experts}")
            w = P.arrays(loaded.model)[f"{block_path}.{name}"]
            for row, layer in enumerate(layers):
                module = _module(adapter, row, expert, rslora, w[row])
                if module is not None:
                    found[of_name[f"layers.{layer}.{name}"]] = module
    if not found:
        raise ConfigError(f"expert {expert} acts beside no linear layer")
    settings = {"base_model_name_or_path": folder, "lora_dropout": config.lora_dropout}
    layer_of = {path: (modules[path].layer, modules[path].below) for path in found}
    peft.save(path, peft.PeftLora(settings, found, rslora, dora), layer_of, loaded.config.num_layers)


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer of ours, and where the published model has it. `name`: ours, per layer; `layer`, `below`: theirs,
    and the path below it.
    """

    name: str
    layer: int
    below: str
    stored: Stored


def linear_modules(loaded: Loaded) -> dict[str, Module]:
    """Path in the published model -> linear layer, of all whose weight is a tensor of its own there."""
    plain = dataclasses.replace(loaded.config, adapters=build_choice(ADAPTERS, "none", "adapters"))
    family = hf.choose(plain, loaded.published.family if loaded.published else None)
    found, theirs = {}, family.of_layers(expand(plain))
    for names in P.layer_names(Decoder(plain)).values():
        for name in names:
            match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
            layer, begin = theirs[int(match[1])] if match else (0, "")
            stored = family.layer.get(begin + match[2]) if match else None
            if stored is None or stored.form != "linear" or stored.parts > 1 or stored.per_expert or stored.batched:
                continue
            below = stored.name.removesuffix(".weight")
            found[family.prefix.format(layer=layer) + below] = Module(name, layer, below, stored)
    return found


def _checked(found: Mapping[str, Any], modules: Mapping[str, Module], path) -> Mapping[str, Any]:
    for name in found:
        if name not in modules:
            raise CheckpointError(
                f"{path}: the model has no linear layer {name!r}{nearest(name, modules)} whose weight is a tensor of "
                "its own"
            )
    return found


def _load_poly(loaded: Loaded, found: Mapping[str, peft_poly.PolyModule], modules: Mapping[str, Module]) -> Loaded:
    """PEFT's Poly, whose scale is 1 / r."""
    tasks, h, S = next(iter(found.values())).logits.shape
    rank = next(iter(found.values())).a.shape[1]
    settings = {"name": "poly", "num_tasks": tasks, "num_splits": h, "num_skills": S, "r": rank, "lora_alpha": 1.0}
    made = add_adapters(loaded, settings | {"target_modules": [modules[path].name for path in found]})
    of_name = {modules[path].name: module for path, module in found.items()}
    values = P.arrays(made.model)
    for path, block, layers in adapted_blocks(made.model):
        for name in block.adapters:
            for key in ("a", "b", "logits"):
                old = values[f"{path}.adapters.{name}.{key}"]
                array = np.zeros(old.shape, np.float32)
                for row, layer in enumerate(layers):
                    if (module := of_name.get(f"layers.{layer}.{name}")) is not None:
                        array[row] = getattr(module, key)
                values[f"{path}.adapters.{name}.{key}"] = _placed(array, old)
    return dataclasses.replace(made, model=P.replace(made.model, values))


def _save_poly(loaded: Loaded, path, of_name: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    found = {}
    for _, block, layers in adapted_blocks(loaded.model):
        for name, adapter in block.adapters.items():
            if len(set(map(adapter.config.rank, adapter.linear.names()))) > 1 or adapter.dims[1] != adapter.config.r:
                raise ConfigError("PEFT's Poly has one rank everywhere; this model's rank_pattern says otherwise")
            for row, layer in enumerate(layers):
                one = {key: np.asarray(array[row], np.float32) for key, array in P.arrays(adapter).items()}
                if one["scale"].any():
                    # theirs is 1 / r: alpha goes into B
                    b = one["b"] * np.float32(_round(one["scale"].flat[0] * adapter.config.r))
                    found[of_name[f"layers.{layer}.{name}"]] = peft_poly.PolyModule(one["a"], b, one["logits"])
    peft_poly.save(path, found, settings)


def _settings(found, modules: Mapping[str, Module], settings: dict[str, Any], paths) -> dict[str, Any]:
    """`settings` with what the files decide: targets, ranks, alphas."""
    cls = ADAPTERS.get(settings.get("name", ""), "adapters.name")
    if settings["name"] == "lora":
        if len(found) != 1:
            raise ConfigError(f"adapters: 'lora' is one adapter, got {len(found)} directories; name a mixture for them")
        settings |= {"use_rslora": found[0].use_rslora, "use_dora": found[0].use_dora}
    elif not getattr(cls, "takes_loras", False):
        raise ConfigError(f"adapters: the experts of {settings['name']!r} are no LoRAs of their own")
    else:
        if bad := [str(path) for path, one in zip(paths, found, strict=True) if one.use_dora]:
            raise ConfigError(f"{bad[0]}: a DoRA cannot be an expert of a mixture")
        settings["num_experts"] = len(found)
    rank: dict[str, int] = {}
    alpha: dict[str, float] = {}
    for one in found:
        for path, module in one.modules.items():
            name = modules[path].name
            rank[name] = max(rank.get(name, 0), module.rank)
            alpha.setdefault(name, module.alpha)
    usual = lambda values: collections.Counter(values.values()).most_common(1)[0][0]
    return settings | {
        "target_modules": list(rank),
        "r": usual(rank),
        "lora_alpha": usual(alpha),
        "rank_pattern": {name: r for name, r in rank.items() if r != usual(rank)},
        "alpha_pattern": {name: a for name, a in alpha.items() if a != usual(alpha)},
    }


def _values(loaded: Loaded, found: Sequence[peft.PeftLora]) -> dict[str, jax.Array]:
    """The adapters' arrays, by our path."""
    modules = {module.name: path for path, module in linear_modules(loaded).items()}
    old, new = P.arrays(loaded.model), {}
    for path, block, layers in adapted_blocks(loaded.model):
        for name, adapter in block.adapters.items():
            prefix = f"{path}.adapters.{name}"
            keys = [key for key in ("a", "b", "scale", "magnitude") if f"{prefix}.{key}" in old]
            arrays = {key: np.zeros(old[f"{prefix}.{key}"].shape, np.float32) for key in keys}
            for row, layer in enumerate(layers):
                for e, one in enumerate(found):
                    module = one.modules.get(modules[f"layers.{layer}.{name}"])
                    if module is None:
                        continue
                    w = np.asarray(old[f"{path}.{name}"][row], np.float32).reshape(adapter.linear.in_features, -1)
                    _fill({key: array[row] for key, array in arrays.items()}, e, module, w)
            rows = zip(arrays["a"], arrays["b"], arrays["scale"])
            follows = [adapter.from_experts(*row) for row in rows]
            arrays |= {key: np.stack([values[key] for values in follows]) for key in follows[0]}
            new |= {f"{prefix}.{key}": _placed(array, old[f"{prefix}.{key}"]) for key, array in arrays.items()}
    return new


def _fill(arrays: dict[str, np.ndarray], e: int, module: peft.LoraModule, w_DN: np.ndarray) -> None:
    R = module.rank
    if module.a.shape[1] != w_DN.shape[0] or module.b.shape[0] != w_DN.shape[1]:
        raise CheckpointError(
            f"a LoRA of {module.a.shape[1]} inputs and {module.b.shape[0]} outputs, beside a weight of "
            f"{w_DN.shape[0]} and {w_DN.shape[1]}"
        )
    arrays["a"][e, :R] = module.a.astype(np.float32)
    arrays["b"][e, :R] = module.b.astype(np.float32).T
    arrays["scale"][e, :R] = module.scale
    if module.magnitude is not None:
        arrays["magnitude"][:] = module.magnitude.astype(np.float32).reshape(-1) - np.linalg.norm(w_DN, axis=0)


def _placed(array: np.ndarray, like: jax.Array) -> jax.Array:
    return jax.device_put(array.astype(like.dtype), like.sharding)


def _round(alpha: float) -> float:
    """What was a short number before it was divided by a rank, in float32, is one again."""
    return float(f"{alpha:.6g}")


def _module(adapter, row: int, e: int, rslora: bool, w) -> peft.LoraModule | None:
    """Expert e of one layer as PEFT has it; None if the layer has no such expert."""
    if adapter.shared_a:
        raise ConfigError("experts that share their A are no LoRAs of their own; merge the mixture at weights instead")
    scale_R = np.asarray(adapter.scale[...][row, e])
    R = int((scale_R != 0).sum())
    if not R:
        return None
    a = np.asarray(adapter.a[...][row, e, :R])
    b = np.ascontiguousarray(np.asarray(adapter.b[...][row, e, :R]).T)
    scale = float(scale_R[0])
    alpha = _round(scale * (R**0.5 if rslora else R))
    magnitude = None
    if hasattr(adapter, "magnitude"):
        w_DN = np.asarray(w, np.float32).reshape(adapter.linear.in_features, -1)
        magnitude = np.linalg.norm(w_DN, axis=0) + np.asarray(adapter.magnitude[...][row])
    return peft.LoraModule(a, b, alpha, scale, magnitude)
