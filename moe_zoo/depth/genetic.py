"""How sparse each block should be, for a mean that is given: a genetic search, after FTP (arXiv 2412.11494).

A vector s has a sparsity per block. Children are mixed of two good parents, then sparsity is moved from one block to
another: neither changes the mean. Blocks that must stay whole have zero.

L blocks, P vectors.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from moe_zoo.core.registry import ConfigError


@dataclasses.dataclass(frozen=True)
class Evolution:
    """`elites`: vectors that stay and have children. `most`: the largest sparsity of a block. `moved`: how much a
    mutation moves at most.
    """

    population: int = 20
    generations: int = 20
    elites: int = 5
    most: float = 0.95
    moved: float = 0.2

    def best(
        self,
        cost: Callable[[Float[np.ndarray, "P L"]], Float[np.ndarray, "P"]],
        L: int,
        mean: float,
        *,
        whole: Sequence[int] = (),
        seed: int = 0,
    ) -> tuple[Float[np.ndarray, "L"], list[float]]:
        """The vector of the lowest `cost` that was found, and the lowest cost of every generation, which never rises.

        `whole`: blocks that nothing is taken from. Equal sparsities are among the first. Raises ConfigError if the mean
        cannot be reached.
        """
        free = np.setdiff1d(np.arange(L), np.asarray(whole, int) % L)
        if not 0 <= mean * L <= self.most * len(free):
            raise ConfigError(
                f"mean: {mean} of {L} blocks, {len(free)} of them free and each at most {self.most}; at most "
                f"{self.most * len(free) / L:.3f}"
            )
        random, total = np.random.default_rng(seed), mean * L
        drawn = [self._fitted(random.random(len(free)), total) for _ in range(self.population - 1)]
        vectors = np.stack([np.full(len(free), total / len(free)), *drawn])
        widen = lambda few: _at(few, free, L)
        costs, history = np.asarray(cost(widen(vectors))), []
        for _ in range(self.generations):
            order = np.argsort(costs, kind="stable")[: self.elites]
            vectors, costs = vectors[order], costs[order]
            history.append(float(costs[0]))
            children = np.stack([self._child(vectors, total, random) for _ in range(self.population - len(vectors))])
            vectors, costs = np.concatenate([vectors, children]), np.append(costs, cost(widen(children)))
        history.append(float(costs.min()))
        return widen(vectors)[costs.argmin()], history

    def _child(self, parents, total: float, random: np.random.Generator):
        """Between two parents, with sparsity moved between two blocks."""
        one, other = parents[random.integers(len(parents), size=2)]
        part = random.random()
        child = part * one + (1 - part) * other
        if len(child) > 1:
            a, b = random.choice(len(child), 2, replace=False)
            moved = min(self.moved * random.random(), child[a], self.most - child[b])
            child[a], child[b] = child[a] - moved, child[b] + moved
        return self._fitted(child, total)

    def _fitted(self, vector, total: float):
        """The nearest of its kind with that sum, between 0 and `most`."""
        vector = np.clip(vector, 0, self.most)
        for _ in range(100):
            missing = total - vector.sum()
            room = self.most - vector if missing > 0 else vector
            if abs(missing) < 1e-12 or room.sum() == 0:
                break
            vector = np.clip(vector + missing * room / room.sum(), 0, self.most)
        return vector


def _at(few, free, L: int):
    out = np.zeros((len(few), L))
    out[:, free] = few
    return out
