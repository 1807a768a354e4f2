"""Ids that come a few at a time as text: whole characters only, cut at stop strings."""

from collections.abc import Callable, Sequence

import numpy as np

from moe_zoo.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class Pieces:
    """Ids -> pieces of text whose concatenation is `tokenizer.decode` of all ids.

    A piece is what the window of the latest ids says beyond its first part, which was given out before: what a
    tokenizer does at the start of a text (dropping a space, say) happens once. A text that ends in the middle of a
    character waits.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._ids, self._start, self._given = tokenizer, [], 0, 0

    def feed(self, ids: Sequence[int]) -> str:
        self._ids += [int(i) for i in ids]
        return self._next(final=False)

    def finish(self) -> str:
        """The rest, unfinished characters replaced."""
        return self._next(final=True)

    def _next(self, final: bool) -> str:
        decode = lambda end: self._tokenizer.decode(np.asarray(self._ids[self._start : end], np.int32))
        before, text = decode(self._given), decode(len(self._ids))
        if len(text) <= len(before) or (text.endswith(_REPLACEMENT) and not final):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return text[len(before) :]


class Stops:
    """Text up to the first of some strings. What may be the beginning of one is held back until that is known."""

    def __init__(self, strings: Sequence[str]):
        self._strings, self._held, self.found = tuple(strings), "", False

    def feed(self, piece: str) -> str:
        if self.found:
            return ""
        text = self._held + piece
        at = min((i for i in (text.find(s) for s in self._strings) if i >= 0), default=None)
        if at is not None:
            self.found, self._held = True, ""
            return text[:at]
        longest = max((len(s) for s in self._strings), default=1) - 1
        keep = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._strings)), 0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class Writer:
    """What one call of `Loaded.generate` writes: a text per row, pieces of it told as they are known."""

    def __init__(
        self, tokenizer: Tokenizer, rows: int, stop: Sequence[str], on_text: Callable[[int, str], None] | None
    ):
        self._pieces = [Pieces(tokenizer) for _ in range(rows)]
        self._stops = [Stops(stop) for _ in range(rows)]
        self._parts: list[list[str]] = [[] for _ in range(rows)]
        self._on_text = on_text

    def tokens(self, row: int, ids: np.ndarray) -> bool:
        """Takes new ids; True if the row has reached a stop string."""
        self._give(row, self._stops[row].feed(self._pieces[row].feed(ids)))
        return self._stops[row].found

    def finish(self) -> list[str]:
        """The texts, with all that was still held back."""
        for row, (pieces, stops) in enumerate(zip(self._pieces, self._stops)):
            self._give(row, stops.feed(pieces.finish()))
            self._give(row, stops.finish())
        return ["".join(parts) for parts in self._parts]

    def _give(self, row: int, text: str) -> None:
        if text:
            self._parts[row].append(text)
            if self._on_text is not None:
                self._on_text(row, text)
