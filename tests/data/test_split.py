import numpy as np
import pytest

from moe_zoo.data import ByteTokenizer, DataError, Document, build_corpus, split

TOKENIZER = ByteTokenizer()
PARTS = ("train", "validation", "test")


def _documents(count, domain, seed=0):
    rng = np.random.RandomState(seed)
    return [Document(f"{domain} {i} " + "x" * rng.randint(200, 3000), domain) for i in range(count)]


def _texts(corpus):
    return [TOKENIZER.decode(corpus.document(i)) for i in range(len(corpus))]


def test_every_document_is_in_one_part():
    corpus = build_corpus(_documents(200, "a") + _documents(60, "b"), TOKENIZER)
    parts = split(corpus)
    texts = [_texts(parts[name]) for name in PARTS]
    assert sorted(sum(texts, [])) == sorted(_texts(corpus))
    assert not set(texts[0]) & set(texts[1]) and not set(texts[0] + texts[1]) & set(texts[2])
    for domain, total in corpus.bytes_per_domain().items():
        for name in ("validation", "test"):
            assert 0.5 * 0.05 * total < parts[name].bytes_per_domain()[domain] <= 2 * 0.05 * total


def test_repeats_stay_together_across_domains():
    documents = _documents(100, "a")
    corpus = build_corpus(documents + [Document(d.text, "b") for d in documents] + documents[:50], TOKENIZER)
    parts = [set(_texts(part)) for part in split(corpus, (0.6, 0.2, 0.2)).values()]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_groups_stay_together():
    documents = [Document(f"{kind} {i} " + "y" * 500, kind, group=str(i)) for kind in "ab" for i in range(100)]
    parts = split(build_corpus(documents, TOKENIZER))
    groups = [{text.split()[1] for text in _texts(part)} for part in parts.values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert all(len(part.bytes_per_domain()) == 2 for part in parts.values())


def test_stable():
    corpus = build_corpus(_documents(300, "a"), TOKENIZER)
    first, again, other = split(corpus), split(corpus), split(corpus, seed=1)
    assert all(first[name].fingerprint == again[name].fingerprint for name in PARTS)
    assert first["test"].fingerprint != other["test"].fingerprint
    # Order does not matter, and nearly every document stays where it was when a tenth more come.
    reverse = split(corpus.select(np.arange(len(corpus))[::-1]))
    assert set(_texts(reverse["test"])) == set(_texts(first["test"]))
    more = split(build_corpus(_documents(300, "a") + _documents(30, "a", seed=1), TOKENIZER))
    moved = set(_texts(first["test"])) - set(_texts(more["test"]))
    assert len(moved) <= 3


def test_a_small_domain_still_has_test_documents():
    corpus = build_corpus(_documents(300, "large") + _documents(24, "small"), TOKENIZER)
    for seed in range(10):
        parts = split(corpus, seed=seed)
        assert all(parts[name].bytes_per_domain()["small"] > 0 for name in PARTS)


def test_one_document_is_cut_at_paragraphs(caplog):
    text = "\n\n".join(f"Paragraph {i}: " + "wörd " * (i % 17 + 3) for i in range(500))
    parts = split(build_corpus([Document(text, "book")], TOKENIZER))
    assert "cut into contiguous ranges" in caplog.text
    pieces = [_texts(parts[name])[0] for name in PARTS]
    assert "".join(pieces) == text and all(piece.startswith("Paragraph") for piece in pieces)
    assert 0.03 < len(pieces[2]) / len(text) < 0.07
    assert sum(int(part.num_bytes.sum()) for part in parts.values()) == len(text.encode())


def test_a_document_without_lines_is_cut_between_characters():
    text = "ü世" * 1000
    pieces = [_texts(part)[0] for part in split(build_corpus([Document(text, "a")], TOKENIZER)).values()]
    assert "".join(pieces) == text


def test_few_documents_are_cut_and_many_in_another_domain_are_not():
    book = "\n".join(f"line {i}" for i in range(3000))
    corpus = build_corpus([Document(book, "books"), *_documents(100, "a")], TOKENIZER)
    parts = split(corpus)
    assert all(part.bytes_per_domain()["books"] for part in parts.values())
    assert sum(len(part) for part in parts.values()) == 103
    # The book in a second domain, where there are many documents: cut there too, so it is never in two parts.
    parts = split(build_corpus([Document(book, "books"), *_documents(100, "a"), Document(book, "a")], TOKENIZER))
    assert sum(len(part) for part in parts.values()) == 106
    texts = [set(_texts(part)) for part in parts.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2]


def test_zero_fractions():
    parts = split(build_corpus(_documents(50, "a"), TOKENIZER), (0.9, 0.0, 0.1))
    assert len(parts["validation"]) == 0 and len(parts["test"]) > 0
    assert len(split(build_corpus(_documents(2, "a"), TOKENIZER), (1.0, 0.0, 0.0))["train"]) == 2
    cut = split(build_corpus([Document("ab\n" * 500, "a")], TOKENIZER), (0.9, 0.0, 0.1))
    assert len(cut["validation"]) == 0 and int(cut["train"].num_bytes.sum() + cut["test"].num_bytes.sum()) == 1500


@pytest.mark.parametrize("fractions", [(0.9, 0.1), (0.9, 0.2, 0.1), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_bad_fractions(fractions):
    with pytest.raises(DataError, match="add up to 1"):
        split(build_corpus(_documents(5, "a"), TOKENIZER), fractions)


def test_too_short_to_split():
    with pytest.raises(DataError, match="too few"):
        split(build_corpus([Document("abc", "a")], TOKENIZER))
