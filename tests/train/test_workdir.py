"""What is in a work directory already, and what happens to it: nothing, unless it is ours and asked for."""

import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_zoo.checkpoints import CheckpointError
from moe_zoo.core.registry import ConfigError
from moe_zoo.sharding import MeshConfig, make_mesh
from moe_zoo.train.config import load_config
from moe_zoo.train.loop import TrainingError, train
from moe_zoo.train.memory import check_memory, state_bytes
from moe_zoo.train.step import Trainer
from moe_zoo.train.workdir import prepare_workdir, read_run_settings, write_settings

TINY = load_config("quickstart:tiny")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files, words",
    [
        (
            {"config.json": '{"architectures": ["OlmoeForCausalLM"]}', "model.safetensors": "x"},
            "not the settings of a run",
        ),
        ({"config.json": "[1, 2]"}, "not the settings of a run"),
        ({"config.json": '{"model": {'}, "is damaged"),
        ({"checkpoints/5/weights": "x"}, "no config.json"),
    ],
)
def test_what_is_not_ours_is_refused_and_left_alone(tmp_path, files, words, overwrite):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=words):
        prepare_workdir(tmp_path, TINY, "abc", overwrite)
    assert contents(tmp_path) == before


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    write_settings(tmp_path, TINY, "another corpus")
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="corpus: .*--overwrite"):
        prepare_workdir(tmp_path, TINY, "abc", False)
    assert (tmp_path / "checkpoints/3").exists()
    prepare_workdir(tmp_path, TINY, "abc", True).close()
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "config.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    lock = prepare_workdir(tmp_path, TINY, "abc", False)
    with pytest.raises(ConfigError, match=r"another process is training there \(pid \d+"):
        prepare_workdir(tmp_path, TINY, "abc", False)
    lock.close()
    prepare_workdir(tmp_path, TINY, "abc", False).close()


def test_settings_are_written_in_one_piece(tmp_path):
    write_settings(tmp_path, TINY, "abc")
    assert read_run_settings(tmp_path) == json.loads(json.dumps(TINY.to_dict())) | {"corpus": "abc"}
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(settings, work directory) of a run with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "mine.txt"
    text.write_text("the experts route tokens to the slots\n" * 400)
    settings = [
        ("data.source", str(text)), ("data.seq_len", "16"), ("train.steps", "4"), ("checkpoint.every", "1"),
        ("log.tensorboard", "false"), ("log.eval_rows", "4"),
    ]  # fmt: skip
    config = load_config("quickstart:tiny", settings)
    train(config, folder / "run", stop_at=2)
    return config, folder / "run"


@pytest.mark.parametrize("damage", ["truncated", "removed", "flipped metadata"])
def test_a_damaged_checkpoint_is_named_with_the_step_to_fall_back_to(run, tmp_path, damage):
    config, source = run
    workdir = shutil.copytree(source, tmp_path / "run")
    newest = workdir / "checkpoints/2/params"
    for file in sorted(newest.rglob("*")):
        if not file.is_file():
            continue
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif damage == "removed" and file.suffix != ".json":
            file.unlink()
        elif "manifest" in file.name or file.name.startswith("_"):
            file.write_bytes(bytes(b ^ 0x55 for b in file.read_bytes()))
    before = contents(workdir)
    with pytest.raises(CheckpointError, match=r"checkpoints/2 cannot be restored: .*to go on from step 1 remove"):
        train(config, workdir)
    after = contents(workdir)
    assert {k: v for k, v in after.items() if k.startswith("checkpoints")} == {
        k: v for k, v in before.items() if k.startswith("checkpoints")
    }
    shutil.rmtree(workdir / "checkpoints/2")
    if damage == "truncated":  # of the damage nothing is left
        assert train(config, workdir)["finished"]


def test_a_damaged_position_or_time_is_a_line_before_anything_compiles(run, tmp_path):
    config, source = run
    workdir = shutil.copytree(source, tmp_path / "run")
    (file,) = (workdir / "checkpoints/2/meta").rglob("metadata")
    meta = json.loads(file.read_text())
    positions = (None, [], {}, "x", 3, *({"next_index": x} for x in ("x", None, -1, 1.5)))
    times = [{"seconds": x} for x in (None, "x", -1, float("inf"), True)] + [{"processor_seconds": None}]
    for change in [{"data": x} for x in positions] + times:
        file.write_text(json.dumps(meta | change))
        with pytest.raises(CheckpointError, match="checkpoints/2/meta is damaged: .*") as raised:
            train(config, workdir)
        assert "\n" not in str(raised.value)
    file.write_text(json.dumps(meta))
    assert train(config, workdir, stop_at=3)["step"] == 3


def test_a_directory_that_vanishes_ends_the_run_with_a_line(run, tmp_path):
    config, source = run
    workdir = shutil.copytree(source, tmp_path / "run")

    class Remover:
        def write(self, step, kind, metrics):
            shutil.rmtree(workdir, ignore_errors=True)

        def truncate_after(self, step): ...

        def close(self): ...

    with pytest.raises(TrainingError, match="vanished"):
        train(config, workdir, writers=[Remover()])


@pytest.mark.parametrize("brackets", ["[os_error_code='27']", "[tensorstore_spec='{\"a\": [1]}'] [os_error_code='27']"])
def test_what_the_system_refused_is_said_in_its_words(brackets, tmp_path):
    from moe_zoo.checkpoints.native import Checkpoints

    saved = Checkpoints(tmp_path)
    with (
        pytest.raises(CheckpointError, match=r"^4 cannot be saved: File too large$"),
        saved._named_errors("4 cannot be saved"),
    ):
        raise ValueError(
            f'OUT_OF_RANGE: Error opening "zarr" driver: Failed to write to file 6: File too large {brackets}'
        )
    saved.close()


@pytest.mark.slow  # a process that imports jax
def test_a_disk_that_takes_no_more_ends_the_run_with_a_line(run, tmp_path):
    """A limit on file sizes stands for the full disk: writes fail in the same places."""
    config, _ = run
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from moe_zoo.cli import common, train\n"
        "sys.exit(common.run(train.train))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config=quickstart:tiny", f"--workdir={tmp_path / 'run'}",
         f"--config.data.source={config.data.source}", "--config.log.tensorboard=false", "--config.checkpoint.every=2"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    # writes that were under way may add lines of their own when the storage gives up, and end one in front of ours
    assert re.search(r"error: .*cannot be saved: File too large", done.stderr), done.stderr[-2000:]


def test_a_checkpoint_opens_on_fewer_devices_with_equal_logits(tmp_path):
    import moe_zoo

    config = load_config(
        "deepseek_v3:tiny", [("train.steps", "2"), ("data.batch_size", "8"), ("mesh.data", "2"), ("mesh.expert", "2"),
                             ("mesh.fsdp", "2"), ("log.tensorboard", "false"), ("log.eval_rows", "8")]
    )  # fmt: skip
    train(config, tmp_path)
    ids = np.random.default_rng(0).integers(0, 256, (4, 12))
    shapes = {8: MeshConfig(data=2, expert=2, fsdp=2), 4: MeshConfig(data=1, expert=2, fsdp=2), 1: MeshConfig()}
    logits = {
        n: np.asarray(moe_zoo.load(tmp_path, mesh=make_mesh(mesh, jax.devices()[:n]))(ids).logits)
        for n, mesh in shapes.items()
    }
    np.testing.assert_allclose(logits[4], logits[8], atol=1e-5)
    np.testing.assert_allclose(logits[1], logits[8], atol=1e-5)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_allocated():
    huge = load_config("quickstart", [("model.hidden_size", str(2**20)), ("model.num_experts", "4096")])
    trainer = Trainer(huge, make_mesh(devices=jax.devices()[:1]), huge.train.objective.make())
    with pytest.raises(ConfigError, match="GiB for weights, moments and gradients alone, this host has"):
        check_memory(trainer)
    small = Trainer(TINY, make_mesh(devices=jax.devices()[:1]), TINY.train.objective.make())
    check_memory(small)
    state = small.init_state()
    assert sum(state_bytes(small).values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
