import threading

import numpy as np
import pytest

from moe_zoo.data import ByteTokenizer, DataError, Document, build_corpus, load_saved_corpus, save_corpus

TOKENIZER = ByteTokenizer()


def _corpus(texts=("one", "zwei ü", "three"), domains=("a", "b", "a"), **options):
    return build_corpus([Document(t, d) for t, d in zip(texts, domains, strict=True)], TOKENIZER, **options)


def test_build():
    corpus = _corpus()
    assert len(corpus) == 3 and corpus.domains == ("a", "b")
    assert [TOKENIZER.decode(corpus.document(i)) for i in range(3)] == ["one", "zwei ü", "three"]
    assert corpus.num_bytes.tolist() == [3, 7, 5] and corpus.domain_ids.tolist() == [0, 1, 0]
    assert corpus.bytes_per_domain() == {"a": 8, "b": 7}
    assert corpus.targets_per_domain() == {"a": 10, "b": 8}
    assert corpus.tokens.dtype == np.uint16


def test_fingerprint_follows_content():
    assert _corpus().fingerprint == _corpus().fingerprint
    others = [_corpus(("one", "zwei ü", "thref")), _corpus(domains=("a", "b", "b")), _corpus(domains=("a", "c", "a"))]
    assert len({_corpus().fingerprint, *(other.fingerprint for other in others)}) == 4


def test_blank_and_repeated_documents(caplog):
    with caplog.at_level("INFO"):
        corpus = _corpus(("one", " \n", "one"), deduplicate=True)
    assert len(corpus) == 1 and "1 empty and 1 repeated documents of 3" in caplog.text
    with pytest.raises(DataError, match="all were empty"):
        _corpus(("", " ", "\n"))


def test_equal_texts_share_a_group():
    documents = [Document("same", "a", group="1"), Document("same", "b", group="2"), Document("other", "a", group="2")]
    groups = build_corpus(documents, TOKENIZER).groups
    assert groups[0] == groups[1] != groups[2]


def test_domains_can_be_printed():
    assert _corpus(domains=("Grüße", "\ud800", "世界")).domains == ("Grüße", "?", "世界")


def test_reserved_domain():
    with pytest.raises(DataError, match="'overall'"):
        _corpus(domains=("a", "overall", "a"))


def test_select_keeps_domain_ids():
    corpus = _corpus()
    part = corpus.select(np.array([False, True, False]))
    assert part.domains == ("a", "b") and part.domain_ids.tolist() == [1]
    assert TOKENIZER.decode(part.tokens) == "zwei ü" and part.bytes_per_domain() == {"a": 0, "b": 7}
    assert [len(corpus.select(np.zeros(3, bool))), len(corpus.select(np.array([2, 0])))] == [0, 2]


def test_save_and_load(tmp_path):
    corpus, path = _corpus(), tmp_path / "deep" / "corpus.npz"
    save_corpus(corpus, path)
    loaded = load_saved_corpus(path)
    assert loaded.fingerprint == corpus.fingerprint and loaded.domains == corpus.domains
    assert np.array_equal(loaded.tokens, corpus.tokens) and loaded.tokenizer == "bytes"
    assert [p.name for p in path.parent.iterdir()] == ["corpus.npz"]


def test_damaged_file_is_an_error(tmp_path):
    path = tmp_path / "corpus.npz"
    save_corpus(_corpus(), path)
    raw = path.read_bytes()
    for content in (b"", b"nonsense", raw[: len(raw) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a saved corpus"):
            load_saved_corpus(path)


def test_concurrent_writers_leave_a_whole_file(tmp_path):
    path = tmp_path / "corpus.npz"
    corpora = [_corpus((letter * 50_000, "x", "y")) for letter in "abcd"]
    threads = [threading.Thread(target=save_corpus, args=(corpus, path)) for corpus in corpora * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_saved_corpus(path).fingerprint in {corpus.fingerprint for corpus in corpora}
    assert len(list(tmp_path.iterdir())) == 1
