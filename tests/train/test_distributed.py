"""Two processes of four devices each train as one process of eight: real processes, on loopback.

Slow, all of it: every run is two processes that import jax, and what is shown are runs that end early.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import moe_zoo
from moe_zoo.checkpoints import Checkpoints
from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.log_writers import read_metrics
from moe_zoo.train.loop import train
from moe_zoo.train.step import Trainer

ROOT = Path(__file__).parents[2]
STEPS, KEEP_UP = 16, 10  # steps of a whole run; seconds of silence after which a process is lost

pytestmark = pytest.mark.slow  # two processes that import jax and compile, nine times

# A writer that sends a signal when process 0 logs a step, so that it always comes at the same one.
SIGNALLER = """
import os, pathlib

class Signaller:
    def __init__(self):
        self.step, self.signal, self.process = map(int, os.environ["SEND"].split())

    def write(self, step, kind, metrics):
        if step == self.step and kind == "train":
            os.kill(int(pathlib.Path(os.environ["PIDS"]).read_text().split()[self.process]), self.signal)

    def truncate_after(self, step): ...
    def close(self): ...
"""


def settings(folder):
    return {
        "data.source": str(folder / "mine.txt"), "data.eval_batch_size": "16", "model.layers": "1*moe",
        "model.num_experts": "8", "mesh.expert": "8", "train.steps": str(STEPS), "checkpoint.every": "4",
        "checkpoint.keep": "9", "log.every": "1", "log.eval_every": "8", "log.eval_rows": "16",
        "log.sample_tokens": "0", "log.tensorboard": "false",
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the text, the writer above and all runs are."""
    folder = tmp_path_factory.mktemp("distributed")
    rng = np.random.default_rng(0)
    words = ["router", "expert", "token", "gate", "depth", "layer", "row", "bank"]
    (folder / "mine.txt").write_text("\n\n".join(" ".join(rng.choice(words, 40)) + "." for _ in range(300)))
    (folder / "signaller.py").write_text(SIGNALLER)
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(folder, name, *extra, send=None, only=(), timeout=120):
    """[(exit code, stdout, stderr)] of the processes. `send`: (step, signal, process); `only`: for process 1."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{folder}", "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PIDS": str(folder / "pids"), "SEND": " ".join(map(str, map(int, send or (0, 0, 0)))),
    }  # fmt: skip
    command = [
        sys.executable, str(ROOT / "scripts/train.py"), "--config=quickstart:tiny", f"--workdir={folder / name}",
        f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", f"--peer-timeout={KEEP_UP}",
        *(f"--config.{key}={value}" for key, value in settings(folder).items()), *extra,
        *(["--writer=signaller:Signaller"] if send else []),
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    each = {i: [*command, f"--process={i}", *(only if i else ())] for i in (0, 1)}
    started = [subprocess.Popen(line, env=environment, **pipes) for line in each.values()]
    (folder / "pids").write_text(" ".join(str(process.pid) for process in started))
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def without_times(path):
    timed = ("seconds", "processor_seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(path)]


def state(workdir, config, step=STEPS):
    """Everything of a checkpoint, opened by this process."""
    trainer = Trainer(config, make_mesh(config.mesh), config.train.objective.make())
    restored, meta = Checkpoints(workdir).restore(step, trainer.abstract_state())
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(restored)}
    return arrays, meta["data"]


@pytest.fixture(scope="module")
def whole(folder):
    """The run of two processes that nothing stops."""
    main, other = run(folder, "whole", "--json", "--config.log.sample_tokens=8")
    assert main[0] == 0 and other[0] == 0, main[2] + other[2]
    return main, other


@pytest.fixture(scope="module")
def config(folder):
    return load_config("quickstart:tiny", list(settings(folder).items()))


def test_the_numbers_are_those_of_one_process(folder, whole, config, tmp_path):
    """Not bit for bit: sums over processes are taken in another order than sums within one."""
    train(config, tmp_path)
    one, two = read_metrics(tmp_path / "metrics.jsonl"), read_metrics(folder / "whole/metrics.jsonl")
    assert [(a["step"], a["kind"]) for a in one] == [(b["step"], b["kind"]) for b in two] and len(one) == STEPS + 2
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6), a["step"]
    # step 1 is before any sum over processes could reach a weight
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=3e-7)


def test_one_process_speaks_and_writes(folder, whole):
    (_, told, _), (_, silent, complaints) = whole
    assert "8 cpu devices of 2 processes" in told and silent == "" and "error" not in complaints
    report = json.loads(told.strip().splitlines()[-1])
    assert (
        report["finished"]
        and report["sample"]["text"]
        and all(Path(path).is_file() for path in report["pictures"].values())
    )
    found = {path.name for path in (folder / "whole").iterdir()}
    assert found == {".lock", "checkpoints", "config.json", "metrics.jsonl", "pictures", "report.json"}


def test_a_checkpoint_opens_in_one_process_on_8_4_and_1_devices(folder, whole):
    ids = np.random.default_rng(0).integers(0, 256, (8, 12))
    meshes = {8: MeshConfig(expert=8), 4: MeshConfig(expert=4), 1: MeshConfig()}
    logits = {
        n: np.asarray(moe_zoo.load(folder / "whole", mesh=make_mesh(mesh, jax.devices()[:n]))(ids).logits)
        for n, mesh in meshes.items()
    }
    np.testing.assert_allclose(logits[4], logits[8], atol=1e-5)
    np.testing.assert_allclose(logits[1], logits[8], atol=1e-5)


def test_killed_killed_and_stopped_ends_where_the_whole_run_ends_bitwise(folder, whole, config):
    """Process 1 dies, then process 0, then one of them is asked to stop; each time the same command goes on."""
    KILL, TERM = 9, 15
    (code, _, line), (killed, _, _) = run(folder, "parts", send=(6, KILL, 1))
    assert (code, killed) == (3, -KILL), line
    assert re.fullmatch(r"(?s)(split: .*\n)?error: no sign of life from process 1 for 10 s; .*\n", line), line
    (killed, told, _), (code, _, line) = run(folder, "parts", send=(10, KILL, 0))
    assert "goes on from step 4" in told and (code, killed) == (3, -KILL), line
    assert line == "error: process 0 is gone; the same commands go on from the last checkpoint\n"
    (code, told, line), (other, _, _) = run(folder, "parts", send=(10, TERM, 1))
    assert (code, other) == (0, 0) and "goes on from step 8" in told, line
    stopped = int(re.search(r"stopped at step (\d+), saved", told)[1])
    assert 10 <= stopped <= 13
    (code, told, line), (other, _, _) = run(folder, "parts")
    assert (code, other) == (0, 0) and f"goes on from step {stopped}" in told, line
    (a, position), (b, same) = state(folder / "whole", config), state(folder / "parts", config)
    assert a.keys() == b.keys() and len(a) > 30 and position == same
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert without_times(folder / "whole/metrics.jsonl") == without_times(folder / "parts/metrics.jsonl")


@pytest.mark.parametrize(
    "extra, only, words",
    [
        (["--config.optim.learning_rate=1"], (), "holds a run with other settings"),
        (["--config.data.source=absent.txt"], (), "'absent.txt' is not a file or folder"),
        ([], ["--config.model.num_expert=4"], "unknown key 'model.num_expert'"),
    ],
)
def test_a_mistake_in_one_process_ends_both_with_a_line(folder, whole, extra, only, words):
    for code, _, line in run(folder, "whole", *extra, only=only, timeout=60):
        assert code in (2, 3) and len(re.findall("^error: .*", line, re.M)) == 1 and words in line, line
        assert "Traceback" not in line


def test_a_wrong_address_and_a_missing_process_end_with_a_line(folder):
    """Process 0 without the other; process 1 at a port where nobody is."""
    nobody = [f"--coordinator=127.0.0.1:{free_port()}"]
    for process, (code, told, line) in enumerate(run(folder, "never", "--connect-timeout=6", only=nobody, timeout=60)):
        assert code == 2 and told == "" and line.count("\n") == 1, line
        assert f"process {process} of 2" in line and "within 6 s" in line
    assert not (folder / "never").exists()
