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

import numpy as np
from jaxtyping import Bool, Int, UInt16, UInt64

from moe_zoo.data.errors import DataError
from moe_zoo.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_ARRAYS = ("tokens", "offsets", "domain_ids", "num_bytes", "groups")
# Tables of results have a row of this name beside the domains.
RESERVED_DOMAIN = "overall"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text before tokenization. `group`: documents of one group never part in `split`; default: the text itself."""

    text: str | bytes
    domain: str
    group: str | bytes | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """All documents of a data set, tokenized and concatenated without special tokens.

    Attributes:
      tokens: (T,) uint16 or int32; document i is `tokens[offsets[i]:offsets[i + 1]]`.
      offsets: (N + 1,) int64.
      domain_ids: (N,) int32, indices into `domains`.
      num_bytes: (N,) int64, UTF-8 bytes of each document; bits per byte are counted over these.
      groups: (N,) uint64 hashes; documents with equal hashes land in the same split. Equal texts have equal hashes.
      domains: names; a subset of a corpus keeps all names, so that ids mean the same in every split.
      tokenizer: name of the tokenizer that made `tokens`.
      fingerprint: hash of all of the above, 16 hexadecimal digits.
    """

    tokens: UInt16[np.ndarray, " T"] | Int[np.ndarray, " T"]
    offsets: Int[np.ndarray, " N+1"]
    domain_ids: Int[np.ndarray, " N"]
    num_bytes: Int[np.ndarray, " N"]
    groups: UInt64[np.ndarray, " N"]
    domains: tuple[str, ...]
    tokenizer: str
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
        sums = np.bincount(self.domain_ids, self.num_bytes, minlength=len(self.domains))
        return {name: int(total) for name, total in zip(self.domains, sums, strict=True)}

    def targets_per_domain(self) -> dict[str, int]:
        """Returns the number of targets a model is trained on in each domain: its tokens, and one EOS per document.

        Bits per byte of a domain are (mean negative log2-likelihood per target) * targets / bytes, which holds
        approximately for a sample of the rows and exactly for all of them.
        """
        counts = np.bincount(self.domain_ids, np.diff(self.offsets) + 1, minlength=len(self.domains))
        return {name: int(total) for name, total in zip(self.domains, counts, strict=True)}

    def token_counts(self, vocab_size: int) -> Int[np.ndarray, " V"]:
        """Returns how often each token id occurs."""
        return np.bincount(self.tokens, minlength=vocab_size)

    def select(self, keep: Bool[np.ndarray, " N"] | Int[np.ndarray, " M"]) -> "Corpus":
        """Returns the corpus of the documents in `keep` (a mask, or indices in the wanted order)."""
        index = np.flatnonzero(keep) if np.asarray(keep).dtype == bool else np.asarray(keep, np.int64)
        pieces = [self.document(i) for i in index]
        return dataclasses.replace(
            self,
            tokens=np.concatenate(pieces) if pieces else self.tokens[:0],
            offsets=_offsets(np.diff(self.offsets)[index]),
            domain_ids=self.domain_ids[index],
            num_bytes=self.num_bytes[index],
            groups=self.groups[index],
            fingerprint="",
        )

    def document_bytes(self, tokenizer: Tokenizer) -> Iterator[bytes]:
        """Yields the UTF-8 bytes of each document; for a tokenizer that loses text, those of what it decodes to."""
        check_tokenizer(self, tokenizer)
        for i in range(len(self)):
            yield decode_to_bytes(tokenizer, self.document(i))


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
    for name in _ARRAYS:
        array = np.ascontiguousarray(getattr(corpus, name))
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def build_corpus(
    documents: Iterable[Document], tokenizer: Tokenizer, *, domains: Sequence[str] = (), deduplicate: bool = False
) -> Corpus:
    """Tokenizes `documents` into a corpus.

    Documents without any non-blank character, and with `deduplicate` those whose text came before, are skipped;
    how many is logged.

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
    pieces, ids, sizes, groups = [], [], [], []
    group_of: dict[int, int] = {}
    blank = repeated = 0
    for document in documents:
        text = document.text
        raw = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        if not raw.strip():
            blank += 1
            continue
        content = hash64(raw)
        if deduplicate and content in group_of:
            repeated += 1
            continue
        # Equal texts share the group of the first of them, whatever group they came with.
        group = group_of.setdefault(content, content if document.group is None else hash64(document.group))
        pieces.append(tokenizer.encode(text).astype(dtype))
        ids.append(domain_index.setdefault(document.domain, len(domain_index)))
        sizes.append(len(raw))
        groups.append(group)
    if blank or repeated:
        _log.info("skipped %d empty and %d repeated documents of %d", blank, repeated, blank + repeated + len(pieces))
    if not pieces:
        raise DataError(f"no documents: {blank} were found and all were empty; at least one with text is needed.")
    if not sum(len(piece) for piece in pieces):
        raise DataError(f"the tokenizer {tokenizer.name!r} makes no token at all of {len(pieces)} documents.")
    if RESERVED_DOMAIN in domain_index:
        raise DataError(f"a domain cannot be called {RESERVED_DOMAIN!r}, which names the sum over domains: rename it.")
    return Corpus(
        tokens=np.concatenate(pieces),
        offsets=_offsets([len(piece) for piece in pieces]),
        domain_ids=np.asarray(ids, np.int32),
        num_bytes=np.asarray(sizes, np.int64),
        groups=np.asarray(groups, np.uint64),
        domains=tuple(domain_index),
        tokenizer=tokenizer.name,
    )


def save_corpus(corpus: Corpus, path: str | Path) -> None:
    """Writes `corpus` to `path` (.npz) at once: a reader, or a second writer, never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp: its files are for their owner only, and a cache may be shared.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(temporary, "xb") as file:
            arrays = {name: getattr(corpus, name) for name in _ARRAYS}
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
            domains = tuple(str(name) for name in file["domains"])
            tokenizer, fingerprint = str(file["tokenizer"]), str(file["fingerprint"])
    except (KeyError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{str(path)!r} is not a saved corpus: {error}") from error
    corpus = Corpus(**arrays, domains=domains, tokenizer=tokenizer)
    if corpus.fingerprint != fingerprint:
        raise DataError(f"{str(path)!r} is damaged: fingerprint {corpus.fingerprint}, expected {fingerprint}.")
    return corpus
