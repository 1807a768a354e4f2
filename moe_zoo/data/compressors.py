"""What general-purpose compressors reach on a corpus: the figures that a language model's are put beside."""

import gzip
import lzma

from moe_zoo.data.corpus import RESERVED_DOMAIN, Corpus
from moe_zoo.data.errors import DataError
from moe_zoo.data.tokenizer import ByteTokenizer, Tokenizer


def compressed_bits_per_byte(corpus: Corpus, tokenizer: Tokenizer | None = None) -> dict[str, dict[str, float]]:
    """Returns compressed bits per byte of text as {domain: {"gzip": .., "xz": ..}, "overall": {..}}.

    Each domain's documents are compressed as one stream, in order, with the settings of `gzip -9` and `xz -9e`, headers
    included. "overall" weighs the domains by their bytes. Domains without text are left out. Of supervised documents it
    is the answers alone, the bytes that a model is scored on; unlike the model, the compressors do not see the prompts.

    Args:
      corpus: usually the test part.
      tokenizer: gives the bytes back; not needed for a corpus of bytes. The bytes are those of the decoded text.

    Raises:
      DataError: no text, or the tokenizer is missing or another one than the corpus was made with.
    """
    tokenizer = tokenizer or (ByteTokenizer() if corpus.tokenizer == ByteTokenizer.name else None)
    if tokenizer is None:
        raise DataError(f"the corpus was tokenized with {corpus.tokenizer!r}: pass that tokenizer, to get its bytes.")
    streams: dict[str, list[bytes]] = {}
    for domain_id, raw in zip(corpus.domain_ids, corpus.document_bytes(tokenizer, trained_only=True), strict=True):
        streams.setdefault(corpus.domains[domain_id], []).append(raw)
    if not streams:
        raise DataError("the corpus has no documents: nothing to compress.")
    sizes = {name: _sizes(b"".join(streams[name])) for name in corpus.domains if name in streams}
    totals = {key: sum(row[key] for row in sizes.values()) for key in ("bytes", "gzip", "xz")}
    return {name: _rates(row) for name, row in (sizes | {RESERVED_DOMAIN: totals}).items()}


def _sizes(raw: bytes) -> dict[str, int]:
    return {
        "bytes": len(raw),
        "gzip": len(gzip.compress(raw, compresslevel=9, mtime=0)),
        "xz": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    }


def _rates(sizes: dict[str, int]) -> dict[str, float]:
    return {name: 8 * sizes[name] / sizes["bytes"] for name in ("gzip", "xz")}
