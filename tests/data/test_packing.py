import numpy as np
import pytest

from moe_zoo.data import (
    ByteTokenizer,
    DataError,
    Document,
    PackedSource,
    build_corpus,
    count_targets,
    eval_batches,
    num_eval_batches,
)

TOKENIZER = ByteTokenizer()
PAD, BOS, EOS = TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id


def _corpus(lengths=(5, 1, 30, 2, 2, 17, 64, 3), seed=0):
    rng = np.random.RandomState(seed)
    texts = (bytes(rng.randint(97, 123, size=n).astype(np.uint8)) for n in lengths)
    return build_corpus([Document(t, "ab"[i % 2]) for i, t in enumerate(texts)], TOKENIZER)


def _naive_rows(corpus, seq_len, stride, order):
    """Rows as a loop over single positions of the stream makes them."""
    stream = []  # (token, target, document number in the order, place in the document, domain)
    for n, document in enumerate(order):
        ids = corpus.document(document).tolist()
        for place, (token, target) in enumerate(zip([BOS, *ids], [*ids, EOS], strict=True)):
            stream.append((token, target, n, place, int(corpus.domain_ids[document])))
    rows, begin, counted = [], 0, 0
    while True:
        row = []
        window = stream[begin : begin + seq_len]
        for at, (token, target, n, place, domain) in enumerate(window):
            position = place if place <= at else at
            row.append((token, target, n - window[0][2] + 1, position, begin + at >= counted, domain))
        row += [(PAD, PAD, 0, 0, False, -1)] * (seq_len - len(window))
        rows.append(row)
        counted = begin + seq_len
        if counted >= len(stream):
            return rows
        begin += stride


@pytest.mark.parametrize(
    "seq_len, stride", [(16, None), (16, 16), (16, 4), (7, 3), (1, 1), (200, None), (200, 50), (132, 132)]
)
@pytest.mark.parametrize("seed", [None, 3])
def test_rows_equal_a_naive_loop(seq_len, stride, seed):
    corpus = _corpus()
    source = PackedSource(corpus, TOKENIZER, seq_len, stride, seed)
    order = np.arange(len(corpus)) if seed is None else np.random.RandomState(seed).permutation(len(corpus))
    expected = _naive_rows(corpus, seq_len, stride or seq_len, order)
    assert len(source) == len(expected)
    names = ("tokens", "targets", "segment_ids", "positions", "loss_mask", "domain")
    for i, row in enumerate(expected):
        for name, column in zip(names, zip(*row, strict=True), strict=True):
            assert source[i][name].tolist() == list(column), (i, name)
    batch = source.rows(np.arange(len(source)))
    for name in names:
        assert batch[name].dtype == (bool if name == "loss_mask" else np.int32)
        assert np.array_equal(batch[name], np.stack([source[i][name] for i in range(len(source))]))


def test_real_positions_are_what_the_docstring_says():
    batch = PackedSource(_corpus((5, 20)), TOKENIZER, 8).rows(np.arange(4))
    assert batch["tokens"][0, 0] == BOS and batch["targets"][0, 5] == EOS
    assert batch["positions"].tolist() == [
        [0, 1, 2, 3, 4, 5, 0, 1],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 0, 0, 0, 0, 0],
    ]
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 1, 1, 1, 2, 2]
    assert batch["segment_ids"][3].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("seq_len, stride", [(16, 16), (16, 1), (16, 5), (16, 15), (500, 250)])
def test_every_target_counts_exactly_once(seq_len, stride):
    corpus = _corpus()
    options = dict(seq_len=seq_len, stride=stride, batch_size=4)
    batches = list(eval_batches(corpus, TOKENIZER, **options))
    assert len(batches) == num_eval_batches(corpus, TOKENIZER, **options)
    counted = np.concatenate([batch["targets"][batch["loss_mask"]] for batch in batches])
    expected = np.concatenate([[*corpus.document(i), EOS] for i in range(len(corpus))])
    assert np.array_equal(counted, expected)
    assert sum(count_targets(batch, 2) for batch in batches).tolist() == list(corpus.targets_per_domain().values())
    # Full batches, and padding that nobody can see.
    last = batches[-1]
    assert all(array.shape == (4, seq_len) for batch in batches for array in batch.values())
    padding = last["segment_ids"] == 0
    assert not last["loss_mask"][padding].any() and (last["domain"][padding] == -1).all()
    assert (last["tokens"][padding] == PAD).all() and (last["targets"][padding] == PAD).all()


def test_max_rows_is_spread_evenly():
    corpus = _corpus((400,))
    every = [b["tokens"] for b in eval_batches(corpus, TOKENIZER, seq_len=10, batch_size=41)][0]
    few = [b["tokens"] for b in eval_batches(corpus, TOKENIZER, seq_len=10, batch_size=4, max_rows=4)][0]
    assert np.array_equal(few, every[[0, 10, 20, 30]])
    assert num_eval_batches(corpus, TOKENIZER, seq_len=10, batch_size=4, max_rows=4) == 1
    assert num_eval_batches(corpus, TOKENIZER, seq_len=10, batch_size=4, max_rows=1000) == 11


def test_errors_come_at_once():
    corpus = _corpus()
    for options in ({"seq_len": 0}, {"seq_len": 8, "stride": 9}, {"seq_len": 8, "stride": 0}):
        with pytest.raises(DataError, match="seq_len"):
            eval_batches(corpus, TOKENIZER, batch_size=2, **options)
    with pytest.raises(DataError, match="max_rows"):
        eval_batches(corpus, TOKENIZER, seq_len=8, batch_size=2, max_rows=0)
    with pytest.raises(DataError, match="batch_size"):
        eval_batches(corpus, TOKENIZER, seq_len=8, batch_size=0)
    with pytest.raises(DataError, match="no documents"):
        PackedSource(corpus.select(np.zeros(len(corpus), bool)), TOKENIZER, 8)
    with pytest.raises(IndexError):
        PackedSource(corpus, TOKENIZER, 8)[1000]

    class Other(ByteTokenizer):
        name = "other"

    with pytest.raises(DataError, match="tokenized with 'bytes'"):
        PackedSource(corpus, Other(), 8)
