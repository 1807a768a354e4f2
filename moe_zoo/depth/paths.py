"""Paths through a stack of layers that answer a question right, found by trying: what selectors of depth learn from.

A path says how often each layer is executed, in order: i8[L] in {0, 1, 2}; all ones is the model as it is. Dr.LLM
(arXiv 2510.12773) searches by a tree: an action skips one or two neighbours of the path or repeats a place of it, a
node is a path, and the child that is looked into next has the largest

    Q / v + c sqrt(ln N / v) - lambda |path| / L          Q of its v visits' paths were right, N visits of the parent

or with some probability is any. Every node is expanded by all of its actions before its children are chosen among (the
released code never gives a node a second child), no path is tried twice, and no layer runs a third time.

L layers, P paths, Q questions.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Sequence

import numpy as np
from jaxtyping import Bool, Int

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TreeSearch:
    """`simulations`: paths tried for a question at most. It ends early with a right path that is `enough` layers
    shorter than the model, or with any right one where the model itself is wrong. `explore`: c, `length_cost`: lambda.
    """

    simulations: int = 50
    explore: float = 1.8
    length_cost: float = 3.0
    random: float = 0.1
    skips: tuple[int, ...] = (1, 2)
    most: int = 2
    enough: int = 2

    def of_question(self, L: int, random: np.random.Generator) -> Generator[Path, bool, list[Path]]:
        """Yields paths, is sent whether they were right, and returns those that were."""
        root, seen, right = Node((1,) * L), {(1,) * L}, []
        root.untried = self._actions(root.path, seen, random)
        for _ in range(self.simulations):
            trail = [root]
            if root.visits:
                trail = self._descend(root, seen, random)
            if trail is None:
                break
            hit = yield trail[-1].path
            for node in trail:
                node.visits, node.value = node.visits + 1, node.value + hit
            if hit:
                right.append(trail[-1].path)
            if hit and trail[-1] is not root and (not root.hit or sum(trail[-1].path) <= L - self.enough):
                break
            trail[-1].hit = hit
        return right

    def _descend(self, root: "Node", seen: set[Path], random: np.random.Generator) -> list["Node"] | None:
        """From the root to a new node; None: all paths have been tried."""
        trail = [root]
        while not trail[-1].untried:
            open_ = [child for child in trail[-1].children if not child.closed]
            if not open_:
                trail[-1].closed = True
                trail.pop()
                if not trail:
                    return None
                continue
            trail.append(self._choose(trail[-1], open_, random))
        path = trail[-1].untried.pop()
        if path in seen:  # found from another node meanwhile
            return self._descend(root, seen, random)
        seen.add(path)
        child = Node(path)
        child.untried = self._actions(path, seen, random)
        trail[-1].children.append(child)
        return [*trail, child]

    def _choose(self, parent: "Node", children: Sequence["Node"], random: np.random.Generator) -> "Node":
        if random.random() < self.random:
            return children[random.integers(len(children))]
        L = len(parent.path)

        def score(node: Node) -> float:
            spread = self.explore * math.sqrt(math.log(parent.visits) / node.visits)
            return node.value / node.visits + spread - self.length_cost * sum(node.path) / L

        return max(children, key=score)

    def _actions(self, path: Path, seen: set[Path], random: np.random.Generator) -> list[Path]:
        """Paths that one action makes of this one, in random order."""
        places = [layer for layer, times in enumerate(path) for _ in range(times)]
        found = set()
        for size, at in itertools.product(self.skips, range(len(places))):
            if at + size <= len(places) and size < len(places):
                found.add(_changed(path, places[at : at + size], -1))
        for layer in set(places):
            if path[layer] < self.most:
                found.add(_changed(path, [layer], 1))
        new = sorted(found - seen)
        return [new[i] for i in random.permutation(len(new))]


@dataclasses.dataclass
class Node:
    """A path that has been tried `visits` times, itself or below it; `closed`: there is nothing left below."""

    path: Path
    visits: int = 0
    value: int = 0
    hit: bool = False
    closed: bool = False
    untried: list[Path] = dataclasses.field(default_factory=list)
    children: list["Node"] = dataclasses.field(default_factory=list)


def _changed(path: Path, layers: Sequence[int], by: int) -> Path:
    new = list(path)
    for layer in layers:
        new[layer] += by
    return tuple(new)


def all_short(L: int) -> Int[np.ndarray, "P L"]:
    """The model as it is, one layer or two skipped, one repeated: all that there is to try, if layers are few."""
    paths = [np.ones(L, np.int8)]
    for layers in (*((i,) for i in range(L)), *itertools.combinations(range(L), 2)):
        paths.append(np.where(np.isin(np.arange(L), layers), 0, 1).astype(np.int8))
    paths += [np.ones(L, np.int8) + (np.arange(L) == i).astype(np.int8) for i in range(L)]
    return np.stack(paths)


def shortest(paths: Sequence[Path], L: int) -> np.ndarray | None:
    """The path with the fewest executed layers, and of those with the fewest different ones; None if there is none."""
    if not len(paths):
        return None
    return np.asarray(min(paths, key=lambda path: (sum(path), sum(times > 0 for times in path))), np.int8)


def label_by_trying(
    right: Callable[[np.ndarray, np.ndarray], Bool[np.ndarray, "Q"]],
    questions: int,
    L: int,
    search: TreeSearch | None = None,
    seed: int = 0,
) -> tuple[Int[np.ndarray, "Q L"], Bool[np.ndarray, "Q"]]:
    """The shortest right path of each question, and which questions have one; for the others the model as it is.

    `right(which [n], paths [n, L])` says of questions, by number, whether they are answered right along a path each.
    `search` None: all of `all_short`. With a tree, the trees of all questions grow together, a path each at a time.
    """
    if search is None:
        every = all_short(L)
        ask = np.arange(questions)
        hits_PQ = np.stack([right(ask, np.broadcast_to(path, (questions, L))) for path in every])
        found = [[tuple(path) for path in every[hits]] for hits in hits_PQ.T]
    else:
        found = _grow([search.of_question(L, np.random.default_rng((seed, q))) for q in range(questions)], right)
    labels = [shortest(paths, L) for paths in found]
    whole = np.ones(L, np.int8)
    return (
        np.stack([whole if label is None else label for label in labels]),
        np.array([label is not None for label in labels]),
    )


def _grow(trees: Sequence[Generator], right) -> list[list[Path]]:
    """What each tree has found, all being asked for a path at a time."""
    asking, found = {q: next(tree) for q, tree in enumerate(trees)}, [[] for _ in trees]
    while asking:
        which = np.fromiter(asking, int)
        hits = right(which, np.array([asking[q] for q in which], np.int8))
        for q, hit in zip(which.tolist(), hits.tolist(), strict=True):
            try:
                asking[q] = trees[q].send(hit)
            except StopIteration as end:
                found[q] = end.value
                del asking[q]
    return found
