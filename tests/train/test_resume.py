"""A run that was stopped ends bit for bit where one that never stopped ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import moe_zoo
from moe_zoo.checkpoints import CheckpointError
from moe_zoo.cli.train import begin_from
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.train.config import load_config
from moe_zoo.train.log_writers import read_metrics
from moe_zoo.train.loop import TrainingError, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text file of the user's own."""
    path = tmp_path_factory.mktemp("data") / "mine.txt"
    rng = np.random.default_rng(0)
    words = ["router", "expert", "token", "gate", "depth", "layer", "row", "bank"]
    lines = [" ".join(rng.choice(words, 9)) + "." for _ in range(1500)]
    path.write_text("\n\n".join("\n".join(lines[i : i + 5]) for i in range(0, 1500, 5)))
    return path


def config(text, *extra):
    overrides = [
        ("data.source", str(text)), ("log.tensorboard", "false"), ("mesh.data", "8"), ("train.steps", "12"),
        ("checkpoint.every", "4"), ("log.every", "1"), ("log.eval_every", "6"), ("log.eval_rows", "16"),
        ("data.eval_batch_size", "16"), ("model.router.score_function", "sigmoid"),
        ("model.router.correction_bias", "true"), ("model.router.bias_update_rate", "0.01"), *extra,
    ]  # fmt: skip
    return load_config("configs/quickstart.py:tiny", overrides)


def leaves(state):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def without_times(path):
    timed = ("seconds", "processor_seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(path)]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """(the run that nothing stopped, its directory)."""
    folder = tmp_path_factory.mktemp("whole")
    return train(config(text), folder), folder


def test_stopped_twice_equals_never_stopped_bitwise(text, finished, tmp_path):
    whole, folder = finished
    assert whole["finished"] and whole["step"] == 12
    # step 5 is saved on the way out; 10 lies behind the checkpoint of 8, with metrics of 9 and 10 already written
    assert train(config(text), tmp_path / "parts", stop_at=5)["step"] == 5
    assert not train(config(text), tmp_path / "parts", stop_at=10)["finished"]
    parts = train(config(text), tmp_path / "parts")
    a, b = leaves(whole["state"]), leaves(parts["state"])
    assert a.keys() == b.keys() and len(a) > 30
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert without_times(folder / "metrics.jsonl") == without_times(tmp_path / "parts/metrics.jsonl")
    assert [line["step"] for line in read_metrics(tmp_path / "parts/metrics.jsonl") if line["kind"] == "train"] == list(
        range(1, 13)
    )


def test_a_finished_run_trains_no_further_and_loads(text, finished):
    done, folder = finished
    again = train(config(text), folder)
    assert again["step"] == 12 and again["finished"]
    loaded = moe_zoo.load(folder)
    for name, value in P.arrays(loaded.model).items():
        np.testing.assert_array_equal(value, {**done["state"]["trainable"], **done["state"]["buffers"]}[name])
    ids = np.arange(20).reshape(2, 10)
    logits, _, _ = done["trainer"].model(done["state"])(ids)
    np.testing.assert_allclose(loaded(ids).logits, logits, atol=1e-5)
    assert isinstance(loaded.generate("router", 5)[0], str)


def test_other_settings_in_the_same_directory_are_refused_and_nothing_is_touched(text, finished, tmp_path):
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(ConfigError, match=r"optim.learning_rate: 0.003 -> 0.001.*--overwrite"):
        train(config(text, ("optim.learning_rate", "1e-3")), tmp_path)
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    fresh = train(config(text, ("optim.learning_rate", "1e-3")), tmp_path, overwrite=True, stop_at=1)
    assert fresh["step"] == 1 and [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_an_unwritable_directory_and_a_directory_without_a_run_are_clear(text, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        train(config(text), tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match="not a run"):
        moe_zoo.load(tmp_path)


def test_divergence_stops_with_the_step_and_what_to_try(text, tmp_path):
    wild = config(
        text,
        ("optim.name", "sgd"),
        ("optim.learning_rate", "1e30"),
        ("optim.clip_norm", "none"),
        ("optim.warmup_steps", "0"),
        ("train.guard.max_skipped", "3"),
    )
    with pytest.raises(TrainingError, match=r"step \d+: 3 steps in a row.*(nan|inf).*layers\.\d.*learning_rate"):
        train(wild, tmp_path)


def test_a_run_begins_from_the_weights_of_another(text, finished, tmp_path):
    """All given: the first loss is the other's last. Another router's parameters are drawn; the base keeps its own."""
    first, folder = finished
    given = P.arrays(moe_zoo.load(folder).model)
    still = [("optim.learning_rate", "1e-30"), ("optim.weight_decay", "0")]
    same = train(config(text, *still), tmp_path / "same", begin_from=given, stop_at=2)
    for path, value in same["state"]["trainable"].items():
        np.testing.assert_allclose(value, first["state"]["trainable"][path], atol=1e-7)
    router = ("model.router.name", "recurrent")
    settings, rest = begin_from(str(folder), [router])
    assert settings["model"]["router"]["name"] == "top_k" and settings["data"] == {"tokenizer": "bytes"}
    other = train(config(text, router, *still), tmp_path / "other", begin_from=rest, stop_at=1)
    fresh = other["state"]["trainable"].keys() - rest.keys()
    assert fresh and all("router" in path or "shared" in path for path in fresh)
    wider = ("model.moe_intermediate_size", "48")
    with pytest.raises(ConfigError, match=r"experts.w_\w+: the weights to begin from have shape .*32.*48"):
        train(config(text, wider), tmp_path / "wider", begin_from=given)


def test_further_writers_get_every_line(text, tmp_path):
    class Memory:
        def __init__(self):
            self.lines, self.closed = [], False

        def write(self, step, kind, metrics):
            self.lines.append((step, kind, metrics["loss"]))

        def truncate_after(self, step):
            self.lines = [line for line in self.lines if line[0] <= step]

        def close(self):
            self.closed = True

    memory = Memory()
    train(config(text), tmp_path, stop_at=3, writers=[memory])
    lines = [(line["step"], line["kind"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert memory.lines == lines and memory.closed


def test_minutes_end_the_run_and_move_the_schedule(text, tmp_path):
    timed = config(
        text,
        ("train.steps", "none"),
        ("train.minutes", "0.05"),
        ("optim.schedule", "linear"),
        ("optim.warmup_steps", "0"),
    )
    run = train(timed, tmp_path)
    assert run["finished"] and 3.0 <= run["seconds"] < 6
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert rates[0] == pytest.approx(3e-3, rel=0.05) and rates[-1] < 0.7 * rates[0]


def command(text, workdir, *extra):
    return [
        sys.executable, str(ROOT / "scripts/train.py"), "--config=quickstart:tiny", f"--workdir={workdir}",
        f"--config.data.source={text}", "--config.log.tensorboard=false", "--config.data.eval_batch_size=16", *extra,
    ]  # fmt: skip


def environment():
    """Of a process with one device, which finds the programs that another one has compiled."""
    return os.environ | {
        "PYTHONPATH": str(ROOT), "XLA_FLAGS": re.sub(r"--xla_force\S+", "", os.environ["XLA_FLAGS"]),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }  # fmt: skip


def run(*arguments, **kwargs):
    return subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=120, **kwargs)


@pytest.mark.slow  # five processes that import jax
def test_command_line_trains_is_stopped_resumes_samples_and_evaluates(text, tmp_path):
    workdir = tmp_path / "run"
    steps = ["--config.train.steps=100000", "--config.log.every=1"]
    process = subprocess.Popen(
        command(text, workdir, *steps),
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command goes on" in output, output
    stopped = max(line["step"] for line in read_metrics(metrics))
    done = run(*command(text, workdir, f"--config.train.steps={stopped + 5}", "--json"))
    assert done.returncode == 0, done.stderr
    assert f"goes on from step {stopped}" in done.stdout
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["step"] == stopped + 5 and 0 < report["bits_per_byte"]["overall"] < 9
    assert (
        all(Path(path).stat().st_size > 5000 for path in report["pictures"].values()) and len(report["pictures"]) == 3
    )
    sampled = run(
        sys.executable,
        str(ROOT / "scripts/sample.py"),
        f"--workdir={workdir}",
        "--prompt=router",
        "--tokens=8",
        "--json",
    )
    assert (
        sampled.returncode == 0
        and json.loads(sampled.stdout.strip().splitlines()[-1])["samples"][0]["prompt"] == "router"
    )
    scored = run(sys.executable, "-m", "moe_zoo.evaluate", f"--workdir={workdir}", "--json")
    again = json.loads(scored.stdout.strip().splitlines()[-1])
    assert again["bits_per_byte"]["overall"] == pytest.approx(report["bits_per_byte"]["overall"], abs=1e-5)


@pytest.mark.slow  # two processes that import jax
def test_command_line_mistake_is_one_line_and_exit_code_2(text, tmp_path):
    begin = time.monotonic()
    wrong = run(*command(text, tmp_path / "run", "--config.model.num_expert=4"))
    assert time.monotonic() - begin < 10  # 3 s on an idle machine; the suite may share it
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "'num_experts'" in wrong.stderr, wrong.stderr
    assert not (tmp_path / "run").exists()
    missing = run(*command(tmp_path / "absent.txt", tmp_path / "run"))
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "absent.txt" in missing.stderr, (
        missing.stderr
    )
