import gzip
import json
import os

import pytest

from moe_zoo.data import ByteTokenizer, DataError, load_corpus, split

TOKENIZER = ByteTokenizer()
LONG = "Some text that is long enough to be a corpus.\n" * 20


def _lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def _texts(corpus):
    return [TOKENIZER.decode(corpus.document(i)) for i in range(len(corpus))]


def test_text_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + LONG.encode())
    corpus = load_corpus(str(path), TOKENIZER)
    assert corpus.domains == ("book",) and _texts(corpus) == [LONG]  # without the byte order mark
    assert all(len(part) == 1 for part in split(corpus).values())


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".JSONL"])
def test_json_lines(tmp_path, suffix):
    content = _lines({"text": LONG}, {"text": "zwei", "domain": "de"}, {"text": "three", "domain": None}) + "\n"
    path = tmp_path / f"part.1{suffix}"
    path.write_bytes(gzip.compress(content.encode(), mtime=0) if suffix.endswith("gz") else content.encode())
    corpus = load_corpus(path, TOKENIZER)
    assert _texts(corpus) == [LONG, "zwei", "three"]
    assert corpus.domains == ("part.1", "de") and corpus.domain_ids.tolist() == [0, 1, 0]


def test_many_domains_are_told(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text(_lines(*({"text": "some text", "domain": f"https://example.org/{i}"} for i in range(300))))
    assert len(load_corpus(path, TOKENIZER).domains) == 300 and "300 domains" in caplog.text


def test_the_place_of_a_bad_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_zoo.data.formats.text._STEP", 7)
    text = "\ufeffÄ世界 " * 30
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert _texts(load_corpus(tmp_path / "a.txt", TOKENIZER)) == [text.removeprefix("\ufeff")]
    for place in (3, 60, 61, 100):
        raw = text.encode()[:place].decode(errors="ignore").encode()
        (tmp_path / "a.txt").write_bytes(raw + b"\xe9" + text.encode())
        with pytest.raises(DataError, match=rf"byte 0xe9 at {len(raw)}\)"):
            load_corpus(tmp_path / "a.txt", TOKENIZER)


def test_bad_lines_are_counted(tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    bad = ["{", "[1]", '{"body": "x"}', '{"text": 3}', '{"text": " "}', '{"text": "x", "domain": [1]}', "9" * 5000]
    path.write_bytes(_lines({"text": LONG}).encode() + "\n".join(bad).encode() + b"\n\xff\xfe\n")
    assert len(load_corpus(path, TOKENIZER)) == 1
    assert "skipped 8 of 9 lines (first: line 2: invalid JSON)" in caplog.text
    for why in ("no 'text' field (fields: body; expected 'text'", "1 line(s) with bad UTF-8", "an empty 'text'"):
        assert why in caplog.text


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n ", "empty"),
        ("a.txt", b"\x7fELF\0\0" * 100, "binary"),
        ("a.txt", "grüße".encode("latin-1") * 100, "not UTF-8"),
        ("a.txt", LONG.encode("utf-16"), "UTF-16"),
        ("a.txt", b"short", "too short"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"no json\n", "line 1: invalid JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', "no 'text' field"),
        ("a.jsonl", b"[" * 100_000, "invalid JSON"),
        ("a.jsonl.gz", b"not gzip", "gzip"),
        ("a.jsonl.gz", gzip.compress(_lines({"text": LONG}).encode() * 99, mtime=0)[:-30], "gzip"),
        ("a.json", b"{}", "unsupported format '.json': expected a .txt"),
        ("a.json", b"{}", "did you mean '.jsonl'"),
        ("a.tar.zst", b"x", "unsupported format '.tar.zst'"),
        ("noname", b"x", "without a suffix"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_corpus(path, TOKENIZER)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("source, message", [("embeded", "'embedded'"), ("", "not a file"), ("a" * 5000, "not a file")])
def test_nothing_there(source, message):
    with pytest.raises(DataError, match=message):
        load_corpus(source, TOKENIZER)


def test_missing_file_suggests_a_neighbour(tmp_path):
    (tmp_path / "shakespeare.txt").write_text(LONG)
    with pytest.raises(DataError, match="did you mean 'shakespeare.txt'"):
        load_corpus(tmp_path / "shakespere.txt", TOKENIZER)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="not a file"):
        load_corpus(tmp_path / "pipe.txt", TOKENIZER)
    with pytest.raises(DataError, match="nothing usable"):
        load_corpus(tmp_path, TOKENIZER)


def _write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_folder_domains(tmp_path):
    root = _write(
        tmp_path,
        {
            "en/a.txt": LONG,
            "en/deep/b.txt": "deep " + LONG,
            "de/c.jsonl": _lines({"text": "drei"}, {"text": "vier", "domain": "own"}),
            "top.txt": "top " + LONG,
            "rows.jsonl": _lines({"text": "row"}),
            ".hidden/x.txt": "hidden",
            ".y.txt": "hidden",
        },
    )
    corpus = load_corpus(root, TOKENIZER)
    found = {text.split()[0]: corpus.domains[d] for text, d in zip(_texts(corpus), corpus.domain_ids, strict=True)}
    assert found == {"Some": "en", "deep": "en", "drei": "de", "vier": "own", "top": "top", "row": "rows"}
    assert load_corpus(root, TOKENIZER).fingerprint == corpus.fingerprint


def test_many_texts_in_one_folder_are_one_domain(tmp_path):
    root = _write(tmp_path / "essays", {f"{i}.txt": f"{i} {LONG}" for i in range(17)})
    assert load_corpus(root, TOKENIZER).domains == ("essays",)
    (root / "16.txt").unlink()
    assert len(load_corpus(root, TOKENIZER).domains) == 16


def test_folder_skips_are_counted(tmp_path, caplog):
    root = _write(
        tmp_path,
        {
            "good.txt": LONG,
            "binary.txt": b"\0\1\2",
            "latin.txt": b"\xe9" * 50,
            "empty.txt": "",
            "cut.jsonl.gz": gzip.compress(_lines({"text": LONG}).encode(), mtime=0)[:-9],
            "table.csv": "a,b",
            "readme.md": "x",
        },
    )
    corpus = load_corpus(root, TOKENIZER)
    assert "good" in corpus.domains and len(corpus) <= 2
    for text in ("4 file(s) that could not be read", "1 .csv file(s)", "1 file(s) of other formats", "latin.txt"):
        assert text in caplog.text


def test_folders_without_text(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="nothing usable in this folder of 0 files: expected a .txt"):
        load_corpus(tmp_path / "none", TOKENIZER)
    with pytest.raises(DataError, match="1 .csv"):
        load_corpus(_write(tmp_path / "csv", {"x.csv": "a,b"}), TOKENIZER)
    with pytest.raises(DataError, match=r"none of the 2 files holds usable text \(first: x.txt: the file is binary"):
        load_corpus(_write(tmp_path / "bad", {"x.txt": b"\0", "y.txt": ""}), TOKENIZER)
