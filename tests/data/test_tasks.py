"""The ten tasks on strings: their answers by hand, the same questions every time, splits."""

import pytest

from moe_zoo.data import ByteTokenizer, split
from moe_zoo.data.tasks import COUNT, TASKS, load_tasks

TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize("task, question, answer", [
    ("copy", "hxQa", "hxQa"), ("reverse", "hxQa", "aQxh"), ("sort", "cbBa", "Babc"), ("swap_case", "hxQa", "HXqA"),
    ("shift", "axZ", "daC"), ("dedupe", "abacad", "abcd"), ("initials", "bk rtz o", "bro"),
    ("interleave", "abc,xyz", "axbycz"), ("digit_sum", "48213", "8"), ("parity", "48213", "even"),
    ("parity", "7", "odd"),
])  # fmt: skip
def test_answers(task, question, answer):
    assert TASKS[task][1](question) == answer


def test_the_corpus():
    corpus = load_tasks(TOKENIZER)
    assert corpus.domains == tuple(TASKS) and len(corpus) == COUNT * len(TASKS)
    assert len(set(corpus.document_bytes(TOKENIZER))) == len(corpus)
    assert corpus.fingerprint == load_tasks(TOKENIZER).fingerprint
    for i in range(0, len(corpus), 397):
        text = TOKENIZER.decode(corpus.document(i))
        (task, question), answer = text.partition("=")[0].split(":"), text.partition("=")[2]
        assert corpus.domains[corpus.domain_ids[i]] == task and TASKS[task][1](question) == answer
        assert corpus.trained_bytes[i] == len(answer) and len(text) < 64
    assert all(min(part.trained_bytes_per_domain().values()) > 100 for part in split(corpus).values())
