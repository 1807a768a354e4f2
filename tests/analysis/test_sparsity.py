"""BlockFFN's statistics against loops over tokens and chunks, their order, and what a layer reports."""

import jax.numpy as jnp
import numpy as np
import pytest
from naive import context

from moe_zoo.analysis import chunk_sparsity, reuse
from moe_zoo.blocks.moe import neighbour_stats

B, S, E = 3, 24, 6
RNG = np.random.default_rng(0)
ACTIVE = RNG.random((B, S, E)) < 0.3
VALID = np.arange(S) < np.array([[24], [17], [5]])
SEGMENTS = 1 + (np.arange(S) >= 10)[None] * np.ones((B, 1), int)


def value(total, count) -> float:
    return float(total) / float(count)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("length", [1, 5, 8])
def test_chunks_equal_a_loop(length, make):
    """5 does not divide 24: what remains of a row is left out, and so are chunks with padding."""
    idle = []
    for row, valid in zip(ACTIVE, VALID, strict=True):
        for start in range(0, S - length + 1, length):
            places = range(start, start + length)
            if all(valid[s] for s in places):
                idle.append(1 - len({e for s in places for e in np.flatnonzero(row[s])}) / E)
    total, count = chunk_sparsity(make(ACTIVE), make(VALID), length)
    assert int(count) == len(idle) > 0 and value(total, count) == pytest.approx(np.mean(idle), rel=1e-6)


def test_one_token_is_tls_and_more_tokens_never_leave_more_alone():
    whole = np.ones((B, S), bool)
    found = [value(*chunk_sparsity(ACTIVE, whole, length)) for length in (1, 2, 4, 8)]
    assert found[0] == pytest.approx(1 - ACTIVE.mean()) and found == sorted(found, reverse=True)
    assert found[0] > found[-1] > 0
    # the same experts for all: nothing is lost by waiting; other ones for each: everything
    same = np.tile(np.eye(8, dtype=bool)[:1], (16, 1))[None]
    turns = np.tile(np.eye(8, dtype=bool), (2, 1))[None]
    alone = np.ones((1, 16), bool)
    assert value(*chunk_sparsity(same, alone)) == value(*chunk_sparsity(same, alone, 1)) == 1 - 1 / 8
    assert value(*chunk_sparsity(turns, alone)) == 0 and value(*chunk_sparsity(turns, alone, 1)) == 1 - 1 / 8
    assert value(*reuse(same, alone[:, 1:])) == 1 and value(*reuse(turns, alone[:, 1:])) == 0


def test_a_layer_reports_them_without_padding_and_across_no_document():
    active = ACTIVE.copy()
    active[0, 3:5] = False  # tokens without an expert have nothing to be used again
    flat = lambda x: jnp.asarray(x.reshape(-1))
    ctx = context(B * S, batch=B, valid=flat(VALID), segment_ids=flat(SEGMENTS))
    stats = neighbour_stats(jnp.asarray(active.reshape(-1, E)), ctx)
    shared = []
    for row, valid, segments in zip(active, VALID, SEGMENTS, strict=True):
        for s in range(S - 1):
            now, then = set(np.flatnonzero(row[s])), set(np.flatnonzero(row[s + 1]))
            if valid[s] and valid[s + 1] and segments[s] == segments[s + 1] and now:
                shared.append(len(now & then) / len(now))
    assert float(stats["expert_reuse"].value()) == pytest.approx(np.mean(shared), rel=1e-5)
    assert int(stats["expert_reuse"].weight) == len(shared)
    assert float(stats["token_level_sparsity"].value()) == pytest.approx(1 - active[VALID].mean(), rel=1e-5)
    expected = value(*chunk_sparsity(active, VALID, 8))
    assert float(stats["chunk_level_sparsity"].value()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seq, known", [(8, 3), (7, 2), (1, 1)])
def test_a_row_that_is_too_short_has_no_chunk_and_no_neighbour(seq, known):
    assert len(neighbour_stats(jnp.ones((2 * seq, E), bool), context(2 * seq, batch=2))) == known
