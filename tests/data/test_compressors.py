import gzip
import lzma

import numpy as np
import pytest

from moe_zoo.data import ByteTokenizer, DataError, Document, build_corpus, compressed_bits_per_byte

# Words in random order: text on which the compressors' levels differ.
_WORDS = "the expert öther token router gate sends every second third row to a bank of its own".split()
_TEXT = " ".join(np.random.RandomState(0).choice(_WORDS, 20_000))
TEXTS = [(_TEXT[:30_000], "a"), (_TEXT[30_000:60_000], "b"), (_TEXT[60_000:], "a")]


def _corpus(tokenizer):
    return build_corpus([Document(text, domain) for text, domain in TEXTS], tokenizer)


def test_equals_the_modules():
    rates = compressed_bits_per_byte(_corpus(ByteTokenizer()))
    streams = {"a": (TEXTS[0][0] + TEXTS[2][0]).encode(), "b": TEXTS[1][0].encode()}
    packers = {
        "gzip": lambda raw: gzip.compress(raw, 9),
        "xz": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
    }
    assert len(gzip.compress(streams["a"], 9)) != len(gzip.compress(streams["a"], 6))
    for name, pack in packers.items():
        sizes = {domain: len(pack(raw)) for domain, raw in streams.items()}
        for domain, raw in streams.items():
            assert rates[domain][name] == pytest.approx(8 * sizes[domain] / len(raw))
        overall = 8 * sum(sizes.values()) / sum(map(len, streams.values()))
        assert rates["overall"][name] == pytest.approx(overall)


class Pairs:
    """Two letters a token; stands for any tokenizer that is not one of bytes."""

    name, vocab_size, pad_id, bos_id, eos_id = "pairs", 2**20, 2**20 - 1, 2**20 - 2, 2**20 - 3

    def encode(self, text):
        raw = text.encode("utf-16-le")
        return np.frombuffer(raw, np.uint16).astype(np.int32)

    def decode(self, ids):
        return np.asarray(ids).astype(np.uint16).tobytes().decode("utf-16-le")


def test_other_tokenizers_are_decoded():
    corpus = _corpus(Pairs())
    assert corpus.tokens.dtype == np.int32
    assert compressed_bits_per_byte(corpus, Pairs()) == compressed_bits_per_byte(_corpus(ByteTokenizer()))
    with pytest.raises(DataError, match="pass that tokenizer"):
        compressed_bits_per_byte(corpus)
    with pytest.raises(DataError, match="tokenized with 'pairs'"):
        compressed_bits_per_byte(corpus, ByteTokenizer())


def test_empty():
    with pytest.raises(DataError, match="nothing to compress"):
        compressed_bits_per_byte(_corpus(ByteTokenizer()).select(np.zeros(3, bool)))
