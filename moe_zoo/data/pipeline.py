"""From a corpus to batches: packing into rows, the training iterator, evaluation windows.

Legend: B rows of a batch, S positions of a row (`seq_len`), N documents, P positions of the whole stream.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int, Shaped

from moe_zoo.data.corpus import Corpus, check_tokenizer
from moe_zoo.data.errors import DataError
from moe_zoo.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import grain

# tokens, targets, segment_ids, positions, domain: int32; loss_mask: bool. All (B, S), or (S,) for one row.
Batch = dict[str, Shaped[np.ndarray, "*B S"]]

_MAX_SEED = 2**32 - 1


class PackedSource:
    """Random access to the rows of a packed corpus.

    The stream is every document, one after the other, as [BOS] + tokens with EOS as the target of the last one: each
    position of the stream has exactly one target. Row i holds the positions [i * stride, i * stride + seq_len).

    A row is a dict of arrays of shape (S,):
      tokens: int32, the input; PAD where the stream has ended.
      targets: int32, the next token; PAD where there is none.
      segment_ids: int32, 1, 2, ... for the documents within the row; 0 on padding. Attention stays within a segment.
      positions: int32, place in the document. 0 at BOS, and 0 at the row's start for a document that began in an
        earlier row: attention cannot see that part, and every position stays below seq_len.
      loss_mask: bool, the targets that count. Over all rows each trained target of the stream counts exactly once:
        with stride < seq_len, all of row 0 and the last `stride` targets of every other row, which have at least
        seq_len - stride positions of the stream before them. In a supervised corpus the prompts' tokens never count.
      domain: int32, the document's domain id; -1 on padding.
      rejected_mask: bool, only of a corpus with rejected answers: their targets, where the row holds the whole pair.
        The two documents of a pair are neighbours whatever the seed, with segment_ids 2 p and 2 p + 1, p = 1, 2, ... in
        the row; a document alone has 2 p.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, seq_len: int, stride: int | None = None, seed: int | None = None
    ):
        """Prepares the index; no token is copied.

        Args:
          corpus: documents made with `tokenizer`.
          tokenizer: for its special ids.
          seq_len: S, positions of a row.
          stride: positions from one row's start to the next; None means seq_len (no overlap).
          seed: shuffles the documents; None keeps their order.

        Raises:
          DataError: an empty corpus, another tokenizer than the corpus was made with, or impossible sizes.
        """
        check_tokenizer(corpus, tokenizer)
        stride = seq_len if stride is None else stride
        if seq_len < 1 or not 1 <= stride <= seq_len:
            raise DataError(f"seq_len {seq_len}, stride {stride}: expected seq_len >= 1 and 1 <= stride <= seq_len.")
        if not len(corpus):
            raise DataError("the corpus has no documents: nothing to pack.")
        self.seq_len, self.stride = seq_len, stride
        self._corpus, self._pad_id, self._bos_id, self._eos_id = (
            corpus, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id,
        )  # fmt: skip
        order = np.arange(len(corpus))
        if seed is not None:
            # RandomState, not Generator: numpy promises that its stream never changes, and a resumed run relies on it.
            order = _permuted(corpus.rejected_documents(), np.random.RandomState(check_seed(seed)))
        lengths = np.diff(corpus.offsets)[order] + 1
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])  # (N + 1,) in the stream
        # Token k of document n is at stream position starts[n] + 1 + k; adding shifts[n] gives its place in the corpus.
        self._shifts = corpus.offsets[:-1][order] - self._starts[:-1] - 1
        self._domains = corpus.domain_ids[order]
        self._trained_ends = corpus.trained_ends()[order]
        self._second = corpus.rejected_documents()[order]

    @property
    def num_targets(self) -> int:
        """P, the number of targets of the whole stream, trained on or not: all tokens and one EOS per document."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        """The number of rows."""
        return 1 + max(0, -(-(self.num_targets - self.seq_len) // self.stride))

    def __getitem__(self, i: int) -> Batch:
        """Returns row i, arrays of shape (S,)."""
        return {name: array[0] for name, array in self.rows(np.array([i])).items()}

    def rows(self, indices: Int[np.ndarray, " B"]) -> Batch:
        """Returns the rows of these indices, arrays of shape (B, S)."""
        indices = np.asarray(indices, np.int64).reshape(-1, 1)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {int(indices.min())} to {int(indices.max())} of {len(self)}")
        begin = indices * self.stride
        stream = begin + np.arange(self.seq_len)
        live = stream < self.num_targets
        document = np.searchsorted(self._starts, np.where(live, stream, 0), side="right") - 1
        source = stream + self._shifts[document]
        first, last = stream == self._starts[document], stream == self._starts[document + 1] - 1
        corpus_tokens, limit = self._corpus.tokens, len(self._corpus.tokens) - 1

        def pick(at, special, special_id):
            # Where a special token or padding goes, the index may point anywhere: clip, then overwrite.
            ids = corpus_tokens[np.clip(at, 0, limit)].astype(np.int32)
            return np.where(live, np.where(special, special_id, ids), self._pad_id).astype(np.int32)

        row_start = np.maximum(self._starts[document], begin)
        counts = live & ((np.arange(self.seq_len) >= self.seq_len - self.stride) | (indices == 0))
        if (trained := self._corpus.trained) is not None:
            counts &= np.where(last, self._trained_ends[document], trained[np.clip(source + 1, 0, limit)])
        batch = {
            "tokens": pick(source, first, self._bos_id),
            "targets": pick(source + 1, last, self._eos_id),
            "segment_ids": np.where(live, document - document[:, :1] + 1, 0).astype(np.int32),
            "positions": np.where(live, stream - row_start, 0).astype(np.int32),
            "loss_mask": counts,
            "domain": np.where(live, self._domains[document], -1).astype(np.int32),
        }
        if self._corpus.rejected is not None:
            rejected = np.where(last, self._second[document], self._corpus.rejected[np.clip(source + 1, 0, limit)])
            batch |= self._pairs(begin, live, document, rejected)
        return batch

    def _pairs(self, begin, live, document, rejected) -> Batch:
        """What is different in rows of a corpus with rejected answers."""
        second = self._second[document]
        pair = np.cumsum(~self._second)[document]
        pair_begin = self._starts[document - second]
        pair_end = self._starts[document + 1]  # of a rejected answer, where alone it is asked
        whole = (pair_begin >= begin) & (pair_end <= begin + self.seq_len)
        return {
            "segment_ids": np.where(live, 2 * (pair - pair[:, :1] + 1) + second, 0).astype(np.int32),
            "rejected_mask": live & rejected & whole,
        }

    def empty_rows(self, count: int) -> Batch:
        """Returns `count` rows of nothing but padding, to fill up a last batch."""
        shape = (count, self.seq_len)
        fill = {"tokens": self._pad_id, "targets": self._pad_id, "segment_ids": 0, "positions": 0, "domain": -1}
        batch = {name: np.full(shape, value, np.int32) for name, value in fill.items()}
        masks = ("loss_mask",) if self._corpus.rejected is None else ("loss_mask", "rejected_mask")
        return batch | {name: np.zeros(shape, bool) for name in masks}


def _permuted(second: Bool[np.ndarray, " N"], random: np.random.RandomState) -> Int[np.ndarray, " N"]:
    """Returns the documents in a random order, those that are the second of a pair behind the first."""
    first = np.flatnonzero(~second)[random.permutation(int((~second).sum()))]
    pairs = np.stack([first, first + 1], axis=1)
    return pairs[np.stack([np.ones(len(first), bool), np.append(second, False)[first + 1]], axis=1)]


def check_seed(seed: int) -> int:
    """Returns `seed` if both numpy and grain take it; raises DataError otherwise."""
    if not 0 <= seed <= _MAX_SEED:
        raise DataError(f"data seed {seed}: expected 0 <= seed <= {_MAX_SEED}.")
    return int(seed)


def train_iterator(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    rows: Int[np.ndarray, " R"] | None = None,
    prefetch: int = 4,
) -> "grain.DatasetIterator[Batch]":
    """Returns an endless iterator of training batches; each epoch visits every row once, in a new order.

    `get_state()` describes the last batch that was returned by `next`, however many are prefetched, and `set_state`
    goes on exactly after it; `grain.checkpoint.CheckpointSave` and `CheckpointRestore` take the iterator as it is. The
    state is a position only: it means the same batches for the same corpus (fingerprint), seed, seq_len and batch_size.

    Args:
      corpus: documents made with `tokenizer`.
      tokenizer: for its special ids.
      seq_len: S, positions of a row.
      batch_size: rows of the global batch.
      seed: orders documents and rows.
      rows: which of the batch's rows to cut, in this order: those that the devices of a process hold. None means all.
      prefetch: batches made ahead by a thread; 0 makes them in the caller's.

    Raises:
      DataError: see `PackedSource`; or `rows` are not of the batch.
    """
    _check_rows(batch_size, rows)
    source = PackedSource(corpus, tokenizer, seq_len, seed=check_seed(seed))
    import grain  # 0.4-0.9 s and it brings jax: only who trains pays

    def read(indices):
        return source.rows(indices if rows is None else indices[rows])

    # Row numbers are shuffled and batched, then a batch is read at once: several times cheaper than row by row.
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(batch_size).map(read)
    options = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
    return iter(dataset.to_iter_dataset(options))


def _check_rows(batch_size: int, rows: Int[np.ndarray, " R"] | None) -> None:
    if batch_size < 1:
        raise DataError(f"batch_size {batch_size}: expected at least 1.")
    if rows is not None and not (len(rows) and 0 <= min(rows) <= max(rows) < batch_size):
        raise DataError(f"rows {list(rows)[:8]} of a batch of {batch_size}: expected some of 0 to {batch_size - 1}.")


def spaced_rows(num_rows: int, max_rows: int | None) -> Int[np.ndarray, " R"]:
    """Returns the indices of at most `max_rows` rows, evenly spaced over `num_rows`; all for None."""
    if max_rows is not None and max_rows < 1:
        raise DataError(f"max_rows {max_rows}: expected at least 1, or None for all rows.")
    count = num_rows if max_rows is None else min(max_rows, num_rows)
    return np.arange(count, dtype=np.int64) * num_rows // count


def eval_batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    stride: int | None = None,
    batch_size: int,
    max_rows: int | None = None,
    rows: Int[np.ndarray, " R"] | None = None,
) -> Iterator[Batch]:
    """Returns an iterator over the batches of one evaluation, documents in the corpus' order.

    Without `max_rows`, `loss_mask` is set exactly once for every trained target of the corpus. All batches have
    batch_size rows: the last one is filled with padding rows (segment_ids 0, loss_mask False).

    Args:
      corpus: documents made with `tokenizer`.
      tokenizer: for its special ids.
      seq_len: S, positions of a row.
      stride: see `PackedSource`; None means seq_len. Smaller gives each counted target more context, and more rows.
      batch_size: B.
      max_rows: for a quick look, only that many rows, evenly spaced, always the same ones.
      rows: which rows of each batch to cut, ascending; None means all.

    Raises:
      DataError: see `PackedSource` and `spaced_rows`; at once, not at the first batch.
    """
    _check_rows(batch_size, rows)
    source = PackedSource(corpus, tokenizer, seq_len, stride)
    indices = spaced_rows(len(source), max_rows)
    return _batches(source, indices, batch_size, np.arange(batch_size) if rows is None else np.asarray(rows))


def _batches(
    source: PackedSource, indices: Int[np.ndarray, " N"], batch_size: int, rows: Int[np.ndarray, " R"]
) -> Iterator[Batch]:
    for begin in range(0, len(indices), batch_size):
        chosen = indices[begin + rows[rows < len(indices) - begin]]
        batch = source.rows(chosen)
        if len(chosen) < len(rows):
            filler = source.empty_rows(len(rows) - len(chosen))
            batch = {name: np.concatenate([array, filler[name]]) for name, array in batch.items()}
        yield batch


def num_eval_batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    stride: int | None = None,
    batch_size: int,
    max_rows: int | None = None,
) -> int:
    """Returns how many batches `eval_batches` gives for the same arguments."""
    rows = len(spaced_rows(len(PackedSource(corpus, tokenizer, seq_len, stride)), max_rows))
    return -(-rows // batch_size)


def count_targets(batch: Mapping[str, np.ndarray], num_domains: int) -> Int[np.ndarray, " D"]:
    """Returns how many targets of each domain count (loss_mask) in `batch`, int64."""
    return np.bincount(batch["domain"][batch["loss_mask"]], minlength=num_domains)
