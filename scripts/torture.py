"""Kills a training run again and again, and checks that nothing is lost but the steps since the last finished save.

    python scripts/torture.py --kills=20

The same small run is trained twice: once in peace, once with `kill -9` at random moments, every other one while a save
is being written. After each kill the run must go on from a save at least as new as the newest one that was finished
before. At the end weights, moments, counters and metrics must be equal bit for bit. Exit code 1 if they are not.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installation
TIMES = ("seconds", "processor_seconds", "tokens_per_second")


def command(workdir: Path, arguments) -> list[str]:
    """The training command, saving so often that a save is nearly always under way."""
    return [
        sys.executable, str(ROOT / "scripts/train.py"), f"--config={arguments.config}", f"--workdir={workdir}",
        f"--config.train.steps={arguments.steps}", f"--config.checkpoint.every={arguments.every}",
        f"--config.log.every={arguments.every}", f"--config.log.eval_every={arguments.steps // 2}",
        "--config.log.tensorboard=false",
    ]  # fmt: skip


def start(workdir: Path, arguments) -> subprocess.Popen:
    """A training process that has just been started."""
    environment = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(arguments.cache), **os.environ}
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    # to a file: a pipe that nobody reads fills up
    with open(arguments.folder / "output.txt", "w") as output:
        return subprocess.Popen(command(workdir, arguments), stdout=output, stderr=subprocess.STDOUT, env=environment)


def finished_saves(workdir: Path) -> list[int]:
    """Steps whose checkpoint directory has its final name."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def being_saved(workdir: Path) -> bool:
    """Whether there is a checkpoint directory without its final name."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(not p.name.isdigit() for p in folder.iterdir())


def kill_once(workdir: Path, arguments, rng: random.Random, during_save: bool) -> tuple[bool, str]:
    """Starts the run and kills it. Returns (whether it had ended before, what happened)."""
    before = finished_saves(workdir)
    process, began = start(workdir, arguments), time.monotonic()
    metrics = workdir / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    training = lambda: metrics.exists() and metrics.stat().st_size != size
    while process.poll() is None and not training() and time.monotonic() - began < arguments.timeout:
        time.sleep(0.01)
    until = time.monotonic() + rng.uniform(0, arguments.spread)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    while during_save and process.poll() is None and not being_saved(workdir):
        time.sleep(0.0005)
    where = "during a save" if being_saved(workdir) else "between saves"
    saved = finished_saves(workdir)
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    said = (arguments.folder / "output.txt").read_text()
    if before:
        resumed = re.search(r"goes on from step (\d+)", said)
        if not resumed or int(resumed[1]) < before[-1]:
            raise SystemExit(f"FAILED: the run had a finished save of step {before[-1]}, but said: {said[-2000:]}")
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"FAILED: the run ended with code {code}: {said[-2000:]}")
    return code == 0, f"killed {where}, newest finished save {saved[-1] if saved else 'none'}"


def finish(workdir: Path, arguments) -> None:
    """Trains to the end."""
    process = start(workdir, arguments)
    if process.wait(timeout=arguments.timeout * 4):
        raise SystemExit(f"FAILED: {(arguments.folder / 'output.txt').read_text()[-2000:]}")


def lines(workdir: Path) -> list[dict]:
    """The metrics without times."""
    told = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in told]


def leaves(workdir: Path, arguments) -> dict:
    """Every array of the last checkpoint."""
    import jax

    from moe_zoo.checkpoints import Checkpoints
    from moe_zoo.sharding import make_mesh
    from moe_zoo.train.config import load_config
    from moe_zoo.train.step import Trainer

    config = load_config(arguments.config)
    trainer = Trainer(config, make_mesh(devices=jax.devices()[:1]), config.train.objective.make())
    checkpoints = Checkpoints(workdir)
    state, _ = checkpoints.restore(arguments.steps, trainer.abstract_state())
    checkpoints.close()
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def main() -> None:
    """Peace, war, comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="deepseek_v3:tiny", help="its buffers and counters are part of the test")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=4, help="steps from save to save")
    parser.add_argument("--spread", type=float, default=4.0, help="kills fall up to so many seconds into training")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for a start")
    arguments = parser.parse_args()
    arguments.folder = Path(tempfile.mkdtemp(prefix="torture_"))
    arguments.cache = arguments.folder / "cache"
    rng = random.Random(arguments.seed)
    peace, war = arguments.folder / "peace", arguments.folder / "war"
    finish(peace, arguments)
    print(f"in peace: {arguments.steps} steps, {len(lines(peace))} lines of metrics", flush=True)
    for n in range(arguments.kills):
        ended, told = kill_once(war, arguments, rng, during_save=n % 2 == 1)
        print(f"kill {n + 1}: {told}", flush=True)
        if ended:
            raise SystemExit("FAILED: the run ended before all kills were done: raise --steps or lower --spread")
    finish(war, arguments)

    import numpy as np

    a, b = leaves(peace, arguments), leaves(war, arguments)
    different = [name for name in a if not np.array_equal(a[name], b[name])]
    same_metrics = lines(peace) == lines(war)
    print(f"{len(a) - len(different)} of {len(a)} arrays equal bit for bit; metrics equal: {same_metrics}")
    if different or a.keys() != b.keys() or not same_metrics:
        raise SystemExit(f"FAILED: {different[:5]}, kept in {arguments.folder}")
    shutil.rmtree(arguments.folder)
    print(f"{arguments.kills} kills survived")


if __name__ == "__main__":
    main()
