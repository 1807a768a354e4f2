"""A corpus: tokenized documents with their domains, saved, loaded, and described.

Legend: N documents, T tokens of all documents together.
"""

import dataclasses
import hashlib
import logging
import os
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt16, UInt64

from moe_zoo.data.errors import DataError
from moe_zoo.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_ARRAYS = ("tokens", "offsets", "domain_ids", "num_bytes", "groups")
# None for a corpus that is trained on whole, and then neither saved nor part of the fingerprint.
_OPTIONAL_ARRAYS = ("trained", "trained_bytes", "rejected")
# Up to this many documents, or a hundredth of all, are kept together by a shared prompt.
_MAX_SHARED = 16
# Tables of results have a row of this name beside the domains.
RESERVED_DOMAIN = "overall"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text before tokenization.

    Attributes:
      text: all of it.
      domain: a name.
      group: documents of one group never part in `split`; default: the text itself.
      pieces: (text, whether it is trained on) in order, `text` cut where that changes; None: trained on whole.
      rejected: another answer in the place of the last piece, for what compares two; it is never trained on.
    """

    text: str | bytes
    domain: str
    group: str | bytes | None = None
    pieces: tuple[tuple[str, bool], ...] | None = None
    rejected: str | None = None

    @classmethod
    def supervised(cls, pieces: Iterable[tuple[str, bool]], domain: str, group: str | None = None) -> "Document":
        """Returns the document of these pieces: what is False is read but not learned to write."""
        joined: list[tuple[str, bool]] = []
        for text, trained in pieces:
            if joined and joined[-1][1] == trained:
                joined[-1] = (joined[-1][0] + text, trained)
            elif text:
                joined.append((text, trained))
        whole = all(trained for _, trained in joined)
        return cls("".join(text for text, _ in joined), domain, group, None if whole else tuple(joined))


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """All documents of a data set, tokenized and concatenated without special tokens.

    Attributes:
      tokens: (T,) uint16 or int32; document i is `tokens[offsets[i]:offsets[i + 1]]`.
      offsets: (N + 1,) int64.
      domain_ids: (N,) int32, indices into `domains`.
      num_bytes: (N,) int64, UTF-8 bytes of each document.
      groups: (N,) uint64 hashes; documents with equal hashes land in the same split. Equal texts have equal hashes.
      domains: names; a subset of a corpus keeps all names, so that ids mean the same in every split.
      tokenizer: name of the tokenizer that made `tokens`.
      trained: (T,) bool, the tokens that are trained on and scored; None when all are. The end of a document counts
        exactly if its last token does.
      trained_bytes: (N,) int64, UTF-8 bytes of each document's trained tokens; None with `trained`. Bits per byte are
        counted over these (over `num_bytes` when all is trained).
      rejected: (T,) bool, the tokens of rejected answers; None when there are none. A document with any holds the
        prompt of the document before it with the answer that is not wanted, and is not trained on.
      fingerprint: hash of all of the above, 16 hexadecimal digits.
    """

    tokens: UInt16[np.ndarray, " T"] | Int[np.ndarray, " T"]
    offsets: Int[np.ndarray, " N+1"]
    domain_ids: Int[np.ndarray, " N"]
    num_bytes: Int[np.ndarray, " N"]
    groups: UInt64[np.ndarray, " N"]
    domains: tuple[str, ...]
    tokenizer: str
    trained: Bool[np.ndarray, " T"] | None = None
    trained_bytes: Int[np.ndarray, " N"] | None = None
    rejected: Bool[np.ndarray, " T"] | None = None
    fingerprint: str = ""

    def __post_init__(self):
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint(self))

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.domain_ids)

    def __repr__(self) -> str:
        return (
            f"Corpus({len(self)} documents, {int(self.num_bytes.sum()):,} bytes, {len(self.tokens):,} tokens, "
            f"domains={self.domains}, tokenizer={self.tokenizer!r}, fingerprint={self.fingerprint!r})"
        )

    def document(self, i: int) -> UInt16[np.ndarray, " S"] | Int[np.ndarray, " S"]:
        """Returns the tokens of document i, without special tokens."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def bytes_per_domain(self) -> dict[str, int]:
        """Returns the UTF-8 bytes of each domain, zero for a domain without documents."""
        return self._per_domain(self.num_bytes)

    def trained_bytes_per_domain(self) -> dict[str, int]:
        """Returns the UTF-8 bytes of each domain that are trained on and scored: all of them, or the answers'."""
        return self._per_domain(self.num_bytes if self.trained_bytes is None else self.trained_bytes)

    def targets_per_domain(self) -> dict[str, int]:
        """Returns the number of targets a model is trained on in each domain: its trained tokens, and the EOS of every
        document whose last token is trained.

        Bits per byte of a domain are (mean negative log2-likelihood per target) * targets / trained bytes, which holds
        approximately for a sample of the rows and exactly for all of them.
        """
        if self.trained is None:
            return self._per_domain(np.diff(self.offsets) + 1)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.trained)])
        return self._per_domain(np.diff(before[self.offsets]) + self.trained_ends())

    def trained_ends(self) -> Bool[np.ndarray, " N"]:
        """Returns for which documents the EOS is trained on; one without tokens is nothing but its EOS."""
        if self.trained is None:
            return np.ones(len(self), bool)
        empty = np.diff(self.offsets) == 0
        return empty | self.trained[np.where(empty, 0, self.offsets[1:] - 1)]

    def rejected_documents(self) -> Bool[np.ndarray, " N"]:
        """Returns which documents end in an answer that is not wanted, each behind the one with the wanted answer."""
        if self.rejected is None:
            return np.zeros(len(self), bool)
        empty = np.diff(self.offsets) == 0
        return ~empty & self.rejected[np.where(empty, 0, self.offsets[1:] - 1)]

    def _per_domain(self, values: Int[np.ndarray, " N"]) -> dict[str, int]:
        sums = np.bincount(self.domain_ids, values, minlength=len(self.domains))
        return {name: int(total) for name, total in zip(self.domains, sums, strict=True)}

    def token_counts(self, vocab_size: int) -> Int[np.ndarray, " V"]:
        """Returns how often each token id occurs."""
        return np.bincount(self.tokens, minlength=vocab_size)

    def select(self, keep: Bool[np.ndarray, " N"] | Int[np.ndarray, " M"]) -> "Corpus":
        """Returns the corpus of the documents in `keep` (a mask, or indices in the wanted order)."""
        index = np.flatnonzero(keep) if np.asarray(keep).dtype == bool else np.asarray(keep, np.int64)
        spans = [slice(*self.offsets[i : i + 2]) for i in index]
        gather = lambda array: np.concatenate([array[span] for span in spans]) if spans else array[:0]
        return dataclasses.replace(
            self,
            tokens=gather(self.tokens),
            offsets=_offsets(np.diff(self.offsets)[index]),
            domain_ids=self.domain_ids[index],
            num_bytes=self.num_bytes[index],
            groups=self.groups[index],
            trained=None if self.trained is None else gather(self.trained),
            trained_bytes=None if self.trained_bytes is None else self.trained_bytes[index],
            rejected=None if self.rejected is None else gather(self.rejected),
            fingerprint="",
        )

    def document_bytes(self, tokenizer: Tokenizer, *, trained_only: bool = False) -> Iterator[bytes]:
        """Yields the UTF-8 bytes of each document; for a tokenizer that loses text, those of what it decodes to.

        With `trained_only`, those of the tokens that are trained on.
        """
        check_tokenizer(self, tokenizer)
        for i in range(len(self)):
            ids = self.document(i)
            if trained_only and self.trained is not None:
                ids = ids[self.trained[self.offsets[i] : self.offsets[i + 1]]]
            yield decode_to_bytes(tokenizer, ids)


def decode_to_bytes(tokenizer: Tokenizer, ids: Int[np.ndarray, " S"]) -> bytes:
    """Returns the bytes of `ids`: exact for bytes, UTF-8 of the decoded text for any other tokenizer."""
    if hasattr(tokenizer, "decode_bytes"):
        return tokenizer.decode_bytes(ids)
    return tokenizer.decode(ids).encode("utf-8", errors="replace")


def check_tokenizer(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Raises DataError when `corpus` was made with another tokenizer than `tokenizer`."""
    if corpus.tokenizer != tokenizer.name:
        raise DataError(
            f"the corpus was tokenized with {corpus.tokenizer!r} but is read with {tokenizer.name!r}: "
            "load it again with the tokenizer that the model uses."
        )


def hash64(content: str | bytes) -> int:
    """Returns a hash of `content` that is the same in every process and on every machine, in [0, 2**64)."""
    raw = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def _offsets(lengths: Sequence[int] | Int[np.ndarray, " N"]) -> Int[np.ndarray, " N+1"]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])


def _fingerprint(corpus: Corpus) -> str:
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((corpus.domains, corpus.tokenizer)).encode())
    for name in (*_ARRAYS, *_OPTIONAL_ARRAYS):
        if getattr(corpus, name) is None:
            continue
        array = np.ascontiguousarray(getattr(corpus, name))
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def build_corpus(
    documents: Iterable[Document], tokenizer: Tokenizer, *, domains: Sequence[str] = (), deduplicate: bool = False
) -> Corpus:
    """Tokenizes `documents` into a corpus.

    Documents without any non-blank character, those without a token that is trained on, and with `deduplicate` those
    whose text came before, are skipped; how many is logged. The pieces of a supervised document are tokenized apart.

    Args:
      documents: the texts with their domains, in order.
      tokenizer: makes the tokens.
      domains: names that get the first domain ids, in this order, also when they have no document.
      deduplicate: keep only the first of documents with equal text.

    Raises:
      DataError: no document is left, or a domain has a reserved name.
    """
    domain_index = {name: i for i, name in enumerate(domains)}
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    rows: list[_Row] = []
    all_tokens = _Growing(dtype)
    group_of: dict[int, int] = {}
    blank = repeated = untrained = 0
    for document in documents:
        text = document.text
        raw = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        if not raw or raw.isspace():
            blank += 1
            continue
        content = hash64(raw)
        if deduplicate and content in group_of:
            repeated += 1
            continue
        if document.pieces is None:
            tokens, trained, trained_bytes = tokenizer.encode(text).astype(dtype, copy=False), None, len(raw)
        else:
            tokens, trained, trained_bytes = _encode_pieces(document.pieces, tokenizer, dtype)
            if not trained.any():
                untrained += 1
                continue
        # Equal texts share the group of the first of them, whatever group they came with.
        group = group_of.setdefault(content, content if document.group is None else hash64(document.group))
        # Half a surrogate pair, which a file's name can hold as well, could not be printed.
        domain = document.domain.encode("utf-8", errors="replace").decode("utf-8")
        domain_id = domain_index.setdefault(domain, len(domain_index))
        rows.append(_Row(len(tokens), trained, domain_id, len(raw), trained_bytes, group, content))
        all_tokens.extend(tokens)
        if document.rejected is not None:
            pieces = (*(document.pieces or ((text, True),))[:-1], (document.rejected, True))
            tokens, rejected, _ = _encode_pieces(pieces, tokenizer, dtype)
            size = sum(len(text.encode("utf-8", errors="replace")) for text, _ in pieces)
            # with the hashes of the other answer's: nothing parts the two
            rows.append(_Row(len(tokens), np.zeros(len(tokens), bool), domain_id, size, 0, group, content, rejected))
            all_tokens.extend(tokens)
    if blank or repeated:
        _log.info("skipped %d empty and %d repeated documents of %d", blank, repeated, blank + repeated + len(rows))
    if untrained:
        _log.warning("skipped %d supervised documents without any token to train on", untrained)
    if not rows and untrained:
        raise DataError(f"no documents: {untrained} have no token to train on and {blank} are empty.")
    if not rows:
        raise DataError(f"no documents: {blank} were found and all were empty; at least one with text is needed.")
    return _join(rows, all_tokens.done(), tuple(domain_index), tokenizer.name)


class _Growing:
    """An array that grows in place. A list of pieces, put together at the end, would be in memory twice."""

    def __init__(self, dtype: type):
        self._array, self._size = np.empty(1 << 16, dtype), 0

    def extend(self, values: np.ndarray) -> None:
        end = self._size + len(values)
        if end > len(self._array):
            self._array.resize(max(end, len(self._array) * 5 // 4), refcheck=False)
        self._array[self._size : end] = values
        self._size = end

    def done(self) -> np.ndarray:
        """Returns the array; nothing can be added any more."""
        self._array.resize(self._size, refcheck=False)
        return self._array


class _Row(NamedTuple):
    """A document on its way into a corpus. `trained` None: all tokens; `rejected` None: none; `content`: hash of the
    text.
    """

    num_tokens: int
    trained: np.ndarray | None
    domain_id: int
    num_bytes: int
    trained_bytes: int
    group: int
    content: int
    rejected: np.ndarray | None = None


def _encode_pieces(
    pieces: Iterable[tuple[str, bool]], tokenizer: Tokenizer, dtype: type
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns (tokens, which of them are trained, bytes of these)."""
    encoded = [(tokenizer.encode(text).astype(dtype, copy=False), text, trained) for text, trained in pieces]
    mask = np.concatenate([np.full(len(ids), trained) for ids, _, trained in encoded])
    size = sum(len(text.encode("utf-8", errors="replace")) for _, text, trained in encoded if trained)
    return np.concatenate([ids for ids, _, _ in encoded]), mask, size


def _join(rows: list[_Row], tokens: np.ndarray, domains: tuple[str, ...], tokenizer: str) -> Corpus:
    if not len(tokens):
        raise DataError(f"the tokenizer {tokenizer!r} makes no token at all of {len(rows)} documents.")
    if RESERVED_DOMAIN in domains:
        raise DataError(f"a domain cannot be called {RESERVED_DOMAIN!r}, which names the sum over domains: rename it.")
    supervised = any(row.trained is not None for row in rows)
    masks = [np.ones(row.num_tokens, bool) if row.trained is None else row.trained for row in rows if supervised]
    paired = any(row.rejected is not None for row in rows)
    others = [np.zeros(row.num_tokens, bool) if row.rejected is None else row.rejected for row in rows if paired]
    return Corpus(
        tokens=tokens,
        offsets=_offsets([row.num_tokens for row in rows]),
        domain_ids=np.asarray([row.domain_id for row in rows], np.int32),
        num_bytes=np.asarray([row.num_bytes for row in rows], np.int64),
        groups=_groups(rows),
        domains=domains,
        tokenizer=tokenizer,
        trained=np.concatenate(masks) if supervised else None,
        trained_bytes=np.asarray([row.trained_bytes for row in rows], np.int64) if supervised else None,
        rejected=np.concatenate(others) if paired else None,
    )


def _groups(rows: list[_Row]) -> UInt64[np.ndarray, " N"]:
    """Returns the groups. A prompt that very many supervised documents share holds none of them together: those with
    one fixed prompt could not be split at all."""
    groups = np.asarray([row.group for row in rows], np.uint64)
    supervised = np.asarray([row.trained is not None for row in rows])
    if not supervised.any():
        return groups
    _, which, counts = np.unique(groups, return_inverse=True, return_counts=True)
    contents = np.asarray([row.content for row in rows], np.uint64)
    parted = contents[supervised & (counts[which] > max(_MAX_SHARED, len(rows) // 100))]
    return np.where(np.isin(contents, parted), contents, groups)


def save_corpus(corpus: Corpus, path: str | Path) -> None:
    """Writes `corpus` to `path` (.npz) at once: a reader, or a second writer, never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp: its files are for their owner only, and a cache may be shared.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(temporary, "xb") as file:
            arrays = {name: getattr(corpus, name) for name in (*_ARRAYS, *_OPTIONAL_ARRAYS)}
            arrays = {name: array for name, array in arrays.items() if array is not None}
            texts = {name: np.array(getattr(corpus, name)) for name in ("domains", "tokenizer", "fingerprint")}
            np.savez(file, **arrays, **texts)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_saved_corpus(path: str | Path) -> Corpus:
    """Reads what `save_corpus` wrote.

    Raises:
      DataError: the file is not a saved corpus, or its content does not match its fingerprint.
      OSError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
            arrays |= {name: file[name] for name in _OPTIONAL_ARRAYS if name in file}
            domains = tuple(str(name) for name in file["domains"])
            tokenizer, fingerprint = str(file["tokenizer"]), str(file["fingerprint"])
    except (KeyError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{str(path)!r} is not a saved corpus: {error}") from error
    corpus = Corpus(**arrays, domains=domains, tokenizer=tokenizer)
    if corpus.fingerprint != fingerprint:
        raise DataError(f"{str(path)!r} is damaged: fingerprint {corpus.fingerprint}, expected {fingerprint}.")
    return corpus
