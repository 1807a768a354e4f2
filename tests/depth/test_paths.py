"""The search for paths that answer right: what a tree may try, what it finds, and which path becomes the label."""

import numpy as np
import pytest

from moe_zoo.depth.paths import TreeSearch, all_short, label_by_trying, shortest

L = 5


def tried(search: TreeSearch, right, seed: int = 0) -> tuple[list, list]:
    """(paths in the order that they were tried, those that were right)."""
    tree, order = search.of_question(L, np.random.default_rng(seed)), []
    try:
        path = next(tree)
        while True:
            order.append(path)
            path = tree.send(right(path))
    except StopIteration as end:
        return order, end.value


def test_a_tree_tries_no_path_twice_runs_no_layer_thrice_and_has_more_than_one_branch():
    order, right = tried(TreeSearch(simulations=120), lambda path: False)
    assert len(order) == len(set(order)) == 120 and right == [] and order[0] == (1,) * L
    times = np.array(order)
    assert times.min() == 0 and times.max() == 2 and (times.sum(1) > 0).all()
    # all single actions come before anything deeper: 5 + 4 skips, 5 repeats
    assert len({p for p in order[1:15] if abs(sum(p) - L) <= 2}) == 14
    skips = {tuple(np.where(np.isin(np.arange(L), range(i, i + n)), 0, 1)) for n in (1, 2) for i in range(L - n + 1)}
    repeats = {tuple(1 + (np.arange(L) == i)) for i in range(L)}
    assert set(order[1:15]) == skips | repeats
    assert len({p for p in order[15:] if 2 in p}) > 3 and len({p for p in order[15:] if 2 not in p}) > 3


def test_a_small_tree_is_tried_to_its_end():
    search = TreeSearch(simulations=1000, most=1)
    order, _ = tried(search, lambda path: False)
    assert len(order) == 2**L - 1  # all subsets but none at all


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_ends_with_what_is_short_enough_or_better_than_the_model(seed):
    target = (1, 0, 1, 0, 0)
    order, right = tried(TreeSearch(simulations=200), lambda path: path == target, seed)
    assert right == [target] == order[-1:]
    order, right = tried(TreeSearch(simulations=200), lambda path: sum(path) >= L - 2, seed)
    assert (1,) * L in right and sum(right[-1]) == L - 2 and all(sum(p) > L - 2 for p in right[:-1])


def test_all_short_paths_are_all():
    paths = all_short(8)
    assert len(paths) == len({tuple(p) for p in paths}) == 1 + 8 + 28 + 8
    assert sorted(set(paths.sum(1))) == [6, 7, 8, 9] and (paths[0] == 1).all()


def test_the_label_is_the_shortest_right_path_with_the_fewest_layers():
    paths = [(1, 1, 1, 0), (1, 0, 2, 0), (0, 0, 2, 1)]
    np.testing.assert_array_equal(shortest(paths, 4), (1, 0, 2, 0))
    assert shortest([], 4) is None


@pytest.mark.parametrize("search", [None, TreeSearch(simulations=60)])
def test_questions_are_labelled_each_by_its_own_paths(search):
    """Question q can do without layer q; the third needs layer 0 twice; the fourth has no answer."""

    def right(which, paths):
        one = [paths[:, 0] == 0, paths[:, 1] == 0, paths[:, 0] == 2, np.zeros(len(paths), bool)]
        exact = np.abs(paths - 1).sum(1) == 1
        return np.array([one[q][i] and exact[i] for i, q in enumerate(which)])

    labels, found = label_by_trying(right, 4, L, search)
    expected = np.ones((4, L), int)
    expected[0, 0], expected[1, 1], expected[2, 0] = 0, 0, 2
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(found, [True, True, True, False])
