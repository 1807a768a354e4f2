"""Examples with a class each, whatever they are made of: images, rows of tokens. From a source to batches.

Legend: N examples, B rows of a batch.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Shaped

from moe_zoo.core.registry import Registry
from moe_zoo.data.errors import DataError
from moe_zoo.data.pipeline import check_seed, spaced_rows

if TYPE_CHECKING:
    import grain

#: what a model reads, by its own names, and `labels` int32 and `loss_mask` bool, all [B, ...]
LabelledBatch = dict[str, Shaped[np.ndarray, "B ..."]]
PARTS = ("train", "validation", "test")

#: a class of settings `Config` with `load() -> Labelled`
LABELLED = Registry(
    "source of labelled examples",
    {
        "cluttered_digits": "moe_zoo.data.images:ClutteredDigits",
        "digits": "moe_zoo.data.images:Digits",
        "pointers": "moe_zoo.data.chase:Pointers",
    },
)


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """Examples in memory.

    Attributes:
      fields: arrays [N, ...] by the name under which a model finds them in a batch.
      labels: [N] int32, indices into `classes`.
      classes: names.
      groups: [N] int; examples of one group never part in `split_labelled`.
    """

    fields: Mapping[str, Shaped[np.ndarray, "N ..."]]
    labels: Int[np.ndarray, "N"]
    classes: tuple[str, ...]
    groups: Int[np.ndarray, "N"]

    def __post_init__(self):
        sizes = {name: len(array) for name, array in (*self.fields.items(), ("groups", self.groups))}
        if wrong := {name: size for name, size in sizes.items() if size != len(self.labels)}:
            raise DataError(f"{len(self.labels)} labels, but {wrong}: expected as many")
        if taken := {"labels", "loss_mask", "loss_weights"} & self.fields.keys():
            raise DataError(f"fields {', '.join(sorted(taken))}: these names are the batch's own")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise DataError(f"labels {self.labels.min()} to {self.labels.max()} of {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Hash of all of it, 16 hexadecimal digits."""
        digest = hashlib.blake2b(repr(self.classes).encode(), digest_size=8)
        for name, array in (*sorted(self.fields.items()), ("labels", self.labels), ("groups", self.groups)):
            array = np.ascontiguousarray(array)
            digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
            digest.update(array.view(np.uint8).data)
        return digest.hexdigest()

    def select(self, index: Int[np.ndarray, "M"]) -> "Labelled":
        """The examples of these indices, in this order."""
        fields = {name: array[index] for name, array in self.fields.items()}
        return dataclasses.replace(self, fields=fields, labels=self.labels[index], groups=self.groups[index])

    def rows(self, index: Int[np.ndarray, "B"]) -> LabelledBatch:
        """A batch; where an index is -1 there is a row of zeros that does not count."""
        at, live = np.maximum(index, 0), index >= 0
        masked = lambda array: np.where(live.reshape(-1, *[1] * (array.ndim - 1)), array[at], 0).astype(array.dtype)
        batch = {name: masked(array) for name, array in self.fields.items()}
        return batch | {"labels": masked(self.labels), "loss_mask": live}


def split_labelled(data: Labelled, fractions: tuple[float, float, float], seed: int) -> dict[str, Labelled]:
    """{"train", "validation", "test"}: of every class the same shares of its groups, drawn by `seed`.

    A group belongs to the class of its first example. Raises DataError for impossible fractions, or if a part with a
    share gets no example.
    """
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(
            f"split fractions {tuple(fractions)}: expected three numbers for train, validation and test, none "
            "negative, train above 0, that add up to 1, such as (0.8, 0.1, 0.1)."
        )
    groups, first, group_of = np.unique(data.groups, return_index=True, return_inverse=True)
    # RandomState, not Generator: numpy promises that its stream never changes
    random, part = np.random.RandomState(check_seed(seed)), np.zeros(len(groups), int)
    for label in range(len(data.classes)):
        mine = np.flatnonzero(data.labels[first] == label)
        mine = mine[random.permutation(len(mine))]
        ends = np.rint(np.cumsum(fractions) * len(mine)).astype(int)
        for place in (1, 2):
            part[mine[ends[place - 1] : ends[place]]] = place
    parts = {name: data.select(np.flatnonzero(part[group_of] == place)) for place, name in enumerate(PARTS)}
    for name, fraction in zip(PARTS, fractions, strict=True):
        if fraction > 0 and not len(parts[name]):
            raise DataError(f"the part {name!r} (fraction {fraction}) of {len(data)} examples gets none")
    return parts


def labelled_iterator(
    data: Labelled, *, batch_size: int, seed: int, rows: Int[np.ndarray, "R"] | None = None, prefetch: int = 4
) -> "grain.DatasetIterator[LabelledBatch]":
    """Endless batches; each epoch visits every example once, in a new order. As `data.train_iterator`: `get_state()`
    describes the last batch that was returned, and `rows` are those of the batch that this process holds.
    """
    if batch_size < 1:
        raise DataError(f"batch_size {batch_size}: expected at least 1.")
    import grain  # 0.4-0.9 s and it brings jax: only who trains pays

    read = lambda index: data.rows(index if rows is None else index[rows])
    dataset = grain.MapDataset.range(len(data)).seed(check_seed(seed)).shuffle().repeat().batch(batch_size).map(read)
    options = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))


def labelled_batches(
    data: Labelled, *, batch_size: int, max_rows: int | None = None, rows: Int[np.ndarray, "R"] | None = None
) -> Iterator[LabelledBatch]:
    """Every example once, or `max_rows` evenly spaced ones; the last batch is filled with rows that do not count."""
    index = spaced_rows(len(data), max_rows)
    index = np.append(index, np.full(-len(index) % batch_size, -1))
    for batch in index.reshape(-1, batch_size):
        yield data.rows(batch if rows is None else batch[rows])
