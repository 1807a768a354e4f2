"""Files of every format, cut short or with bytes changed: each loads or is one line of error, nothing else."""

import gzip
import random

import pytest

from moe_zoo.data import ByteTokenizer, DataError, load_corpus

pa = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
from data_files import arrow_file, json_lines, parquet, stream, write_saved  # noqa: E402

CASES, BATCHES = 200, 10
TEXTS = [{"text": f"row {i} " + "some words " * (i % 7 + 3), "domain": "ab"[i % 2]} for i in range(60)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i} " * 9}]}
    for i in range(60)
]


@pytest.fixture(scope="module")
def files():
    texts, chats = pa.Table.from_pylist(TEXTS), pa.Table.from_pylist(CHATS)
    lines = json_lines(TEXTS)
    return {
        "a.txt": lines,
        "a.txt.gz": gzip.compress(lines, mtime=0),
        "a.jsonl": json_lines(CHATS),
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.parquet": parquet(texts),
        "b.parquet": parquet(chats, compression="none", use_dictionary=False),
        "a.arrow": stream(texts),
        "b.arrow": stream(chats, options=pa.ipc.IpcWriteOptions(compression="lz4")),
        "c.arrow": arrow_file(chats),
    }


def _damage(raw, rng):
    raw = bytearray(raw)
    if rng.random() < 0.3:
        return raw[: rng.randrange(len(raw))]
    for _ in range(rng.randint(1, 8)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return raw


def _load(path):
    try:
        return len(load_corpus(path, ByteTokenizer())) > 0
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000 and str(path) in str(error)
        return False


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_files(files, tmp_path, batch):
    outcomes = []
    for case in range(batch, CASES, BATCHES):
        rng = random.Random(case)
        name = rng.choice(list(files))
        (tmp_path / name).write_bytes(_damage(files[name], rng))
        outcomes.append(_load(tmp_path / name))
    assert not all(outcomes)


def test_damaged_descriptions_of_saved_data_sets(tmp_path):
    folder = write_saved(tmp_path / "set", [pa.Table.from_pylist(TEXTS)])
    raw = (folder / "state.json").read_bytes()
    for case in range(50):
        (folder / "state.json").write_bytes(_damage(raw, random.Random(case)))
        _load(folder)
