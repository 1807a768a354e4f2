import os
import stat

import pytest

from moe_zoo.data import ByteTokenizer, compressed_bits_per_byte, embedded, load_corpus, split

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    previous = os.environ.get("MOE_ZOO_CACHE")
    os.environ["MOE_ZOO_CACHE"] = str(folder)
    yield folder
    os.environ.pop("MOE_ZOO_CACHE") if previous is None else os.environ.update(MOE_ZOO_CACHE=previous)


@pytest.fixture(scope="module")
def corpus(cache):
    return load_corpus("embedded", TOKENIZER)


def test_domains_and_sizes(corpus):
    sizes = corpus.bytes_per_domain()
    assert tuple(sizes) == embedded.DOMAINS
    assert 4e6 < sizes["python_code"] < 12e6
    assert 0.3e6 < sizes["reference_prose"] < 0.8e6
    assert 0.6e6 < sizes["docstrings"] < 2.5e6
    assert 0.3e6 < sizes["c_headers"] < 2e6
    assert 0.7e6 < sizes["character_names"] < 1.5e6
    assert len(corpus.tokens) == corpus.num_bytes.sum() and corpus.tokens.max() < 256
    # No document twice: equal documents would share their group.
    texts = [corpus.document(i).tobytes() for i in range(len(corpus))]
    assert len(set(texts)) == len(texts)


def test_cache_and_rebuild_agree(corpus, cache):
    assert len(list(cache.glob("embedded-*.npz"))) == 1
    assert load_corpus("embedded", TOKENIZER).fingerprint == corpus.fingerprint
    assert embedded.load_embedded(TOKENIZER, cache=False).fingerprint == corpus.fingerprint


def test_damaged_cache_is_replaced(corpus, cache, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "embedded_documents", lambda: iter([embedded.Document("some text", "python_code")]))
    path = embedded._cache_path(TOKENIZER)
    path.write_bytes(b"damaged")
    first = embedded.load_embedded(TOKENIZER)
    assert "not using the cache" in caplog.text
    assert embedded.load_embedded(TOKENIZER).fingerprint == first.fingerprint
    assert path.stat().st_size > 100 and stat.S_ISREG(path.stat().st_mode)


def test_a_cache_that_cannot_be_written_is_no_error(caplog, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("MOE_ZOO_CACHE", str(blocked / "folder"))
    monkeypatch.setattr(embedded, "embedded_documents", lambda: iter([embedded.Document("some text", "python_code")]))
    assert len(embedded.load_embedded(TOKENIZER)) == 1
    assert "not cached" in caplog.text


def test_documents_of_character_names(corpus):
    domain = embedded.DOMAINS.index("character_names")
    sizes = corpus.num_bytes[corpus.domain_ids == domain]
    assert sizes.max() <= 8_000 and (sizes[:-1] >= 4_000).all()


def test_split_serves_every_domain_and_code_is_not_in_its_docstrings(corpus):
    parts = split(corpus)
    for domain, total in corpus.bytes_per_domain().items():
        for name in ("validation", "test"):
            assert 0.02 * total < parts[name].bytes_per_domain()[domain] < 0.12 * total
    code, docstrings = (set(corpus.groups[corpus.domain_ids == i].tolist()) for i in (0, 2))
    assert len(docstrings & code) > 0.9 * len(docstrings)
    groups = [set(part.groups.tolist()) for part in parts.values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


def test_compressors_on_the_validation_part(corpus):
    rates = compressed_bits_per_byte(split(corpus)["validation"])
    assert set(rates) == {*embedded.DOMAINS, "overall"}
    assert all(0.5 < row["xz"] < row["gzip"] * 1.05 < 5 for row in rates.values())
