"""The metrics file survives kills and resumes; TensorBoard forgets what a resumed run does again."""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from moe_zoo.train.log_writers import JsonlWriter, TensorBoardWriter, Writers, read_metrics


def _metrics(step):
    return {"loss": 4.0 / step, "expert_load": [[0.25, 0.75], [0.5, 0.5]]}


def _write_steps(path, steps, resume_from=None):
    writer = JsonlWriter(path)
    if resume_from is not None:
        writer.truncate_after(resume_from)
    for step in steps:
        writer.write(step, "train", _metrics(step))
        if step % 2 == 0:
            writer.write(step, "validation", {"bits_per_byte": 2.0 / step})
    writer.close()


def test_written_metrics_are_read_back(tmp_path):
    writer = JsonlWriter(tmp_path / "deep" / "metrics.jsonl")
    metrics = {
        "loss": np.float32(2.3),
        "count": np.int64(3),
        "load": jnp.array([[0.25, 0.75]]),
        "moe/entropy": 0.1 + 0.2,
    }
    writer.write(7, "train", metrics)
    writer.close()
    assert read_metrics(tmp_path / "deep" / "metrics.jsonl") == [
        {"step": 7, "kind": "train", "loss": 2.3, "count": 3, "load": [[0.25, 0.75]], "moe/entropy": 0.1 + 0.2}
    ]


def test_small_floats_are_written_briefly_and_exactly(tmp_path):
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, "train", {"values": values, "half": jnp.asarray(values, jnp.bfloat16)})
    writer.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(np.float32(line["values"]), values)
    np.testing.assert_array_equal(jnp.asarray(line["half"], jnp.bfloat16), jnp.asarray(values, jnp.bfloat16))
    assert (tmp_path / "metrics.jsonl").stat().st_size < 200 * 14


def test_lines_are_on_disk_before_close(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, "train", {"loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    writer.close()


def test_not_finite_numbers_are_valid_json_and_read_as_nan(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(
        1, "train", {"a": math.nan, "b": np.float32("inf"), "c": [[1.0, -math.inf]], "d": jnp.array([jnp.nan])}
    )
    writer.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["c"] == [[1.0, None]]
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(line["a"]) and math.isnan(line["b"]) and math.isnan(line["c"][0][1]) and math.isnan(line["d"][0])
    assert line["c"][0][0] == 1.0


def test_reserved_names_are_refused(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="step"):
        writer.write(1, "train", {"step": 2})
    writer.close()


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 8, "kind": "tr', b'{"step": 8, "kind": "train", "loss": 0.5}', b"\xff\xfe"]
)
def test_resumed_file_equals_uninterrupted_file(tmp_path, torn):
    _write_steps(tmp_path / "whole.jsonl", range(1, 11))
    _write_steps(tmp_path / "resumed.jsonl", range(1, 8))
    with (tmp_path / "resumed.jsonl").open("ab") as file:
        file.write(torn)
    _write_steps(tmp_path / "resumed.jsonl", range(5, 11), resume_from=4)
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [path.name for path in tmp_path.glob("resumed*")] == ["resumed.jsonl"]


def test_a_torn_line_does_not_swallow_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    writer = JsonlWriter(path)
    writer.write(2, "train", {})
    writer.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_whole_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "kind": "train"}')
    writer = JsonlWriter(path)
    writer.truncate_after(1)
    writer.close()
    assert path.read_bytes() == b'{"step": 1, "kind": "train"}\n'


def test_truncation_keeps_unknown_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    unknown = b'# a note\n{"kind": "config", "seed": 1}\n[1, 2]\n{"step": "x"}\n\n'
    path.write_bytes(unknown + b'{"step": 9, "kind": "train"}\n')
    writer = JsonlWriter(path)
    writer.truncate_after(3)
    writer.close()
    assert path.read_bytes() == unknown
    assert read_metrics(path)[0] == {"kind": "config", "seed": 1}


def _events(directory):
    """Every event in a TensorBoard log directory, in order of writing; a record is length, checksum, data, checksum."""
    event_type = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    events = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(event_type.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_tensorboard_gets_scalars_only(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(3, "train", {"loss": np.float32(1.5), "steps": 3, "load": [0.5, 0.5], "name": "x", "flag": True})
    writer.close()
    values = [
        (event.step, value.tag, value.simple_value) for event in _events(tmp_path) for value in event.summary.value
    ]
    assert values == [(3, "train/loss", 1.5), (3, "train/steps", 3.0)]


@pytest.mark.parametrize("how", ["constructor", "method"])
def test_tensorboard_purges_the_steps_after_the_restored_one(tmp_path, how):
    writer = TensorBoardWriter(tmp_path, resume_step=4 if how == "constructor" else None)
    if how == "method":
        writer.truncate_after(4)
    writer.write(5, "train", {"loss": 1.0})
    writer.close()
    starts = [event.step for event in _events(tmp_path) if event.WhichOneof("what") == "session_log"]
    assert starts == [5]


def test_tensorboard_makes_no_file_without_scalars(tmp_path):
    writer = TensorBoardWriter(tmp_path / "tensorboard")
    writer.write(1, "train", {"load": [0.5, 0.5]})
    writer.close()
    assert not (tmp_path / "tensorboard").exists()


class _Recorder:
    def __init__(self, failing=False):
        self.calls = []
        self._failing = failing

    def write(self, step, kind, metrics):
        self.calls.append(("write", step, kind, dict(metrics)))

    def truncate_after(self, step):
        self.calls.append(("truncate_after", step))

    def close(self):
        self.calls.append(("close",))
        if self._failing:
            raise OSError("disk full")


def test_writers_fan_out_and_close_all_even_if_one_fails():
    recorders = [_Recorder(failing=True), _Recorder()]
    with pytest.raises(OSError, match="disk full"), Writers(recorders) as writers:
        writers.truncate_after(2)
        writers.write(3, "train", {"loss": 1.0})
    expected = [("truncate_after", 2), ("write", 3, "train", {"loss": 1.0}), ("close",)]
    assert [recorder.calls for recorder in recorders] == [expected, expected]
