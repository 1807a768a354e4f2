"""Every accepted format gives the documents that the same rows give as JSON lines; what is wrong is one clear line."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from moe_zoo.data import ByteTokenizer, DataError, load_corpus
from moe_zoo.data.formats import READERS, format_of, stem

pa = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
from data_files import arrow_file, json_lines, parquet, stream, write_saved  # noqa: E402

TOKENIZER = ByteTokenizer()
LONG = "Some text that is long enough to be a corpus. Grüße, 世界.\n" * 10
ROWS = [{"text": f"{i} {LONG[: 40 + i]}", "domain": "ab"[i % 2], "id": i} for i in range(600)]


def _table(rows=ROWS):
    return pa.Table.from_pylist(rows)


def _encoded():
    table, raw = _table(), json_lines(ROWS)
    large = table.cast(pa.schema([("text", pa.large_string()), ("domain", pa.string()), ("id", pa.int64())]))
    return {
        "rows.jsonl": raw,
        "rows.jsonl.gz": gzip.compress(raw, mtime=0),
        "rows.jsonl.zst": zstandard.compress(raw),
        "rows.JSONL.ZST": zstandard.compress(raw[:999]) + zstandard.compress(raw[999:]),  # two frames
        "rows.parquet": parquet(table),
        "rows-00000-of-00002.parquet": parquet(table, use_dictionary=False, compression="zstd"),
        "rows.arrow": stream(table),
        "rows_0.arrow": arrow_file(table),
        "rows_1.arrow": stream(large, options=pa.ipc.IpcWriteOptions(compression="lz4")),
        "rows_2.arrow": stream(table.set_column(0, "text", table["text"].dictionary_encode())),
        "rows_3.parquet": parquet(table.set_column(0, "text", table["text"].cast(pa.binary()))),
    }


def _texts(corpus):
    return [TOKENIZER.decode(corpus.document(i)) for i in range(len(corpus))]


def _load(path, content):
    path.write_bytes(content)
    return load_corpus(path, TOKENIZER)


def test_tables_and_compressed_lines_equal_json_lines(tmp_path):
    fingerprints = {name: _load(tmp_path / name, raw).fingerprint for name, raw in _encoded().items()}
    assert len(set(fingerprints.values())) == 1, fingerprints


@pytest.mark.parametrize("suffix, pack", [(".txt.gz", gzip.compress), (".txt.zst", zstandard.compress)])
def test_compressed_text(tmp_path, suffix, pack):
    corpus = _load(tmp_path / f"book{suffix}", pack(b"\xef\xbb\xbf" + LONG.encode()))
    assert corpus.domains == ("book",) and _texts(corpus) == [LONG]


def test_names():
    assert format_of(Path("a.b.JSONL.gz")) == ".jsonl.gz" and stem(Path("a.b.JSONL.gz")) == "a.b"
    for name, expected in {
        "train-00000-of-00005.parquet": "train", "de.part_1-of-2.arrow": "de.part", "2024-10.txt": "2024-10",
        "-1-of-2.txt": "-1-of-2",
    }.items():  # fmt: skip
        assert stem(Path(name)) == expected
    assert {".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow"} <= READERS.keys()


def test_shards_are_one_domain(tmp_path):
    rows = [{"text": row["text"]} for row in ROWS]
    for i in range(3):
        (tmp_path / f"train-{i:05}-of-00003.parquet").write_bytes(parquet(_table(rows[i::3])))
    corpus = load_corpus(tmp_path, TOKENIZER)
    assert corpus.domains == ("train",) and len(corpus) == len(rows)


def test_only_the_needed_columns_are_read(tmp_path):
    # Bytes that would make any reader of the other column fail.
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0" * 4 + b"\1\0\0\0" * 2), pa.py_buffer(b"\xff")]
    )
    table = pa.table({"text": [LONG, LONG + "2"], "raw": broken, "name": broken})
    assert len(_load(tmp_path / "a.arrow", stream(table))) == 2
    assert len(_load(tmp_path / "a.parquet", parquet(table))) == 2


def test_the_only_column_of_strings_is_the_text(tmp_path, caplog):
    table = pa.table({"body": [LONG, "two"], "id": [1, 2], "domain": ["x", "y"]})
    for name, raw in {"a.parquet": parquet(table), "a.arrow": stream(table)}.items():
        corpus = _load(tmp_path / name, raw)
        assert _texts(corpus) == [LONG, "two"] and corpus.domains == ("x", "y")
    assert caplog.text.count("no column 'text'; reading 'body', the only column of strings") == 2


def test_bad_rows_are_counted(tmp_path, caplog):
    bad = pa.array([LONG, None, " ", b"\xff\xfe", "x"], pa.binary())
    corpus = _load(tmp_path / "a.parquet", parquet(pa.table({"text": bad, "domain": ["d", "d", "d", "d", None]})))
    assert _texts(corpus) == [LONG, "x"] and corpus.domains == ("d", "a")
    assert "skipped 3 of 5 rows (first: row 2: a 'text' that is not a string)" in caplog.text
    assert "1 row(s) with an empty 'text'" in caplog.text and "1 row(s) with bad UTF-8" in caplog.text


_OTHER = {"txt": ["a"], "other": ["b"]}


@pytest.mark.parametrize(
    "columns, message",
    [
        (_OTHER, "no column 'text' (columns: txt, other): expected 'text', or 'prompt' and 'answer', or 'messages', or "
                 "a single column of strings (did you mean 'txt'?)."),
        ({"id": [1]}, "no column 'text' (columns: id)"),
        ({"text": [1]}, "the column 'text' does not hold strings"),
        ({"text": [None]}, "the column 'text' does not hold strings"),
        ({"text": [""]}, "no usable row (row 1: an empty 'text')"),
        ({"text": pa.array([], pa.string())}, "the file is empty"),
        ({"text": [LONG], "domain": [3]}, "a 'domain' that is not a string"),
        ({"text": ["short"]}, "too short"),
        ({"messages": ["no list"]}, "'messages' that are not a list"),
    ],
)  # fmt: skip
def test_wrong_tables(tmp_path, columns, message):
    for name, raw in {"a.parquet": parquet(pa.table(columns)), "a.arrow": stream(pa.table(columns))}.items():
        with pytest.raises(DataError) as error:
            _load(tmp_path / name, raw)
        assert message in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_column_that_is_there_twice(tmp_path):
    table = pa.Table.from_arrays([pa.array([LONG]), pa.array([LONG])], names=["text", "text"])
    with pytest.raises(DataError, match="'text' is there 2 times"):
        _load(tmp_path / "a.arrow", stream(table))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.parquet", b"", "the file is empty"),
        ("a.parquet", b"PAR1", "not a whole parquet file"),
        ("a.parquet", b"hello" * 99, "not a whole parquet file"),
        ("a.parquet", parquet(_table())[:-20], "not a whole parquet file"),
        ("a.parquet", gzip.compress(b"x", mtime=0), "gzip-compressed: its name should end in .gz"),
        ("a.arrow", b"hello" * 99, "not a whole Arrow file"),
        ("a.arrow", stream(_table())[:5000], "not a whole Arrow file"),
        ("a.arrow", parquet(_table()), "a parquet file: its name should end in .parquet"),
        ("a.jsonl.zst", zstandard.compress(json_lines(ROWS))[:-9], "not a whole zstd file: it ends in the middle"),
        ("a.jsonl.zst", b"not zstd", "not a whole zstd file"),
        ("a.jsonl.zst", zstandard.compress(b""), "the file is empty"),
        ("a.jsonl", gzip.compress(b"x", mtime=0), "gzip-compressed: its name should end in .gz"),
        ("a.jsonl", zstandard.compress(b"x"), "zstd-compressed: its name should end in .zst"),
        ("a.txt", b"PK\3\4rest", "a zip archive: unpack it"),
        ("a.txt.gz", gzip.compress(b"\0\1", mtime=0), "binary"),
        ("a.txt.gz", gzip.compress("é".encode("latin-1") * 99, mtime=0), "not UTF-8"),
        ("a.txt.gz", gzip.compress(LONG.encode(), mtime=0)[:-4], "not a whole gzip file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(DataError) as error:
        _load(tmp_path / name, content)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_stream_without_end_marker_is_told(tmp_path, caplog):
    assert len(_load(tmp_path / "a.arrow", stream(_table())[:-8])) == len(ROWS)
    assert "no end marker" in caplog.text


def test_a_line_without_end_is_no_record(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("moe_zoo.data.formats.json_lines._MAX_LINE", 1000)
    lines = json_lines([{"text": LONG[:300]}, {"text": "x" * 5000}, {"text": "last"}])
    assert len(_load(tmp_path / "a.jsonl", lines)) == 2
    assert "line 2: more than 1,000 bytes" in caplog.text


@pytest.mark.parametrize(
    "package, name", [("pyarrow", "a.parquet"), ("pyarrow", "a.arrow"), ("zstandard", "a.txt.zst")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, name):
    (tmp_path / "good.txt").write_text(LONG)
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    # In a folder as well: a corpus that depends on what is installed would be worse than an error.
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=rf"package {package}, .* `pip install 'moe-zoo\[data\]'`") as error:
            load_corpus(path, TOKENIZER)
        assert "\n" not in str(error.value)


def test_saved_data_set(tmp_path, caplog):
    halves = [_table(ROWS[:300]), _table(ROWS[300:])]
    corpus = load_corpus(write_saved(tmp_path / "set", halves, **{"cache-1.arrow": b"x"}), TOKENIZER)
    reference = _load(tmp_path / "rows.jsonl", json_lines(ROWS))
    assert corpus.fingerprint == reference.fingerprint
    assert "1 file(s) that a saved data set does not list" in caplog.text


def _write_dict(root, splits=("train", "test", "validation")):
    rows = [{"text": row["text"]} for row in ROWS]
    write_saved(root / "train", [_table(rows[:500])])
    write_saved(root / "test", [_table(rows[500:])])
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return root


def test_dict_of_saved_data_sets(tmp_path, caplog):
    corpus = load_corpus(_write_dict(tmp_path / "set"), TOKENIZER)
    assert corpus.domains == ("set",) and _texts(corpus) == [row["text"] for row in ROWS]
    assert "the split(s) validation are not there" in caplog.text


def test_mixed_folder(tmp_path, caplog):
    _write_dict(tmp_path / "saved")
    write_saved(tmp_path / "deep" / "one", [_table([{"text": "deep"}])])
    write_saved(tmp_path / "damaged", [_table()], state={"_data_files": [{"filename": "gone.arrow"}]})
    (tmp_path / "lines.jsonl.zst").write_bytes(zstandard.compress(json_lines([{"text": "line"}])))
    (tmp_path / "deep" / "book.txt.gz").write_bytes(gzip.compress(b"book", mtime=0))
    (tmp_path / "rows.parquet").write_bytes(parquet(_table([{"text": "row"}])))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "notes.docx").write_bytes(b"x")
    corpus = load_corpus(tmp_path, TOKENIZER)
    found = {text: corpus.domains[d] for text, d in zip(_texts(corpus), corpus.domain_ids, strict=True)}
    assert len(corpus) == 604 and found[ROWS[7]["text"]] == "saved"
    assert (found["deep"], found["book"], found["line"], found["row"]) == ("deep", "deep", "lines", "rows")
    for text in ("2 file(s) that could not be read", "1 .docx file(s)", "names 'gone.arrow', which is not there"):
        assert text in caplog.text


@pytest.mark.parametrize(
    "state, message",
    [
        ({"_data_files": [{"filename": "gone.arrow"}]}, "names 'gone.arrow', which is not there"),
        ({"_data_files": [{"filename": "../../x.arrow"}]}, "names 'x.arrow', which is not there"),
        ({"_data_files": [{"filename": "a\0"}]}, "NUL"),
        ({"_data_files": []}, "does not list its files"),
        ({"_data_files": "x"}, "does not list its files"),
        ({"_data_files": [3]}, "does not list its files"),
        ([], "not a JSON object"),
        ({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_data_files": [{"filename": "i"}]},
         "flatten_indices"),
    ],
)  # fmt: skip
def test_damaged_saved_data_sets(tmp_path, state, message):
    with pytest.raises(DataError) as error:
        load_corpus(write_saved(tmp_path / "set", [_table()], state=state), TOKENIZER)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_damaged_dicts(tmp_path):
    root = _write_dict(tmp_path / "a", splits=["other"])
    with pytest.raises(DataError, match="the splits other: none of them is there"):
        load_corpus(root, TOKENIZER)
    (root / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="a/dataset_dict.json is not valid JSON"):
        load_corpus(root, TOKENIZER)
    (root / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (root / "train" / "data-00000-of-00001.arrow").write_bytes(b"x" * 99)
    with pytest.raises(DataError, match="train/data-00000-of-00001.arrow: not a whole Arrow file"):
        load_corpus(root, TOKENIZER)
