"""Which published tensors make up which leaf of ours: one table, that reading and writing go through."""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from moe_zoo.checkpoints.hf.family import Family
from moe_zoo.checkpoints.hf.layout import Stored
from moe_zoo.checkpoints.hf.mxfp4 import Packed
from moe_zoo.checkpoints.hf.safetensors import Files, Tensor
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.core import param as P
from moe_zoo.core.registry import nearest

_FLOATS = ("float32", "float16", "bfloat16", "float64")
_LAYER = re.compile(r"layers\.(\d+)\.(.*)")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays. `prefixes`: the published prefix of every layer stacked in it; None: it is not stacked.
    `dtype`: as declared.
    """

    path: str
    stored: Stored
    prefixes: tuple[str, ...] | None
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def one(self) -> tuple[int, ...]:
        """The shape of what one published tensor holds of it."""
        return self.shape[(self.prefixes is not None) + self.stored.per_expert :]

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index into our leaf, published name) of every tensor in it."""
        experts = range(self.shape[self.prefixes is not None]) if self.stored.per_expert else (None,)
        for r, prefix in enumerate(self.prefixes if self.prefixes is not None else ("",)):
            for e in experts:
                index = (r,) * (self.prefixes is not None) + (() if e is None else (e,))
                yield index, prefix + self.stored.name.format(e=e)

    def view(self, files: Files, name: str, inside: tuple[slice, ...]) -> np.ndarray:
        """The part `inside` of what tensor `name` holds of the leaf. Of packed experts only those are decoded."""
        if not isinstance(files.tensors[name], Packed):
            return self.stored.ours(files[name], self.one)[inside]
        experts = files.read(name, inside[0])
        return self.stored.ours(experts, (len(experts), *self.one[1:]))[(slice(None), *inside[1:])]


def plan(model, family: Family) -> list[Leaf]:
    """Every variable of `model` with its place in the files. Raises CheckpointError for one that has none."""
    leaves, places = [], family.places(model.config)
    for path, var in P.flat(model).items():
        names = P.layer_names(model)[path]
        matches = [_LAYER.fullmatch(name) for name in names]
        layers = [places[int(m[1])] for m in matches if m]
        table, name = (layers[0][0], layers[0][2] + matches[0][2]) if layers else (family.whole, path)
        if name not in table:
            raise CheckpointError(f"{family.architectures[0]} has no tensor for {names[0]!r}")
        prefixes = tuple(prefix for _, prefix, _ in layers) if layers else None
        leaves.append(Leaf(path, table[name], prefixes, var.get_value().shape, np.dtype(var.get_value().dtype)))
    return _measured(leaves)


def _measured(leaves: list[Leaf]) -> list[Leaf]:
    """With the sizes of all parts of the tensors that hold several leaves."""
    widths: dict[tuple, dict[int, int]] = {}
    for leaf in leaves:
        widths.setdefault((leaf.prefixes, leaf.stored.name), {})[leaf.stored.part] = leaf.stored.width(leaf.one)
    found = []
    for leaf in leaves:
        sizes = widths[leaf.prefixes, leaf.stored.name]
        if len(sizes) == leaf.stored.parts > 1:
            stored = dataclasses.replace(leaf.stored, sizes=tuple(sizes[part] for part in range(len(sizes))))
            leaf = dataclasses.replace(leaf, stored=stored)
        found.append(leaf)
    return found


def check(leaves: list[Leaf], tensors: dict[str, Tensor], family: Family, folder) -> None:
    """Raises CheckpointError for tensors that are missing, of another shape, no floats, or in no leaf."""
    used = set()
    for leaf in leaves:
        expected = leaf.stored.shape(leaf.one)
        for _, name in leaf.tensors():
            tensor = tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is missing{nearest(name, tensors)}; config.json asks for it"
                )
            if tensor.shape != expected:
                raise CheckpointError(
                    f"{tensor.where} has shape {list(tensor.shape)}, config.json makes it {list(expected)}"
                )
            whole = leaf.dtype.kind in "iub"  # a table of ids
            if tensor.dtype != leaf.dtype if whole else tensor.dtype.name not in _FLOATS:
                raise CheckpointError(
                    f"{tensor.where} is {tensor.dtype.name}, expected {leaf.dtype.name if whole else 'floats'}: "
                    "config.json names no quantised format that can be read"
                )
            used.add(name)
    unused = sorted(name for name in tensors.keys() - used if not _known(name, leaves, family))
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        model = f"{family.architectures[0]} with this config.json"
        raise CheckpointError(f"{tensors[unused[0]].where}{more} belong to no parameter of {model}")


def _known(name: str, leaves: list[Leaf], family: Family) -> bool:
    """Whether a tensor that nothing uses is expected: the head of a tied model, further prediction layers."""
    whole = {leaf.path: leaf for leaf in leaves if leaf.prefixes is None}
    if "head.kernel" not in whole and name == family.whole["head.kernel"].name:
        return True
    layer = re.match(re.escape(family.prefix).replace(r"\{layer\}", r"(\d+)"), name)
    count = sum(len(leaf.prefixes) for leaf in leaves if leaf.prefixes and leaf.path.endswith("mixer_norm.scale"))
    beyond = family.extra_layers and layer is not None and int(layer[1]) >= count
    return beyond or any(re.fullmatch(pattern, name) for pattern in family.unused)
