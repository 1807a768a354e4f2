import numpy as np
import pytest

from moe_zoo.data import ByteTokenizer, DataError, Document, PackedSource, build_corpus, train_iterator

TOKENIZER = ByteTokenizer()
S, B = 16, 4


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.RandomState(0)
    texts = [bytes(rng.randint(33, 127, size=n).astype(np.uint8)) for n in rng.randint(5, 80, size=20)]
    return build_corpus([Document(text, "a") for text in texts], TOKENIZER)


def _iterator(corpus, seed=5, **options):
    return train_iterator(corpus, TOKENIZER, seq_len=S, batch_size=B, seed=seed, **options)


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


def _equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_resumes_exactly_after_every_prefix(corpus, prefetch):
    total = 24  # more than one epoch
    expected = _take(_iterator(corpus), total)
    iterator = _iterator(corpus, prefetch=prefetch)
    states = [iterator.get_state()]
    for batch in expected:
        _equal([next(iterator)], [batch])
        states.append(iterator.get_state())
    fresh = _iterator(corpus, prefetch=prefetch)
    for consumed, state in enumerate(states[:-1]):
        fresh.set_state(state)
        assert fresh.get_state() == state
        _equal(_take(fresh, min(3, total - consumed)), expected[consumed : consumed + 3])


def test_resumes_from_an_orbax_checkpoint(corpus, tmp_path):
    grain, ocp = pytest.importorskip("grain"), pytest.importorskip("orbax.checkpoint")
    iterator = _iterator(corpus)
    _take(iterator, 7)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = _take(iterator, 5)
        fresh = _iterator(corpus)
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    _equal(_take(fresh, 5), expected)


def _epoch_rows(corpus, epoch, **options):
    """The rows of one epoch, which need not start with a batch."""
    count = len(PackedSource(corpus, TOKENIZER, S))
    batches = _take(_iterator(corpus, **options), -(-count * (epoch + 1) // B))
    rows = np.concatenate([batch["tokens"] for batch in batches])
    return rows[count * epoch : count * (epoch + 1)]


def test_an_epoch_has_every_row_once_and_the_next_another_order(corpus):
    source = PackedSource(corpus, TOKENIZER, S, seed=5)
    rows = sorted(source.rows(np.arange(len(source)))["tokens"].tolist())
    first, second = _epoch_rows(corpus, 0), _epoch_rows(corpus, 1)
    assert sorted(first.tolist()) == rows and sorted(second.tolist()) == rows
    assert not np.array_equal(first, second)


def test_seed_decides(corpus):
    _equal(_take(_iterator(corpus), 3), _take(_iterator(corpus), 3))
    assert not np.array_equal(next(_iterator(corpus))["tokens"], next(_iterator(corpus, seed=6))["tokens"])


def test_chosen_rows_are_those_of_the_whole_batch(corpus):
    whole = _take(_iterator(corpus), 5)
    for rows in (np.arange(B // 2), np.array([0, B - 1]), np.array([1])):
        chosen = _take(_iterator(corpus, rows=rows), 5)
        _equal(chosen, [{name: array[rows] for name, array in batch.items()} for batch in whole])


def test_a_corpus_smaller_than_a_batch():
    corpus = build_corpus([Document("tiny", "a")], TOKENIZER)
    batch = next(_iterator(corpus))
    assert batch["tokens"].shape == (B, S) and batch["loss_mask"].sum() == B * 5


@pytest.mark.parametrize("rows", [[], [-1], [B]])
def test_rows_that_are_not_of_the_batch(corpus, rows):
    with pytest.raises(DataError, match=f"expected some of 0 to {B - 1}"):
        _iterator(corpus, rows=np.array(rows, int))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_bad_seed(corpus, seed):
    with pytest.raises(DataError, match="seed"):
        _iterator(corpus, seed=seed)
