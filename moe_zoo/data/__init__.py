"""Corpora, tokenizers and input pipelines.

The path from text to batches: `load_tokenizer`, `load_corpus`, `split`, then `train_iterator` and `eval_batches`.
"""

from moe_zoo.data.compressors import compressed_bits_per_byte
from moe_zoo.data.corpus import Corpus, Document, build_corpus, load_saved_corpus, save_corpus
from moe_zoo.data.errors import DataError
from moe_zoo.data.pipeline import Batch, PackedSource, count_targets, eval_batches, num_eval_batches, train_iterator
from moe_zoo.data.sources import load_corpus
from moe_zoo.data.split import split
from moe_zoo.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "DataError",
    "Document",
    "PackedSource",
    "Tokenizer",
    "build_corpus",
    "compressed_bits_per_byte",
    "count_targets",
    "eval_batches",
    "load_corpus",
    "load_saved_corpus",
    "load_tokenizer",
    "num_eval_batches",
    "save_corpus",
    "split",
    "train_iterator",
]
