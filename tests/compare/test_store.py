"""The store: appended whole or not at all, by several at once, and what a kill tore is no run."""

import json
import multiprocessing

import pytest

from moe_zoo.compare.store import Store
from moe_zoo.data.errors import DataError


def test_what_was_appended_is_read_in_order_and_a_key_only_once(tmp_path):
    store = Store(tmp_path / "sub" / "cpu.jsonl")
    assert store.read() == [] and store.keys() == set()
    assert store.append({"key": "a", "loss": 1.5}) and store.append({"key": "b", "loss": None})
    assert not store.append({"key": "a", "loss": 9.0})
    assert store.read() == [{"key": "a", "loss": 1.5}, {"key": "b", "loss": None}] and store.keys() == {"a", "b"}


@pytest.mark.parametrize("torn", ['{"key": "c", "lo', '{"key": "c"}', "\x00"])
def test_a_torn_last_line_is_passed_over_and_the_next_writer_mends_it(tmp_path, torn):
    path = tmp_path / "cpu.jsonl"
    path.write_text('{"key": "a"}\n' + torn)
    store = Store(path)
    assert store.keys() == {"a"}
    assert store.append({"key": "b"})
    assert path.read_text() == '{"key": "a"}\n{"key":"b"}\n'


def test_a_whole_line_that_is_no_run_is_an_error_and_stays(tmp_path):
    path = tmp_path / "cpu.jsonl"
    path.write_text('{"key": "a"}\nrubbish\n')
    for use in (Store(path).read, lambda: Store(path).append({"key": "b"})):
        with pytest.raises(DataError, match="line 2"):
            use()
    assert path.read_text() == '{"key": "a"}\nrubbish\n'
    path.write_text("[]\n")
    with pytest.raises(DataError, match="line 1.*no key"):
        Store(path).read()


def test_not_a_number_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError):
        Store(tmp_path / "cpu.jsonl").append({"key": "a", "loss": float("nan")})
    assert Store(tmp_path / "cpu.jsonl").read() == []


def _write(path, name, barrier):
    barrier.wait()
    for i in range(40):
        Store(path).append({"key": f"{name}{i}", "ballast": "x" * 5000})
        Store(path).append({"key": f"both{i}", "by": name})


def test_two_writers_at_once_lose_nothing_and_tear_nothing(tmp_path):
    path = tmp_path / "cpu.jsonl"
    spawn = multiprocessing.get_context("spawn")  # a forked child would inherit jax's threads half alive
    barrier = spawn.Barrier(2)
    writers = [spawn.Process(target=_write, args=(path, name, barrier)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 120
    assert set(keys) == {f"{name}{i}" for name in ("a", "b", "both") for i in range(40)}
