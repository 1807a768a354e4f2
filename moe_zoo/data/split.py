"""Training, validation and test parts of a corpus, by document."""

import logging

import numpy as np
from jaxtyping import Int

from moe_zoo.data.corpus import Corpus, check_tokenizer, decode_to_bytes, hash64
from moe_zoo.data.errors import DataError
from moe_zoo.data.tokenizer import ByteTokenizer, Tokenizer

_log = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")
_TRAIN, _VALIDATION, _TEST = range(3)

# In every domain, validation and test each hold between these multiples of their share of the bytes.
_LOW, _HIGH = 0.75, 2.0
# How far from its exact place a cut may move to find a paragraph, in tokens.
_CUT_WINDOW = 2_000


def split(
    corpus: Corpus,
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05),
    seed: int = 0,
    *,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Corpus]:
    """Splits `corpus` by document into {"train", "validation", "test"}.

    A hash of a document's text and `seed` says where it goes, so a document keeps its place when others come or go, and
    a repeated document is never in two parts. Only where that would leave validation or test of a domain with less than
    3/4 or more than twice its share of the bytes are documents moved, those nearest in the hash first.

    A domain of too few documents for that (a user's one text file) is cut instead: each document into contiguous
    ranges, training first and test last, at a paragraph or line. The log says so. Supervised documents are never cut.

    Args:
      corpus: what to split.
      fractions: shares of the bytes for train, validation and test; they add up to 1.
      seed: another seed, another split.
      tokenizer: needed for cutting when the corpus is not one of bytes.

    Raises:
      DataError: impossible fractions, too few supervised documents, or a part with a share would get no document.
    """
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(
            f"split fractions {tuple(fractions)}: expected three numbers for train, validation and test, none "
            "negative, train above 0, that add up to 1, such as (0.9, 0.05, 0.05)."
        )
    groups, group_of = np.unique(corpus.groups, return_inverse=True)
    # sizes[d, g]: bytes of group g in domain d.
    sizes = np.zeros((len(corpus.domains), len(groups)), np.int64)
    np.add.at(sizes, (corpus.domain_ids, group_of), corpus.num_bytes)
    to_cut = np.array([row.any() and _too_few(row[row > 0], fractions) for row in sizes], bool)
    # A text in a domain that is cut and in one that is not must be cut in both, or it would be in two parts.
    cut_groups = sizes[to_cut].any(axis=0)
    sizes[:, cut_groups] = 0
    part_of_group = _assign(sizes, _uniform(groups, seed), fractions)

    part = part_of_group[group_of]
    cut = cut_groups[group_of]
    parts = {name: corpus.select((part == p) & ~cut) for p, name in enumerate(PARTS)}
    if cut.any():
        _check_can_cut(corpus, cut)
        _log.warning(
            "split: too few documents to split by document in %s: %d documents are cut into contiguous ranges "
            "(train, then validation, then test)",
            ", ".join(corpus.domains[d] for d in np.flatnonzero(to_cut)), int(cut.sum()),
        )  # fmt: skip
        parts = _add_pieces(parts, corpus, np.flatnonzero(cut), fractions, tokenizer)
    _check_parts(parts, corpus, fractions)
    return parts


def _check_can_cut(corpus: Corpus, cut: np.ndarray) -> None:
    """Raises DataError if a document to cut is supervised: a piece of it would be an answer without a prompt."""
    if corpus.trained is None:
        return
    supervised = cut & (corpus.trained_bytes < corpus.num_bytes)
    if supervised.any():
        names = ", ".join(corpus.domains[d] for d in np.unique(corpus.domain_ids[supervised]))
        raise DataError(
            f"too few supervised documents to split in {names} ({int(supervised.sum())}, which are never cut): give "
            "more of them, with different prompts, or fractions of 0 for validation and test."
        )


def _uniform(groups: Int[np.ndarray, " G"], seed: int) -> np.ndarray:
    """Returns a number in [0, 1) per group, which depends on the group and the seed alone."""
    return np.array([hash64(f"{seed}:{int(group)}") for group in groups], np.float64) / 2.0**64


def _too_few(sizes: Int[np.ndarray, " G"], fractions: tuple[float, float, float]) -> bool:
    """Whether documents of these sizes cannot fill validation and test without one of them being far too large."""
    shares = [fraction * sizes.sum() for fraction in fractions[1:] if fraction > 0]
    if not shares:
        return False
    small = sizes[sizes <= _HIGH * min(shares)]
    return len(small) < len(shares) or len(sizes) <= len(shares) or small.sum() < _LOW * sum(shares)


def _assign(
    sizes: Int[np.ndarray, "D G"], uniform: np.ndarray, fractions: tuple[float, float, float]
) -> Int[np.ndarray, " G"]:
    """Returns the part of each group: by its hash, then balanced domain by domain."""
    _, validation, test = fractions
    part = np.where(uniform < test, _TEST, np.where(uniform < test + validation, _VALIDATION, _TRAIN))
    order = np.argsort(uniform, kind="stable")
    settled = np.zeros(len(part), bool)
    for row in sizes:
        members = order[row[order] > 0]
        for p in (_TEST, _VALIDATION):
            share = fractions[p] * row.sum()
            if share <= 0:
                continue
            total = row[members[(part[members] == p) & settled[members]]].sum()
            for g in members[(part[members] == p) & ~settled[members]]:
                if total + row[g] <= _HIGH * share:
                    total += row[g]
                else:
                    part[g] = _TRAIN
            for g in members:
                if total >= _LOW * share:
                    break
                if part[g] == _TRAIN and total + row[g] <= _HIGH * share:
                    part[g] = p
                    total += row[g]
        settled |= row > 0
    return part


def _add_pieces(
    parts: dict[str, Corpus],
    corpus: Corpus,
    documents: Int[np.ndarray, " M"],
    fractions: tuple[float, float, float],
    tokenizer: Tokenizer | None,
) -> dict[str, Corpus]:
    """Appends to each part its range of every one of `documents`."""
    tokenizer = tokenizer or (ByteTokenizer() if corpus.tokenizer == ByteTokenizer.name else None)
    if tokenizer is None:
        raise DataError(f"cutting documents made with the tokenizer {corpus.tokenizer!r} needs split(..., tokenizer=).")
    check_tokenizer(corpus, tokenizer)
    rows = {name: [] for name in PARTS}
    for i in documents:
        for name, piece in zip(PARTS, _pieces(corpus.document(i), fractions, tokenizer), strict=True):
            size = len(decode_to_bytes(tokenizer, piece))
            if size:
                rows[name].append((piece, corpus.domain_ids[i], size, hash64(np.ascontiguousarray(piece).tobytes())))
    return {name: _append(parts[name], rows[name]) for name in PARTS}


def _append(corpus: Corpus, rows: list[tuple[np.ndarray, int, int, int]]) -> Corpus:
    pieces, domain_ids, num_bytes, groups = zip(*rows, strict=True) if rows else ((), (), (), ())
    ends = len(corpus.tokens) + np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return Corpus(
        tokens=np.concatenate([corpus.tokens, *pieces]),
        offsets=np.concatenate([corpus.offsets, ends]),
        domain_ids=np.concatenate([corpus.domain_ids, np.asarray(domain_ids, np.int32)]),
        num_bytes=np.concatenate([corpus.num_bytes, np.asarray(num_bytes, np.int64)]),
        groups=np.concatenate([corpus.groups, np.asarray(groups, np.uint64)]),
        domains=corpus.domains,
        tokenizer=corpus.tokenizer,
        trained=_and(corpus.trained, np.ones(ends[-1] - len(corpus.tokens) if rows else 0, bool)),
        trained_bytes=_and(corpus.trained_bytes, np.asarray(num_bytes, np.int64)),
        rejected=_and(corpus.rejected, np.zeros(ends[-1] - len(corpus.tokens) if rows else 0, bool)),
    )


def _and(array: np.ndarray | None, more: np.ndarray) -> np.ndarray | None:
    return None if array is None else np.concatenate([array, more])


def _pieces(
    tokens: Int[np.ndarray, " S"], fractions: tuple[float, float, float], tokenizer: Tokenizer
) -> list[np.ndarray]:
    """Cuts one document into its train, validation and test ranges."""
    train, validation, test = fractions
    first = _boundary(tokens, round(len(tokens) * train), tokenizer) if validation + test > 0 else len(tokens)
    second = _boundary(tokens, round(len(tokens) * (train + validation)), tokenizer) if test > 0 else len(tokens)
    if validation <= 0:
        first = second
    return np.split(tokens, [first, max(first, second)])


def _boundary(tokens: Int[np.ndarray, " S"], target: int, tokenizer: Tokenizer) -> int:
    """Returns the best place to cut near `target`: after a paragraph, else a line, else between two characters."""
    # A short document has no room to look around in: at most a hundredth of it, so that no part loses its share.
    reach = min(_CUT_WINDOW, max(8, len(tokens) // 100))
    start, stop = max(1, target - reach), min(len(tokens) - 1, target + reach)
    best, best_rank = target, (0, 0)
    before = decode_to_bytes(tokenizer, tokens[max(0, start - 2) : start])
    for i in range(start, stop + 1):
        after = decode_to_bytes(tokenizer, tokens[i : i + 1])
        inside_character = bool(after) and after[0] & 0xC0 == 0x80
        level = 3 if before.endswith(b"\n\n") else 2 if before.endswith(b"\n") else 0 if inside_character else 1
        best, best_rank = max((best, best_rank), (i, (level, -abs(i - target))), key=lambda pair: pair[1])
        before = (before + after)[-2:]
    return best


def _check_parts(parts: dict[str, Corpus], corpus: Corpus, fractions: tuple[float, float, float]) -> None:
    total = corpus.bytes_per_domain()
    for name, fraction in zip(PARTS, fractions, strict=True):
        if fraction > 0 and not len(parts[name]):
            raise DataError(
                f"the part {name!r} (fraction {fraction}) gets no text: {len(corpus)} documents with "
                f"{int(corpus.num_bytes.sum()):,} bytes are too few. Give more text, or a fraction of 0."
            )
        missing = [d for d, size in parts[name].bytes_per_domain().items() if fraction > 0 and total[d] and not size]
        if missing:
            _log.warning("split: the part %s has no text of the domain(s) %s", name, ", ".join(missing))
