"""Tokenizers: bytes, which need nothing, and any `tokenizer.json`."""

import hashlib
import json
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt16

from moe_zoo.core.registry import nearest
from moe_zoo.data.errors import DataError

# Embedding tables are sharded over the vocabulary, so its size has to divide by small powers of two.
VOCAB_MULTIPLE = 8


def _round_up(size: int) -> int:
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@runtime_checkable
class Tokenizer(Protocol):
    """What the data wing needs to know of a tokenizer.

    `name` identifies the mapping itself, not the place it was loaded from: caches are keyed by it and a
    `Corpus` remembers it. The three special ids are distinct, below `vocab_size`, and added by the packing only.
    """

    name: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, text: str | bytes) -> Int[np.ndarray, " S"] | UInt16[np.ndarray, " S"]:
        """Returns the ids of `text`, without special tokens."""
        ...

    def decode(self, ids: Int[np.ndarray, " S"]) -> str:
        """Returns the text of `ids`; special tokens are dropped."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte: ids 0..255, then PAD 256, BOS 257, EOS 258.

    `vocab_size` is 264, rounded up from 259 so that the vocabulary shards; ids 259..263 never occur.
    """

    name = "bytes"
    pad_id = 256
    bos_id = 257
    eos_id = 258
    vocab_size = _round_up(259)

    def encode(self, text: str | bytes) -> UInt16[np.ndarray, " S"]:
        """Returns the bytes of `text` (UTF-8 if it is a `str`), shape (S,), uint16, no special tokens.

        Lone surrogates, which have no UTF-8 form, become "?".
        """
        raw = text.encode("utf-8", errors="replace") if isinstance(text, str) else bytes(text)
        return np.frombuffer(raw, np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: Int[np.ndarray, " S"]) -> bytes:
        """Returns the bytes of `ids`, special tokens dropped: the exact inverse of `encode`."""
        ids = np.asarray(ids).reshape(-1)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

    def decode(self, ids: Int[np.ndarray, " S"]) -> str:
        """Returns the text of `ids`: special tokens dropped, invalid UTF-8 replaced by U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


# Conventional spellings of the special tokens, most specific first.
_SPECIAL_NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|endofpad|>"),
    "bos": ("<s>", "<bos>", "[BOS]", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>"),
    "eos": ("</s>", "<eos>", "[EOS]", "[SEP]", "<|end_of_text|>", "<|endoftext|>", "<|eos|>"),
}


class JsonTokenizer:
    """A `tokenizer.json` through the `tokenizers` library.

    PAD, BOS and EOS are found by their conventional names. One that the file does not have gets a new id after the
    vocabulary, so the three are always there and always distinct.
    """

    def __init__(self, path: str | Path):
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"reading {str(path)!r} needs the `tokenizers` package, which is not installed. "
                "Install it with `pip install tokenizers`, or use the tokenizer 'bytes', which needs nothing."
            ) from error
        path = Path(path)
        content = path.read_bytes()
        try:
            json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{str(path)!r} is not a valid tokenizer.json: {error}") from error
        # Padding and truncation stored in the file are for batches; here they would silently change documents.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A document that happens to contain "</s>" means these four characters, not the end of the document.
        self._tokenizer.encode_special_tokens = True
        self.name = f"{path.stem}-{hashlib.sha256(content).hexdigest()[:12]}"
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        size = max(size, 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1))
        ids = {}
        for kind, names in _SPECIAL_NAMES.items():
            found = (self._tokenizer.token_to_id(name) for name in names)
            ids[kind] = next((i for i in found if i is not None and i not in ids.values()), None)
            if ids[kind] is None:
                ids[kind], size = size, size + 1
        self.pad_id, self.bos_id, self.eos_id = ids["pad"], ids["bos"], ids["eos"]
        self.vocab_size = _round_up(size)

    def encode(self, text: str | bytes) -> Int[np.ndarray, " S"]:
        """Returns the ids of `text`, shape (S,), int32, without special tokens added."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Int[np.ndarray, " S"]) -> str:
        """Returns the text of `ids`; special tokens are dropped."""
        specials = (self.pad_id, self.bos_id, self.eos_id)
        return self._tokenizer.decode([int(i) for i in np.asarray(ids).reshape(-1) if i not in specials])


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Returns the tokenizer called `name_or_path`: "bytes", a `tokenizer.json`, or a folder that holds one.

    Raises:
      DataError: the name is unknown, the file is missing or invalid, or `tokenizers` is not installed.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"unknown tokenizer {str(name_or_path)!r}: neither 'bytes' nor the path of a tokenizer.json."
            + nearest(str(name_or_path), ["bytes"])
        )
    return JsonTokenizer(path)
