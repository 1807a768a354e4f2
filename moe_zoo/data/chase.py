"""Pointers to follow: a table of N places, each naming a next one, and where K steps from a first one lead.

An example has one token that asks, which names K and the first place, and N that state, each of which names a place
and the next one; its class is where K steps lead. K is drawn from 1 to the most, and the next place from all others, so
that no way back is a shortcut. Ids begin with 1, 0 being padding: questions first, by K and then place.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.data.labelled import Labelled


@dataclasses.dataclass(frozen=True)
class PointersConfig:
    """`places` N, `most` steps, `examples`, drawn by `seed`."""

    places: int = 6
    most: int = 4
    examples: int = 65_536
    seed: int = 0

    def validate(self, path: str) -> None:
        positive(self, path, "places", "most", "examples")
        positive(self, path, "seed", zero=True)
        if self.places < 2:
            raise ConfigError(f"{join(path, 'places')}: {self.places}; expected at least 2")

    @property
    def vocab_size(self) -> int:
        """Ids: padding, questions, statements."""
        return 1 + self.most * self.places + self.places**2

    @property
    def length(self) -> int:
        """Tokens of an example."""
        return 1 + self.places

    def steps(self, tokens: Int[np.ndarray, "B S"]) -> Int[np.ndarray, "B"]:
        """K of these examples."""
        return 1 + (tokens[:, 0] - 1) // self.places


class Pointers:
    """Pointer chasing, generated: the same on every machine."""

    Config = PointersConfig

    def __init__(self, config: PointersConfig):
        self.config = config

    def load(self) -> Labelled:
        """All examples."""
        c = self.config
        # RandomState: numpy promises that its stream never changes
        random, rows = np.random.RandomState(c.seed), np.arange(c.examples)
        table = (np.arange(c.places) + random.randint(1, c.places, (c.examples, c.places))) % c.places
        steps, at = random.randint(1, c.most + 1, c.examples), random.randint(0, c.places, c.examples)
        ask = 1 + (steps - 1) * c.places + at
        state = 1 + c.most * c.places + np.arange(c.places) * c.places + table
        tokens, end = np.concatenate([ask[:, None], state], axis=1), at
        for step in range(c.most):
            end = np.where(step < steps, table[rows, end], end)
        names = tuple(str(name) for name in range(c.places))
        return Labelled({"tokens": tokens.astype(np.int32)}, end.astype(np.int32), names, rows)
