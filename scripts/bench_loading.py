"""Loading a published directory beside reading the same bytes with `safetensors.numpy.load_file`.

    python scripts/bench.py loading                      # a generated OLMoE of 2.1 GB, bfloat16, two files, on a CPU
    python scripts/bench.py loading --folder=DIR         # a directory that is there

Every loading is a process of its own that has imported what it needs, in turn with the others; files lie in the page
cache. Compared are lower quartiles. Memory is watched in one more that is not timed: RssAnon over what it was.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
#: OLMoE-1B-7B but for its depth
OLMOE = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048,
    "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
FILES = 2


def generate(folder: Path, layers: int) -> None:
    """A checkpoint of so many layers in `FILES` shards: names, shapes and types as published, random numbers."""
    import ml_dtypes

    from moe_zoo.checkpoints.hf import safetensors
    from moe_zoo.checkpoints.hf.families import find
    from moe_zoo.checkpoints.hf.plan import plan
    from moe_zoo.models import Decoder

    given = {**OLMOE, "num_hidden_layers": layers}
    family = find(given["architectures"][0], "")
    leaves = plan(Decoder(family.read(given)), family)
    shapes = {name: leaf.stored.shape(leaf.one) for leaf in leaves for _, name in leaf.tensors()}
    # in the order of their numbers, as transformers writes them
    names = sorted(
        shapes, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )
    dtype = np.dtype(ml_dtypes.bfloat16)
    pool = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(dtype)
    values = lambda name: np.resize(pool[names.index(name) :], shapes[name])
    weight_map = {}
    for i, part in enumerate(np.array_split(names, FILES)):
        file = f"model-{i + 1:05d}-of-{FILES:05d}.safetensors"
        safetensors.write(folder / file, [(name, dtype, shapes[name]) for name in map(str, part)], values)
        weight_map |= dict.fromkeys(map(str, part), file)
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(given))


def read_with_safetensors(folder: Path) -> Any:
    """Every tensor of every file in memory of its own."""
    import ml_dtypes  # noqa: F401, makes numpy know bfloat16
    from safetensors.numpy import load_file

    return [load_file(file) for file in sorted(folder.glob("*.safetensors"))]


def load_ours(folder: Path, **how) -> Any:
    """`moe_zoo.load`, until the arrays are there."""
    import jax

    import moe_zoo
    from moe_zoo.core import param as P

    if how.pop("mesh", False):
        from moe_zoo.sharding import MeshConfig, make_mesh

        how["mesh"] = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()[:8])
    loaded = moe_zoo.load(folder, **how)
    jax.block_until_ready(P.arrays(loaded.model))
    return loaded


CONTENDERS: dict[str, Callable[[Path], Any]] = {
    "ours": load_ours,
    "ours_int8": lambda folder: load_ours(folder, weights="int8"),
    "ours_mesh8": lambda folder: load_ours(folder, mesh=True),
    "safetensors": read_with_safetensors,
}


def worker(name: str, what: str, folder: Path) -> None:
    """Loads once and prints a line of JSON: "time" in seconds, "memory" in bytes."""
    load = CONTENDERS[name]
    if load is not read_with_safetensors:
        import jax

        import moe_zoo

        jax.devices(), moe_zoo.load
    print(json.dumps((_timed if what == "time" else _watched)(load, folder)))


def _timed(load: Callable[[Path], Any], folder: Path) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    loaded = load(folder)
    answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    del loaded  # not before the clock was read
    return answer


def _watched(load: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
    """Anonymous memory in bytes: the peak and what is left, over what it was; of what is loaded, bytes by device."""
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load(folder)
    done.set()
    watcher.join()
    after = _anonymous()
    return {"peak": max(peak, after) - before, "left": after - before, **_held(loaded)}


def _held(loaded: Any) -> dict[str, int]:
    """Bytes of all parameters, and of the most that one device holds and should."""
    if isinstance(loaded, list):
        return {"parameters": sum(array.nbytes for tensors in loaded for array in tensors.values())}
    from moe_zoo.core import param as P

    held: dict[Any, int] = {}
    arrays = P.arrays(loaded.model).values()
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    share = sum(array.dtype.itemsize * int(np.prod(array.sharding.shard_shape(array.shape))) for array in arrays)
    return {"parameters": sum(a.nbytes for a in arrays), "device": max(held.values()), "share": share}


def _anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def _ask(name: str, what: str, folder: Path) -> dict[str, Any]:
    """The answer of a worker in a process of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if name.endswith("mesh8"):
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, __file__, name, what, str(folder)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def run_loading(args: argparse.Namespace) -> None:
    """Interleaved rounds, then lower quartiles and their ratios to the last contender named."""
    with tempfile.TemporaryDirectory(prefix="bench_loading_") as temporary:
        folder = Path(args.folder or temporary)
        if not args.folder:
            generate(folder, args.layers)
        _compare(folder, args.peers.split(","), args.rounds)


def _compare(folder: Path, names: list[str], rounds: int) -> None:
    from moe_zoo.checkpoints.hf.safetensors import read_folder

    tensors = read_folder(folder)
    total, largest = sum(t.size for t in tensors.values()), max(t.size for t in tensors.values())
    # also brings the files into the page cache
    memory = {name: _ask(name, "memory", folder) for name in names}
    samples: dict[str, list] = {name: [] for name in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            answer = _ask(name, "time", folder)
            samples[name].append((answer["cpu"], answer["wall"]))
    quartiles = {name: np.quantile(np.array(taken), 0.25, axis=0) for name, taken in samples.items()}
    base = quartiles[names[-1]]
    files = len({t.file for t in tensors.values()})
    print(f"{total / 1e9:.2f} GB in {files} files, {len(tensors)} tensors, the largest {largest / 1e9:.2f} GB")
    print(f"{rounds} rounds, lower quartiles; speed: that of {names[-1]!r} is 1; memory in GB: RssAnon over before")
    print(f"  {'':14}{'wall s':>8}{'speed':>7}{'CPU s':>8}{'speed':>7}{'arrays':>8}{'peak':>7}{'over':>7}  one device")
    for name, (cpu, wall) in quartiles.items():
        m = memory[name]
        peak, held = m["peak"] / 1e9, m["parameters"] / 1e9
        device = f"{m['device'] / 1e9:.2f}, its share {m['share'] / 1e9:.2f}" if "device" in m else ""
        print(
            f"  {name:14}{wall:8.2f}{base[1] / wall:7.2f}{cpu:8.2f}{base[0] / cpu:7.2f}{held:8.2f}{peak:7.2f}"
            f"{peak - held:7.2f}  {device}"
        )


def add_loading(subparsers: Any) -> None:
    """A published directory into our arrays, beside safetensors' own reader."""
    parser = subparsers.add_parser("loading", help="a published directory beside safetensors.numpy.load_file")
    parser.add_argument("--folder", default=None, help="a published directory; generated if not given")
    parser.add_argument("--layers", type=int, default=2, help="of the generated one: 0.84 GB each, and 0.41 GB")
    parser.add_argument("--peers", default="ours,ours_int8,ours_mesh8,safetensors", help="ratios are to the last one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.set_defaults(run=run_loading)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
