"""A published directory -> a model on its devices, each shard built from the slices of the tensors it consists of."""

import dataclasses
import functools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_zoo.checkpoints.hf import fp8, memory, narrow
from moe_zoo.checkpoints.hf.families import find
from moe_zoo.checkpoints.hf.family import Family
from moe_zoo.checkpoints.hf.fp8 import Blocks
from moe_zoo.checkpoints.hf.layout import copy_into
from moe_zoo.checkpoints.hf.mxfp4 import Packed
from moe_zoo.checkpoints.hf.ours import OURS
from moe_zoo.checkpoints.hf.plan import Leaf, check, plan
from moe_zoo.checkpoints.hf.safetensors import Files, Tensor, read_folder
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.core import param as P
from moe_zoo.models import Decoder, ModelConfig, make_model
from moe_zoo.sharding import sharding_of

#: what belongs to a model besides its weights: settings and the tokenizer
EXTRAS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_THREADS = min(8, os.cpu_count() or 1)
_PIECE = 16 << 20  # bytes that one thread copies at a time, about
_COMPUTE = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Published:
    """Where a model came from: what is needed to write it back as it was."""

    folder: Path
    family: Family
    settings: dict[str, Any]


def is_published(folder: Path) -> bool:
    """Whether its config.json is Hugging Face's."""
    try:
        settings = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and ("architectures" in settings or "model_type" in settings)


def describe(folder: Path) -> tuple[Published, ModelConfig]:
    """What config.json says. Raises CheckpointError."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    names = settings.get("architectures") if isinstance(settings, dict) else None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{path}: it has no 'architectures', so nothing says what class of model this is")
    family = find(names[0], str(path))
    _quantization(settings, str(path))
    return Published(folder, family, settings), family.read(settings, str(path))


def read_tensors(published: Published) -> dict[str, Tensor]:
    """From the headers: every tensor of the directory; what several hold together as one that is decoded when read."""
    tensors = published.family.unpack(read_folder(published.folder))
    block = _quantization(published.settings, str(published.folder / "config.json"))
    return fp8.unpack(tensors, block) if block else tensors


def _quantization(settings: dict[str, Any], where: str) -> tuple[int, int] | None:
    """The block size of 8-bit floats, if the files hold such. Raises CheckpointError for what cannot be decoded."""
    config = settings.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in ("fp8", "mxfp4"):
        raise CheckpointError(
            f"{where}: quantization_config of quant_method {method!r} is not supported; known: fp8 in blocks, mxfp4. "
            "Take the release in bfloat16, if there is one, or save one with transformers: dequantize() and "
            "save_pretrained"
        )
    try:
        return fp8.block_size(config) if method == "fp8" else None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: quantization_config: {error}") from error


def load(folder: Path, mesh, dtype=None, weights: str | None = None) -> tuple[Decoder, ModelConfig, Published]:
    """The model with its weights. `dtype` None: as they are stored. `weights` "int8": those of experts narrowed.

    All that can be wrong is found in config.json and the headers, before anything is allocated.
    """
    published, config = describe(folder)
    tensors = read_tensors(published)
    if dtype is not None or published.family is not OURS:  # which says itself what it computes in
        config = dataclasses.replace(config, dtype=_compute_dtype(tensors, published.family, dtype))
    model = make_model(config, mesh)
    leaves = plan(model, published.family)
    check(leaves, tensors, published.family, folder)
    if weights is not None:
        _narrow(model, weights, folder)
    files, variables = Files(tensors), P.flat(model)
    shardings = {n: sharding_of(mesh, v.logical_axes, v.get_value().shape, n) for n, v in variables.items()}
    values, last = {}, None
    with ThreadPoolExecutor(_THREADS) as pool:
        for leaf in leaves:
            if variables[leaf.path].get_value().dtype == np.int8:
                names = (leaf.path, f"{leaf.path}_scale")
                arrays = narrow.place(leaf, files, [shardings[name] for name in names], pool)
                jax.block_until_ready((last, arrays[1]))
                values |= zip(names, arrays)
                last = arrays[0]
                continue
            kind = _stored_dtype(leaf, tensors)
            if dtype is not None and kind.kind not in "iub" and not isinstance(variables[leaf.path], P.Buffer):
                kind = np.dtype(jax.numpy.dtype(dtype))
            array = _place(leaf, files, shardings[leaf.path], kind, pool)
            # where devices have memory of their own, one leaf travels while the next is read, and no more
            jax.block_until_ready(last)
            values[leaf.path] = last = array
    return P.replace(model, values), config, published


def _narrow(model: Decoder, weights: str, folder: Path) -> None:
    if weights != "int8":
        raise CheckpointError(f"weights: expected None (as they are stored) or 'int8', got {weights!r}")
    if not model.quantize_experts():
        raise CheckpointError(f"{folder}: weights={weights!r} narrows experts, and this model has none")


def _place(leaf: Leaf, files: Files, sharding, dtype: np.dtype, pool: ThreadPoolExecutor) -> jax.Array:
    """One leaf on its devices. What several devices hold is read once."""
    bounds = lambda index: tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape))
    shard = functools.cache(lambda key: _read(leaf, files, key, dtype, pool))
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: shard(bounds(index)))


def _read(leaf: Leaf, files: Files, bounds, dtype: np.dtype, pool: ThreadPoolExecutor) -> np.ndarray:
    """The part of a leaf within `bounds`, in memory that the CPU backend takes over instead of copying."""
    out = memory.empty([stop - start for start, stop in bounds], dtype)

    def fill(where: tuple[int, ...], name: str, rows: slice) -> None:
        index = tuple(i - start for i, (start, _) in zip(where, bounds))
        if len(index) == len(bounds):  # a number
            out[index] = leaf.view(files, name, ())
            return
        target = out[index]
        first, *rest = bounds[len(where) :]
        rows = slice(rows.start, min(rows.stop, len(target)))
        memory.touch(target[rows])
        inside = (slice(first[0] + rows.start, first[0] + rows.stop), *(slice(*b) for b in rest))
        copy_into(target[rows], leaf.view(files, name, inside))

    mine = [t for t in leaf.tensors() if all(start <= i < stop for i, (start, stop) in zip(t[0], bounds))]
    work = [pool.submit(fill, *t, rows) for t in mine for rows in _pieces(out, len(t[0]), files.tensors[t[1]])]
    for done in work:
        done.result()
    return out


def _pieces(out: np.ndarray, lead: int, tensor) -> list[slice]:
    """Rows of one tensor that one thread copies: so many that a large one keeps every thread busy."""
    rows = math.prod(out.shape[lead : lead + 1])
    if isinstance(tensor, Packed):
        step = 1  # one expert is decoded at a time
    elif isinstance(tensor, Blocks):
        step = rows
    else:
        step = max(1, _PIECE // max(1, math.prod(out.shape[lead + 1 :]) * out.itemsize))
        step = -(-step // 256) * 256 if out.ndim - lead == 2 else step  # whole tiles of a transposed copy
    return [slice(at, at + step) for at in range(0, rows, max(1, step))]


def _stored_dtype(leaf: Leaf, tensors: dict[str, Tensor]) -> np.dtype:
    kinds = {tensors[name].dtype for _, name in leaf.tensors()}
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def _compute_dtype(tensors: dict[str, Tensor], family: Family, dtype) -> str:
    """What to compute in: the asked type, else that of the embedding; float32 where we have no such type."""
    embedding = tensors.get(family.whole["embed.table"].name)
    return compute_dtype(dtype if dtype is not None else embedding.dtype if embedding else "float32")


def compute_dtype(dtype) -> str:
    """`model.dtype` for parameters of this type; float32 where we do not compute in it."""
    name = jax.numpy.dtype(dtype).name
    return name if name in _COMPUTE else "float32"


def download(name: str) -> Path:
    """A model of the hub by name: its directory in the hub's cache, with the files that are read here and no others.

    Needs `huggingface_hub` (extra `hub`). Offline, what was fetched before is used. Raises CheckpointError.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{name} is no directory here, and to fetch it from the hub huggingface_hub is needed: "
            "pip install 'moe-zoo[hub]'"
        ) from error
    # not a second copy of the weights in another layout, as in original/ or consolidated.safetensors
    wanted = ["*.safetensors", "*.safetensors.index.json", *EXTRAS]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]))
    except errors.GatedRepoError as error:
        way_out = f"its owner asks for consent: give it at https://huggingface.co/{name}, then `hf auth login`"
        raise CheckpointError(f"{name} cannot be fetched from the hub: {way_out}") from error
    except errors.RepositoryNotFoundError as error:
        way_out = "there is no such model, or it is private: check the name, or `hf auth login`"
        raise CheckpointError(f"{name} is no directory here and not on the hub: {way_out}") from error
    except Exception as error:  # no connection, in the words of whatever library found out
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name} is no directory here and cannot be fetched from the hub; where there is a connection, "
            f"`hf download {name} --local-dir DIR`, then load DIR ({type(error).__name__}: {text})"
        ) from error
