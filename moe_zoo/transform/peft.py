"""PEFT's adapters onto a loaded model and from it: LoRA, one or several as experts of a mixture, Poly, X-LoRA."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_zoo.adapters import ADAPTERS
from moe_zoo.adapters.experts import ExpertLora
from moe_zoo.checkpoints import CheckpointError, hf, peft, peft_experts, peft_poly, peft_xlora
from moe_zoo.checkpoints.hf.family import expand
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
    mixture that `adapters` names; what routes is drawn with `seed`. A directory of PEFT's Poly or MHR is `poly`, one of
    its X-LoRA `xlora`.

    A linear layer that one of them leaves out has no such expert; smaller ranks are filled up with zeros. Raises
    CheckpointError for a directory that does not fit the model, ConfigError for a mixture that does not fit them.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    kind = peft.read_settings(paths[0]).get("peft_type") if len(paths) == 1 else "LORA"
    if kind == "XLORA":
        return _load_xlora(loaded, paths[0], seed)
    if kind == "POLY":
        modules, _ = modules_of(loaded)
        return _load_poly(loaded, _checked(peft_poly.read(paths[0]), modules, paths[0]), modules)
    return _load_loras(loaded, paths, {"name": adapters} if isinstance(adapters, str) else dict(adapters), seed)


def _load_loras(loaded: Loaded, paths: Sequence[str | Path], settings: dict[str, Any], seed: int) -> Loaded:
    modules, stacked = modules_of(loaded)
    read = [peft.read(path) for path in paths]
    found = [_by_name(loaded, one, modules, stacked, path) for one, path in zip(read, paths, strict=True)]
    plain = add_adapters(loaded, _settings(read, found, settings, paths), seed=seed)
    return dataclasses.replace(plain, model=P.replace(plain.model, P.arrays(plain.model) | _values(plain, found)))


def save_adapter(loaded: Loaded, path: str | Path, expert: int | None = None) -> None:
    """Writes an expert of the model's adapters (the first) as a directory that PEFT opens; Poly as a whole; X-LoRA as a
    whole unless `expert` is given. Of other mixtures' gates PEFT has no files.

    Raises ConfigError if there are no adapters, or this one is no plain LoRA.
    """
    if not loaded.config.adapted:
        raise ConfigError("the model has no adapters to save; see transform.add_adapters")
    loaded = as_lora(loaded)
    (modules, stacked), config = modules_of(loaded), loaded.config.adapters.config
    of_name = {m.name: path for path, m in modules.items() if m.expert is None and not m.parameter}
    folder = str(loaded.published.folder) if loaded.published else None
    settings = {"base_model_name_or_path": folder}
    if loaded.config.adapters.name == "poly":
        return _save_poly(loaded, path, of_name, settings)
    if loaded.config.adapters.name == "xlora" and expert is None:
        return _save_xlora(loaded, Path(path), settings)
    rslora, dora = config.use_rslora, getattr(config, "use_dora", False)
    plain, banks = _modules(loaded, expert or 0, rslora)
    if apart := sorted(plain.keys() - of_name.keys()):
        raise ConfigError(
            f"{apart[0]!r}: its published weight is no tensor of its own, so PEFT can have no LoRA beside it"
        )
    found = {of_name[name]: module for name, module in plain.items()}
    for name, parts in banks.items():
        paths = {m.parameter: path for path, m in modules.items() if m.name == name}
        if not paths:
            raise ConfigError(f"{name!r}: PEFT can have no LoRA beside the experts of this family; merge it")
        joined = peft_experts.join(parts, stacked, "gate_up_proj" in paths, rslora)
        found |= {paths[parameter]: module for parameter, module in joined.items()}
    if not found:
        raise ConfigError(f"expert {expert or 0} acts beside no linear layer")
    settings |= {"lora_dropout": config.lora_dropout}
    layer_of = {path: (module.layer, module.below) for path, module in modules.items()}
    peft.save(path, peft.PeftLora(settings, found, rslora, dora), layer_of, loaded.config.num_layers)


@dataclasses.dataclass(frozen=True)
class Module:
    """What a LoRA of PEFT's can be beside, and where our model has it. `name`: of our linear layer, per layer, for a
    `parameter` of experts of their bank; `layer`, `below`: theirs, and the path below it. `expert`: it is this one's of
    a bank.
    """

    name: str
    layer: int
    below: str
    parameter: str | None = None
    expert: int | None = None


def modules_of(loaded: Loaded) -> tuple[dict[str, Module], peft_experts.Stacked | None]:
    """Path in the published model -> module, of linear layers whose weight is a tensor of its own there, experts' too,
    and of what transformers keeps of experts in one parameter; and how it keeps that.
    """
    plain = dataclasses.replace(loaded.config, adapters=build_choice(ADAPTERS, "none", "adapters"))
    family = hf.choose(plain, loaded.published.family if loaded.published else None)
    stacked, names = peft_experts.stacked(family), [n for g in P.layer_names(Decoder(plain)).values() for n in g]
    gated, found = {n.rpartition(".")[0] for n in names if n.endswith("ffn.experts.w_gate")}, {}
    theirs = family.of_layers(expand(plain))
    for name in names:
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        layer, begin = theirs[int(match[1])] if match else (0, "")
        stored = family.layer.get(begin + match[2]) if match else None
        if stored is None:
            continue
        prefix = family.prefix.format(layer=layer)
        bank, _, leaf = name.rpartition(".")
        if stacked and match[2].startswith("ffn.experts.w_"):
            parameter = peft_experts.parameter_of(leaf, bank in gated)
            below = f"{stacked.module}.{parameter}"
            found[prefix + below] = Module(bank, layer, below, parameter)
        if stored.form != "linear" or stored.parts > 1 or stored.batched:
            continue
        below = stored.name.removesuffix(".weight")
        for e in range(plain.num_experts) if stored.per_expert else (None,):
            one = below.format(e=e)
            found[prefix + one] = Module(name, layer, one, expert=e)
    return found, stacked


def _checked(found: Mapping[str, Any], modules: Mapping[str, Module], path) -> Mapping[str, Any]:
    for name in found:
        if name not in modules:
            raise CheckpointError(
                f"{path}: the model has no linear layer {name!r}{nearest(name, modules)} that an adapter can be beside"
            )
    return found


def _by_name(loaded: Loaded, one: peft.PeftLora, modules: Mapping[str, Module], stacked, where) -> dict[str, Any]:
    """What a directory has, by the name of our linear layer: `LoraModule`, or `ExpertModule` of a bank."""
    found: dict[str, Any] = {}
    apart: dict[str, dict[int, peft.LoraModule]] = {}
    for path, m in _checked(one.modules, modules, where).items():
        module = modules[path]
        if module.parameter:
            parts = peft_experts.split(module.parameter, m, stacked, one.use_rslora)
            found |= {f"{module.name}.{leaf}": part for leaf, part in parts.items()}
        elif module.expert is not None:
            apart.setdefault(module.name, {})[module.expert] = m
        else:
            found[module.name] = m
    for name, of in apart.items():
        if name in found:
            raise CheckpointError(f"{where}: {name!r} has a LoRA for all experts together and others for each")
        found[name] = peft_experts.gathered(of, loaded.config.num_experts, one.use_rslora, f"{where}: {name!r}")
    return found


def _load_poly(loaded: Loaded, found: Mapping[str, peft_poly.PolyModule], modules: Mapping[str, Module]) -> Loaded:
    """PEFT's Poly, whose scale is 1 / r."""
    tasks, h, S = next(iter(found.values())).logits.shape
    rank = next(iter(found.values())).a.shape[1]
    if beside := [path for path in found if modules[path].parameter or modules[path].expert is not None]:
        raise CheckpointError(f"{beside[0]!r}: Poly beside routed experts is not supported")
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
                    b = one["b"] * np.float32(peft.alpha_of(one["scale"].flat[0], adapter.config.r, False))
                    found[of_name[f"layers.{layer}.{name}"]] = peft_poly.PolyModule(one["a"], b, one["logits"])
    peft_poly.save(path, found, settings)


def _load_xlora(loaded: Loaded, folder, seed: int) -> Loaded:
    """PEFT's X-LoRA: its LoRAs, and the classifier's outputs where our layers look for them."""
    x = peft_xlora.read(folder)
    made = _load_loras(loaded, x.adapters, {"name": "xlora", **x.settings}, seed)
    D, E, places = loaded.config.hidden_size, len(x.adapters), _classified(made)
    if x.weight.shape != (len(places) * E, D):
        raise CheckpointError(
            f"{folder}: its classifier is {list(x.weight.shape)}; {E} adapters with {len(places)} gates each, hidden "
            f"size {D}, take {[len(places) * E, D]}"
        )
    values = P.arrays(made.model)
    for key, theirs in (("kernel", x.weight.T), ("bias", x.bias)):
        old = values[f"adapters.{key}"]
        array = np.zeros((*old.shape[:-1], *made.model.adapters.shape, E), np.float32)
        for place, outputs in zip(places, np.split(theirs, len(places), axis=-1)):
            array[(..., *place, slice(None))] = outputs
        values[f"adapters.{key}"] = _placed(array.reshape(old.shape), old)
    return dataclasses.replace(made, model=P.replace(made.model, values))


def _save_xlora(loaded: Loaded, folder: Path, settings: Mapping[str, Any]) -> None:
    config, classifier = loaded.config.adapters.config, loaded.model.adapters
    paths = [folder / str(e) for e in range(config.num_experts)]
    for e, path in enumerate(paths):
        save_adapter(loaded, path, e)
    theirs = []
    for var in (classifier.kernel, classifier.bias):
        array = np.asarray(var[...], np.float32)
        array = array.reshape(*array.shape[:-1], *classifier.shape, config.num_experts)
        theirs.append(np.concatenate([array[(..., *place, slice(None))] for place in _classified(loaded)], axis=-1))
    x = peft_xlora.PeftXLora(dataclasses.asdict(config), paths, np.ascontiguousarray(theirs[0].T), theirs[1])
    peft_xlora.save(folder, x, settings)


def _classified(loaded: Loaded) -> list[tuple[int, int]]:
    """(layer, place of the linear layer's name) of every gate of an X-LoRA's classifier, as PEFT counts them."""
    if not loaded.config.adapters.config.layerwise_scalings:
        return [(0, 0)]
    found = []
    for _, block, layers in adapted_blocks(loaded.model):
        for adapter in block.adapters.values():
            live = np.asarray(adapter.scale[...]).any((1, 2))
            found += [(layer, adapter.linear.place) for layer, on in zip(layers, live, strict=True) if on]
    return sorted(found)


def _settings(read, found, settings: dict[str, Any], paths) -> dict[str, Any]:
    """`settings` with what the files decide: targets, ranks, alphas."""
    cls = ADAPTERS.get(settings.get("name", ""), "adapters.name")
    if settings["name"] == "lora":
        if len(read) != 1:
            raise ConfigError(f"adapters: 'lora' is one adapter, got {len(read)} directories; name a mixture for them")
        settings |= {"use_rslora": read[0].use_rslora, "use_dora": read[0].use_dora}
    elif not getattr(cls, "takes_loras", False):
        raise ConfigError(f"adapters: the experts of {settings['name']!r} are no LoRAs of their own")
    else:
        if bad := [str(path) for path, one in zip(paths, read, strict=True) if one.use_dora]:
            raise ConfigError(f"{bad[0]}: a DoRA cannot be an expert of a mixture")
        settings["num_experts"] = len(read)
    rank: dict[str, int] = {}
    alpha: dict[str, float] = {}
    for one in found:
        for name, module in one.items():
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


def _values(loaded: Loaded, found: Sequence[Mapping[str, Any]]) -> dict[str, jax.Array]:
    """The adapters' arrays, by our path."""
    old, new = P.arrays(loaded.model), {}
    for path, block, layers in adapted_blocks(loaded.model):
        for name, adapter in block.each_adapter().items():
            prefix, beside = f"{path}.{block.adapter_path(name)}", isinstance(adapter, ExpertLora)
            keys = [key for key in ("a", "b", "scale", "magnitude") if f"{prefix}.{key}" in old]
            arrays = {key: np.zeros(old[f"{prefix}.{key}"].shape, np.float32) for key in keys}
            for row, layer in enumerate(layers):
                per_layer = f"layers.{layer}.{name}"
                for e, one in enumerate(found):
                    if (module := one.get(per_layer)) is not None:
                        here = {key: array[row] for key, array in arrays.items()}
                        weight = lambda row=row, of=f"{path}.{name}": np.asarray(old[of][row], np.float32)
                        _fill(here, None if beside else e, module, adapter, weight, per_layer)
            if not beside:
                follows = [adapter.from_experts(*row) for row in zip(arrays["a"], arrays["b"], arrays["scale"])]
                arrays |= {key: np.stack([values[key] for values in follows]) for key in follows[0]}
            new |= {f"{prefix}.{key}": _placed(array, old[f"{prefix}.{key}"]) for key, array in arrays.items()}
    return new


def _fill(arrays: dict[str, np.ndarray], e: int | None, module, adapter, weight, where: str) -> None:
    """One layer's arrays of an adapter with what a file has of expert e; None: of all experts of a bank."""
    R, linear = module.rank, adapter.linear
    a, b = module.a, module.b if e is None else module.b.T
    sizes = (*(linear.bank,) * (e is None), linear.in_features, linear.out_features)
    given = (*a.shape[:-2], a.shape[-1], b.shape[-1])
    if given != sizes:
        say = lambda sizes: " and ".join(map(str, sizes[-2:])) + f", of {sizes[0]} experts" * (len(sizes) == 3)
        raise CheckpointError(f"{where!r}: a LoRA of inputs and outputs {say(given)}, beside a weight of {say(sizes)}")
    at = ... if e is None else e
    arrays["a"][at, :R, :] = a.astype(np.float32)
    arrays["b"][at, :R, :] = b.astype(np.float32)
    arrays["scale"][at, :R] = module.scale
    if module.magnitude is not None:
        w_DN = weight().reshape(linear.in_features, -1)
        arrays["magnitude"][:] = module.magnitude.astype(np.float32).reshape(-1) - np.linalg.norm(w_DN, axis=0)


def _placed(array: np.ndarray, like: jax.Array) -> jax.Array:
    return jax.device_put(array.astype(like.dtype), like.sharding)


def _modules(loaded: Loaded, e: int, rslora: bool) -> tuple[dict[str, peft.LoraModule], dict[str, dict[str, Any]]]:
    """Expert e of the adapters by linear layer, per layer; what is beside routed experts by bank and linear layer."""
    plain, banks, weights = {}, {}, P.arrays(loaded.model)
    for path, block, layers in adapted_blocks(loaded.model):
        for name, adapter in block.each_adapter().items():
            if e >= adapter.num_experts:
                raise ConfigError(f"expert: {e}, of {adapter.num_experts}")
            for row, layer in enumerate(layers):
                bank, _, leaf = f"layers.{layer}.{name}".rpartition(".")
                if isinstance(adapter, ExpertLora):
                    if (module := _expert_module(adapter, row, rslora)) is not None:
                        banks.setdefault(bank, {})[leaf] = module
                elif (module := _module(adapter, row, e, rslora, weights[f"{path}.{name}"])) is not None:
                    plain[f"{bank}.{leaf}"] = module
    return plain, banks


def _expert_module(adapter: ExpertLora, row: int, rslora: bool) -> peft_experts.ExpertModule | None:
    """One layer of a LoRA beside experts; None if the layer has none."""
    scale_R = np.asarray(adapter.scale[...][row])
    R = int((scale_R != 0).sum())
    if not R:
        return None
    a, b = (np.asarray(var[...][row, :, :R]) for var in (adapter.a, adapter.b))
    scale = float(scale_R[0])
    return peft_experts.ExpertModule(a, b, peft.alpha_of(scale, R, rslora), scale)


def _module(adapter, row: int, e: int, rslora: bool, w) -> peft.LoraModule | None:
    """Expert e of one layer as PEFT has it; None if the layer has no such expert. `w`: all layers' base weights."""
    if adapter.shared_a:
        raise ConfigError("experts that share their A are no LoRAs of their own; merge the mixture at weights instead")
    scale_R = np.asarray(adapter.scale[...][row, e])
    R = int((scale_R != 0).sum())
    if not R:
        return None
    a = np.asarray(adapter.a[...][row, e, :R])
    b = np.ascontiguousarray(np.asarray(adapter.b[...][row, e, :R]).T)
    scale = float(scale_R[0])
    magnitude = None
    if hasattr(adapter, "magnitude"):
        w_DN = np.asarray(w[row], np.float32).reshape(adapter.linear.in_features, -1)
        magnitude = np.linalg.norm(w_DN, axis=0) + np.asarray(adapter.magnitude[...][row])
    return peft.LoraModule(a, b, peft.alpha_of(scale, R, rslora), scale, magnitude)
