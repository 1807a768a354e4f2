"""Records with a rejected answer: both answers side by side in every order of the data, and what stays the same."""

import itertools

import numpy as np
import pytest

from moe_zoo.data import ByteTokenizer, Document, PackedSource, build_corpus, load_saved_corpus, save_corpus, split
from moe_zoo.data.formats.records import choose_columns, to_document
from moe_zoo.data.tasks import guarded_documents

TOKENIZER = ByteTokenizer()
NUMBERS = range(12)


def _document(i: int) -> Document:
    record = {"prompt": f"q{i}:", "answer": f"yes{i}", "rejected": f"no{i}", "domain": "ab"[i % 2]}
    return to_document({**record, "rejected": None} if i == 5 else record, "z")


def _text(row, keep) -> str:
    return TOKENIZER.decode(row["targets"][keep])


@pytest.fixture(scope="module")
def corpus():
    return build_corpus(map(_document, NUMBERS), TOKENIZER)


def test_a_record_is_two_documents_of_which_the_wanted_is_trained_on(corpus):
    assert len(corpus) == 2 * 12 - 1 and corpus.rejected_documents().sum() == 11
    first, second = (TOKENIZER.decode(corpus.document(i)) for i in (0, 1))
    assert (first, second) == ("q0:yes0", "q0:no0")
    assert corpus.domain_ids[0] == corpus.domain_ids[1] and corpus.groups[0] == corpus.groups[1]
    alone = build_corpus([to_document({"prompt": "q:", "answer": "yes"}, "a")], TOKENIZER)
    assert alone.rejected is None and "rejected_mask" not in PackedSource(alone, TOKENIZER, 8)[0]
    assert sum(corpus.targets_per_domain().values()) == sum(len(f"yes{i}") + 1 for i in NUMBERS)
    assert sum(corpus.trained_bytes_per_domain().values()) == sum(len(f"yes{i}") for i in NUMBERS)


def test_pairs_stay_together_whatever_the_order(corpus):
    for seed in (None, 1):
        row = PackedSource(corpus, TOKENIZER, 512, seed=seed)[0]
        segments = np.unique(row["segment_ids"][row["segment_ids"] > 0])
        numbers = []
        for pair in np.unique(segments // 2):
            inside = row["segment_ids"] // 2 == pair
            wanted, other = _text(row, inside & row["loss_mask"]), _text(row, inside & row["rejected_mask"])
            i = int(wanted.removeprefix("yes"))
            numbers.append(i)
            assert other == ("" if i == 5 else f"no{i}")
            assert _text(row, row["segment_ids"] == 2 * pair) == f"q{i}:yes{i}"
            assert i == 5 or _text(row, row["segment_ids"] == 2 * pair + 1) == f"q{i}:no{i}"
        assert sorted(numbers) == list(NUMBERS) and (numbers != list(NUMBERS)) == (seed is not None)


def test_of_a_pair_that_a_row_cuts_the_rejected_answer_does_not_count(corpus):
    source = PackedSource(corpus, TOKENIZER, 20, seed=3)
    wanted, pairs = 0, 0
    for row in map(source.__getitem__, range(len(source))):
        wanted += row["loss_mask"].sum()
        for pair in np.unique(row["segment_ids"][row["rejected_mask"]] // 2):
            inside = row["segment_ids"] // 2 == pair
            assert _text(row, inside & row["loss_mask"]).removeprefix("yes") == _text(
                row, inside & row["rejected_mask"]
            ).removeprefix("no")
            pairs += 1
    assert 0 < pairs < 11
    assert wanted == sum(corpus.targets_per_domain().values())  # of the wanted every target counts once, as ever
    empty = source.empty_rows(1)
    assert empty.keys() == source[0].keys() and not empty["rejected_mask"].any()


def test_pairs_survive_saving_and_splitting(corpus, tmp_path):
    save_corpus(corpus, tmp_path / "c.npz")
    again = load_saved_corpus(tmp_path / "c.npz")
    assert again.fingerprint == corpus.fingerprint and again.rejected_documents().sum() == 11
    parts = split(build_corpus(itertools.islice(guarded_documents(), 400), TOKENIZER), (0.8, 0.1, 0.1))
    for part in parts.values():
        assert len(part) and part.rejected_documents().tolist() == [False, True] * (len(part) // 2)


def test_columns_and_mistakes():
    names = ["prompt", "rejected", "answer", "id"]
    assert choose_columns(names, names[:3]) == {name: name for name in ("prompt", "rejected", "answer")}
    assert to_document({"prompt": "q", "answer": "a", "rejected": 3}, "z") == "a 'rejected' that is not a string"
    assert to_document({"prompt": "q", "answer": "a", "rejected": " "}, "z") == "an empty 'rejected'"


def test_flagged_questions_are_refused_and_the_others_answered():
    for number, document in enumerate(itertools.islice(guarded_documents(), 3_999, 4_003)):
        (prompt, _), (answer, trained) = document.pieces
        flagged = document.domain == "flagged"
        assert trained and flagged == prompt.startswith("!") == ((number + 3_999) % 2 == 1)
        assert (answer == "NO") == flagged and (document.rejected == "NO") == (not flagged)
