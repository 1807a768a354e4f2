"""Which layers each token of a text goes through."""

import numpy as np

from moe_zoo.analysis.depth_over_text import TokenDepth
from moe_zoo.data.tokenizer import Tokenizer
from moe_zoo.inference.loaded import Loaded
from moe_zoo.inference.text import Pieces


def token_depth(loaded: Loaded, text: str, length: int | None = None) -> TokenDepth:
    """What a model whose layers take some tokens does with a text, each token decided as in generation.

    `length`: in pieces of so many tokens, each read from its beginning; None: as one. Raises ValueError for a model all
    of whose layers take all tokens, and for an empty text.
    """
    layers = sorted(i for _, block, ids in loaded.model.blocks() if block.selects for i in ids)
    if not layers:
        raise ValueError("every layer of this model takes every token: there is no depth to draw")
    ids = np.asarray(loaded.tokenizer.encode(text), np.int32)
    if not len(ids):
        raise ValueError("no text: there is nothing to draw")
    length = min(length or len(ids), len(ids))
    rows = np.resize(ids, (-(-len(ids) // length), length))  # the last row is filled up with what is not looked at
    stats = loaded(rows, return_routing=True).aux.stats
    through_LS = np.stack([np.asarray(through_BS).reshape(-1)[: len(ids)] for through_BS in stats["depth_through"]])
    return TokenDepth(_texts(loaded.tokenizer, ids), through_LS, layers)


def _texts(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    pieces = Pieces(tokenizer)
    texts = [pieces.feed([i]) for i in ids]
    texts[-1] += pieces.finish()
    return texts
