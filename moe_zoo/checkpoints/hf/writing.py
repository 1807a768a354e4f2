"""A model -> a directory that transformers opens: published names, shapes and types, config.json, index."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_zoo.checkpoints.hf import safetensors
from moe_zoo.checkpoints.hf.families import families
from moe_zoo.checkpoints.hf.family import Family, essential
from moe_zoo.checkpoints.hf.ours import OURS
from moe_zoo.checkpoints.hf.plan import Leaf, plan
from moe_zoo.checkpoints.hf.reading import EXTRAS, Published
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.core import param as P
from moe_zoo.models import Decoder, ModelConfig

_SHARD = 5_000_000_000  # bytes of one file, as on the hub


def save(
    folder: Path,
    model: Decoder,
    config: ModelConfig,
    published: Published | None = None,
    *,
    family: Family | None = None,
    extras: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    shard_bytes: int = _SHARD,
) -> Family:
    """Writes the directory and returns the family that it belongs to.

    `family`: as which; None: the first that has the model's settings. `published`: where the model came from; its
    config.json is kept as far as it is still true. `extras`: a directory whose tokenizer files are copied. `settings`:
    more keys of config.json (ids of special tokens, say).

    Nothing is left behind if it fails; what was there is replaced at the end. Raises CheckpointError when no family has
    the model's settings, naming those that do not fit, or the system's words when the disk says no.
    """
    if model.quantized:
        raise CheckpointError(
            "experts were narrowed to int8, what they were is gone; save what was loaded without weights="
        )
    if family is None:
        family = choose(config, published.family if published else None, "; moe_zoo.save writes it for moe_zoo alone")
    leaves, values = plan(model, family), P.arrays(model)
    text = dict(settings or {}) | _config(family, config, published, values)
    temporary = folder / f".saving-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        _write_weights(temporary, leaves, values, shard_bytes, family.derived(config, text))
        (temporary / "config.json").write_text(json.dumps(text, indent=2) + "\n")
        for name in EXTRAS:
            if extras and name != "config.json" and (extras / name).is_file():
                shutil.copyfile(extras / name, temporary / name)
        _move(temporary, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return family


def choose(config: ModelConfig, first: Family | None = None, otherwise: str = "") -> Family:
    """The family whose models can have these settings. Raises CheckpointError with the nearest and what it lacks, and
    with what to do `otherwise`.
    """
    found = {}
    first = None if first is OURS else first and (first.written_as or first)
    candidates = [family for family in families() if family.written_as is None]
    for family in (first, *candidates) if first else candidates:
        try:
            differ = family.mismatches(config)
        except CheckpointError:
            continue
        if not differ:
            return family
        found.setdefault(family.architectures[0], differ)
    if not found:
        raise CheckpointError("no published family has layers in this order")
    name = (
        first.architectures[0] if first and first.architectures[0] in found else min(found, key=lambda n: len(found[n]))
    )
    differ = found[name]
    raise CheckpointError(
        f"no published family has these settings; nearest is {name}, but for {'; '.join(differ)}{otherwise}"
    )


def _config(family: Family, config: ModelConfig, published: Published | None, values) -> dict[str, Any]:
    dtype = values["embed.table"].dtype.name
    if not published or published.family is not family:
        return family.write(config) | {"dtype": dtype}
    text = dict(published.settings)
    if essential(family.read(text)) != essential(config):
        for key in family.keys:
            for name in key.also:
                text.pop(name, None)
        text |= family.write(config) | {"architectures": text["architectures"]}
    text.pop("quantization_config", None)  # what was packed is written as what it says
    for key in ("dtype", "torch_dtype"):
        if text.get(key) not in (None, dtype):
            text[key] = dtype
    return text


def _write_weights(
    folder: Path, leaves: list[Leaf], values: dict[str, jax.Array], shard_bytes: int, derived: dict[str, np.ndarray]
) -> None:
    """`derived`: tensors besides those of our arrays; they get the embedding's type."""
    pieces: dict[str, list[tuple[Leaf, tuple[int, ...]]]] = {}
    for leaf in leaves:
        for index, name in leaf.tensors():
            pieces.setdefault(name, []).append((leaf, index))
    tensors = {}
    for name, parts in sorted(pieces.items()):
        leaf = parts[0][0]
        if len(parts) != leaf.stored.parts:
            raise CheckpointError(f"tensor {name!r} holds {leaf.stored.parts} of our arrays, {len(parts)} are there")
        tensors[name] = (np.dtype(values[leaf.path].dtype), leaf.stored.shape(leaf.one))
    kind = np.dtype(values["embed.table"].dtype)
    tensors |= {name: (kind, array.shape) for name, array in derived.items()}
    hosts = {leaf.path: _host(values[leaf.path]) for leaf in leaves}

    def value(name: str) -> np.ndarray:
        dtype, shape = tensors[name]
        if name in derived:
            return derived[name].astype(dtype)
        out = np.empty(shape, dtype)
        for leaf, index in pieces[name]:
            leaf.stored.put(out, np.asarray(hosts[leaf.path][index]))
        return out

    size = {name: dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for name, (dtype, shape) in tensors.items()}
    shards = _shards(size, shard_bytes)
    for file, names in shards.items():
        safetensors.write(folder / file, [(name, *tensors[name]) for name in names], value)
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        (folder / safetensors.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _host(array: jax.Array):
    """What can be indexed tensor by tensor without a copy of the whole: memory of this process, else the device's."""
    if len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu":
        return np.asarray(array)
    return array


def _shards(size: dict[str, int], most: int) -> dict[str, list[str]]:
    """{file: tensors}, in order, each file of at most `most` bytes or one tensor."""
    groups, total = [[]], 0
    for name, bytes_ in size.items():
        if groups[-1] and total + bytes_ > most:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += bytes_
    if len(groups) == 1:
        return {safetensors.SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups)}


def _move(temporary: Path, folder: Path) -> None:
    """Weights of an earlier save go, config.json comes last: a directory with one is complete."""
    new = sorted(os.listdir(temporary), key=lambda name: name == "config.json")
    with contextlib.suppress(FileNotFoundError):
        (folder / "config.json").unlink()
    for old in (*folder.glob("model*.safetensors"), folder / safetensors.INDEX):
        if old.name not in new:
            old.unlink(missing_ok=True)
    for name in new:
        os.replace(temporary / name, folder / name)
