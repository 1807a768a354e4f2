"""Pointers to follow: a table of N places, each naming a next one, and where K steps from a first one lead.

An example is [read here, K, first place, table[0], ..., table[N - 1]] as ids from 1 on, 0 being padding; its class is
the place. K is drawn from 1 to the most, and each entry of the table from all other places: no way back is a shortcut.
"""

import dataclasses

import numpy as np

from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.data.labelled import Labelled


@dataclasses.dataclass(frozen=True)
class PointersConfig:
    """`places` N, `most` steps, `examples`, drawn by `seed`."""

    places: int = 10
    most: int = 8
    examples: int = 65_536
    seed: int = 0

    def validate(self, path: str) -> None:
        positive(self, path, "places", "most", "examples")
        positive(self, path, "seed", zero=True)
        if self.places < 2:
            raise ConfigError(f"{join(path, 'places')}: {self.places}; expected at least 2")

    @property
    def vocab_size(self) -> int:
        """Ids: padding, read here, steps, places."""
        return 2 + self.most + self.places

    @property
    def length(self) -> int:
        """Tokens of an example."""
        return 3 + self.places


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
        place = 2 + c.most
        tokens = np.concatenate([np.stack([np.ones_like(at), 1 + steps, place + at], 1), place + table], axis=1)
        end = at
        for step in range(c.most):
            end = np.where(step < steps, table[rows, end], end)
        names = tuple(str(name) for name in range(c.places))
        return Labelled({"tokens": tokens.astype(np.int32)}, end.astype(np.int32), names, rows)
