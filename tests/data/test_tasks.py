"""Tasks on strings: their answers by hand, the same questions every time, splits. Tasks on real text: what is asked."""

import json
import logging
import unicodedata

import pytest

from moe_zoo.data import ByteTokenizer, DataError, load_corpus, real_tasks, split
from moe_zoo.data.tasks import ALL_TASKS, COMPOSED, COUNT, TASKS, load_tasks

TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize("task, question, answer", [
    ("copy", "hxQa", "hxQa"), ("reverse", "hxQa", "aQxh"), ("sort", "cbBa", "Babc"), ("swap_case", "hxQa", "HXqA"),
    ("shift", "axZ", "daC"), ("dedupe", "abacad", "abcd"), ("initials", "bk rtz o", "bro"),
    ("interleave", "abc,xyz", "axbycz"), ("digit_sum", "48213", "8"), ("parity", "48213", "even"),
    ("parity", "7", "odd"), ("swap_reverse", "hxQa", "AqXH"),
])  # fmt: skip
def test_answers(task, question, answer):
    assert (TASKS | COMPOSED)[task][1](question) == answer


def test_the_corpus():
    corpus = load_tasks(TOKENIZER, tuple(TASKS))
    assert corpus.domains == tuple(TASKS) and len(corpus) == COUNT * len(TASKS)
    assert len(set(corpus.document_bytes(TOKENIZER))) == len(corpus)
    for i in range(0, len(corpus), 397):
        text = TOKENIZER.decode(corpus.document(i))
        (task, question), answer = text.partition("=")[0].split(":"), text.partition("=")[2]
        assert corpus.domains[corpus.domain_ids[i]] == task and TASKS[task][1](question) == answer
        assert corpus.trained_bytes[i] == len(answer) and len(text) < 64
    assert all(min(part.trained_bytes_per_domain().values()) > 100 for part in split(corpus).values())


def test_a_task_has_the_same_questions_whatever_is_beside_it():
    alone, beside = load_corpus("tasks:sort", TOKENIZER), load_corpus("tasks:copy, sort,swap_reverse", TOKENIZER)
    assert beside.domains == ("copy", "sort", "swap_reverse") and len(beside) == 3 * COUNT
    of_sort = beside.select(beside.domain_ids == 1)
    assert list(of_sort.document_bytes(TOKENIZER)) == list(alone.document_bytes(TOKENIZER))
    assert load_corpus("tasks:sort", TOKENIZER).fingerprint == alone.fingerprint
    for names, word in (("revers", "'reverse'"), ("copy,copy", "named twice")):
        with pytest.raises(DataError, match=word):
            load_corpus(f"tasks:{names}", TOKENIZER)


@pytest.fixture(scope="module")
def real():
    """The questions of what every installation has."""
    return {name: real_tasks.REAL_TASKS[name](300) for name in ("kind", "category", "completion")}


def test_questions_on_real_text(real):
    assert ALL_TASKS == (*TASKS, *real_tasks.REAL_TASKS)
    for name, questions in real.items():
        assert len(questions) > 250 and len(dict(questions)) == len(questions), name
        assert all(0 < len(question.encode()) <= 48 and answer for question, answer in questions), name
    assert {answer for _, answer in real["kind"]} >= {"python", "c"}
    for question, answer in real["category"]:
        assert unicodedata.category(unicodedata.lookup(question)) == answer
    assert all(answer.isidentifier() and question[-1] in " .([" for question, answer in real["completion"])


def test_a_language_by_the_prepared_corpus_and_without_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(real_tasks, "PREPARED", tmp_path / "corpus")
    with caplog.at_level(logging.WARNING):
        corpus = load_tasks(TOKENIZER, ("copy", "language"))
    assert corpus.domains == ("copy", "language") and corpus.bytes_per_domain()["language"] == 0
    assert "left out the task language" in caplog.text and "prepare_data.py" in caplog.text
    with pytest.raises(DataError, match="no documents"):
        load_tasks(TOKENIZER, ("language",))
    for name in real_tasks.LANGUAGES:
        folder = tmp_path / "corpus" / f"help_{name}"
        folder.mkdir(parents=True)
        text = "\n\n".join(f"Die Breite {name} {i} ä und noch viel mehr, was nicht passt" for i in range(9)) + "\nOK\n"
        (folder / "documents.jsonl").write_text(json.dumps({"text": text}) + "\n")
    found = real_tasks.language(16)
    assert {answer for _, answer in found} == set(real_tasks.LANGUAGES) and len(found) == 16
    assert all(f" {answer} " in question and len(question.encode()) <= 40 for question, answer in found)
