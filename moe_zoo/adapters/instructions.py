"""Instructions as vectors: what adapters compare that route by what a sequence asks for."""

import hashlib
from collections.abc import Sequence

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

_GRAMS = (3, 4, 5)


def embed(texts: Sequence[str], size: int) -> Float[np.ndarray, "B M"]:
    """A vector of length 1 for each text: its character n-grams, hashed into `size` numbers with a sign each.

    The same on every machine. Texts with words in common are close, synonyms are not; a sentence encoder's vectors can
    be used instead wherever these are. Raises ValueError for a text without letters.
    """
    out = np.zeros((len(texts), size), np.float32)
    for row, text in zip(out, texts, strict=True):
        words = f" {' '.join(text.lower().split())} "
        if not words.strip():
            raise ValueError("an empty instruction: expected a text that says what is asked for")
        for n in _GRAMS:
            for start in range(max(len(words) - n + 1, 0)):
                digest = hashlib.blake2b(words[start : start + n].encode(), digest_size=8).digest()
                number = int.from_bytes(digest, "little")
                row[(number >> 1) % size] += 1 - 2 * (number & 1)
        row /= max(float(np.linalg.norm(row)), 1e-12)
    return out


def of_each(
    model: nnx.Module, instructions: str | Sequence[str] | Float[Array, "B M"], batch: int
) -> Float[np.ndarray, "B M"]:
    """An embedding for each of `batch` sequences: of its text, of one text for all, or as it is given.

    Raises ValueError if the model's adapters do not look at instructions, or there is not one for each sequence.
    """
    size = getattr(model, "instruction_size", None)
    if size is None:
        raise ValueError("instructions: this model has no adapters that route by them, such as 'glider'")
    if not np.asarray(model.adapters.embeddings[...]).any():
        raise ValueError("instructions: what the experts are for is not known; see transform.describe_experts")
    texts = [instructions] * batch if isinstance(instructions, str) else instructions
    if all(isinstance(text, str) for text in texts):
        texts = embed(texts, size)
    vectors = np.asarray(texts, np.float32)
    if vectors.shape != (batch, size):
        raise ValueError(
            f"instructions: expected one for each of {batch} sequences, texts or embeddings of {size} numbers; got "
            f"{list(vectors.shape)}"
        )
    return vectors
