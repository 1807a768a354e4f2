"""Tokenizers: bytes, which need nothing, and any `tokenizer.json`."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt16

from moe_zoo.core.registry import nearest
from moe_zoo.data.errors import DataError

_log = logging.getLogger(__name__)

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
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|endofpad|>", "<｜▁pad▁｜>"),
    "bos": (
        "<s>",
        "<bos>",
        "[BOS]",
        "[CLS]",
        "<|begin_of_text|>",
        "<|startoftext|>",
        "<|bos|>",
        "<｜begin▁of▁sentence｜>",
    ),
    "eos": ("</s>", "<eos>", "[EOS]", "[SEP]", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "<｜end▁of▁sentence｜>"),
}
# Files of other tokenizers, for a folder that has no tokenizer.json.
_OTHER_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")


class JsonTokenizer:
    """A `tokenizer.json` through the `tokenizers` library.

    PAD, BOS and EOS are those of the `tokenizer_config.json` beside it, if there is one, else they are found by their
    conventional names. One that the file does not have, or that is another one's as well, gets a new id after the
    vocabulary, so the three are always there and always distinct. The log says which they are.
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
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {str(path)!r}: {error.strerror or error}.") from error
        self._tokenizer = _parse(tokenizers, content, path)
        # Padding and truncation stored in the file are for batches; here they would silently change documents.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A document that happens to contain "</s>" means these four characters, not the end of the document.
        self._tokenizer.encode_special_tokens = True
        self.name = f"{path.stem}-{hashlib.sha256(content).hexdigest()[:12]}"
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if not size:
            raise DataError(f"{str(path)!r} has an empty vocabulary: expected a trained tokenizer.")
        size = max(size, 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1))
        ids, size = self._special_ids(_declared_specials(path), size)
        self.pad_id, self.bos_id, self.eos_id = ids["pad"], ids["bos"], ids["eos"]
        self.vocab_size = _round_up(size)

    def _special_ids(self, declared: dict[str, str], size: int) -> tuple[dict[str, int], int]:
        """Returns ({"pad", "bos", "eos"}, the vocabulary's size with those that are new)."""
        ids: dict[str, int | None] = dict.fromkeys(_SPECIAL_NAMES)
        # EOS first: where one token is declared as all of them, documents end in it.
        order = [kind for kind in ("eos", "bos", "pad") if kind in declared]
        for kind in (*order, *(kind for kind in _SPECIAL_NAMES if kind not in declared)):
            names = (declared[kind],) if kind in declared else _SPECIAL_NAMES[kind]
            found = (self._tokenizer.token_to_id(name) for name in names)
            ids[kind] = next((i for i in found if i is not None and i not in ids.values()), None)
        new = [kind for kind, i in ids.items() if i is None]
        ids |= {kind: size + i for i, kind in enumerate(new)}
        shown = ", ".join(f"{kind} {i}{' (new)' if kind in new else ''}" for kind, i in ids.items())
        _log.info("tokenizer %s: %d tokens; %s", self.name, size, shown)
        return ids, size + len(new)

    def encode(self, text: str | bytes) -> Int[np.ndarray, " S"]:
        """Returns the ids of `text`, shape (S,), int32, without special tokens added.

        Raises:
          DataError: the tokenizer cannot encode it, for example for want of an unknown token.
        """
        text = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
        # Lone surrogates have no UTF-8 form, which the library needs; they become "?", as with bytes.
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        with _library_errors(f"the tokenizer {self.name!r} cannot encode a text"):
            return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_rendered(self, text: str) -> Int[np.ndarray, " S"]:
        """As `encode`, for the text of a chat template: special tokens written in it are special tokens."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Int[np.ndarray, " S"]) -> str:
        """Returns the text of `ids`; special tokens are dropped."""
        specials = (self.pad_id, self.bos_id, self.eos_id)
        return self._tokenizer.decode([int(i) for i in np.asarray(ids).reshape(-1) if i not in specials])


def _parse(tokenizers: ModuleType, content: bytes, path: Path) -> "tokenizers.Tokenizer":
    if content.startswith(b"version https://git-lfs"):
        raise DataError(f"{str(path)!r} is a Git LFS pointer, not the tokenizer itself: run `git lfs pull`.")
    with _library_errors(f"{str(path)!r} is not a valid tokenizer.json"):
        json.loads(content)
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turns what `tokenizers` raises into DataError: bare Exception, and panics that are not even one."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise DataError(f"{what}: {' '.join(str(error).split())[:200]}") from error


def _declared_specials(path: Path) -> dict[str, str]:
    """Returns {"pad" | "bos" | "eos": token} as far as the `tokenizer_config.json` beside `path` names them."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return {}
    try:
        values = json.loads(config.read_bytes())
        tokens = {kind: values.get(f"{kind}_token") for kind in _SPECIAL_NAMES}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        _log.warning("%s is not used: %s", config, " ".join(str(error).split())[:200])
        return {}
    tokens = {kind: token.get("content") if isinstance(token, dict) else token for kind, token in tokens.items()}
    return {kind: token for kind, token in tokens.items() if isinstance(token, str)}


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Returns the tokenizer called `name_or_path`: "bytes", a `tokenizer.json`, or a folder that holds one.

    Raises:
      DataError: the name is unknown, the file is missing or invalid, or `tokenizers` is not installed.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isdir(path):
        if not (path / "tokenizer.json").is_file():
            others = [name for name in _OTHER_FILES if (path / name).is_file()]
            there = f"; {', '.join(others)} must be converted, for example with transformers" if others else ""
            raise DataError(f"the folder {str(name_or_path)!r} has no tokenizer.json{there}.")
        path = path / "tokenizer.json"
    if not os.path.isfile(path):
        raise DataError(
            f"unknown tokenizer {str(name_or_path)!r}: neither 'bytes' nor the path of a tokenizer.json."
            + nearest(path.name, ["bytes", *_siblings(path)])
        )
    return JsonTokenizer(path)


def _siblings(path: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(path.parent) if name.endswith(".json"))
    except OSError:
        return []
