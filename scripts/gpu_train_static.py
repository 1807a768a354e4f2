"""`bench.py train --gpu-static`: our training step compiled for an H100 (or another) by XLA, without a GPU.

    python scripts/bench.py train --gpu-static --sizes 1b,2b

Every step is compiled in a process of its own, as the kernels are (gpu_static.py, which says what must be installed).
What comes out is what it will occupy: bytes of the state, of the step's own arrays, of both together at their highest;
our kernels among what is launched (the body of a loop counted once), their registers and spilled bytes; and what
attention keeps: how many arrays there are with all S x S scores of every head, and how big the largest block of scores
is. Nothing is timed.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import gpu_static
import gpu_train_case
import gpu_train_page
from gpu_train_case import Size

from moe_zoo.core.sight import _BLOCK

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
#: softmax is float32
_SCORES = re.compile(r"\bf32\[([\d,]+)\]")


def compile_step(size: Size, gpu: str) -> dict[str, Any]:
    """Compiles; what `memory_analysis` says, in bytes, parameters and FLOPs as counted, and attention's arrays."""
    import jax
    import jax.numpy as jnp

    devices = gpu_static.described_devices(gpu)
    trainer = gpu_train_case.our_trainer(size, devices)
    batch = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=trainer.batch_sharding)
        for name, a in gpu_train_case.our_batch(gpu_train_case.random_tokens(size, 0)).items()
    }
    progress = jax.ShapeDtypeStruct((), jnp.float32)
    begin = time.perf_counter()
    with jax.sharding.use_abstract_mesh(trainer.mesh.abstract_mesh):
        compiled = trainer.train_step.lower(trainer.abstract_state(), batch, progress).compile()
    memory = compiled.memory_analysis()
    return {
        "compile_s": time.perf_counter() - begin,
        "state_bytes": memory.argument_size_in_bytes,
        "reused_bytes": memory.alias_size_in_bytes,
        "scratch_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        **gpu_train_case.counted(trainer, size.seq),
        **attention_arrays(compiled.as_text(), size),
    }


def attention_arrays(text: str, size: Size) -> dict[str, int]:
    """{"whole_scores", "block_bytes"} of a program's text: arrays [.., S, S] with all heads, and the largest array of
    scores of some queries to all S keys.
    """
    whole, largest = set(), 0
    for dims in set(_SCORES.findall(text)):
        shape = [int(d) for d in dims.split(",")]
        # other numbers of rows: weights of experts, of as many layers as there are rows
        if len(shape) == 4 and shape[:2] == [size.batch, size.heads] and shape[3] == size.seq:
            whole |= {dims} if shape[2] == size.seq else set()
            largest = max(largest, 4 * math.prod(shape) if shape[2] in (_BLOCK, size.seq) else 0)
    return {"whole_scores": len(whole), "block_bytes": largest}


def run(args: argparse.Namespace) -> None:
    """Every size for every GPU: the table, printed and written; exit code 1 if a step does not compile or spills."""
    gpu_static.need_compilers("bench.py train --gpu-static")
    compiled = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in _PACKAGES},
        "python": sys.version.split()[0],
        "rows": [],
    }
    for name in ["tiny"] if args.tiny else args.sizes:
        for gpu in args.gpus:
            print(f"{name} for {gpu}", file=sys.stderr, flush=True)
            size = gpu_train_case.sized(name, args.batch, args.seq)
            script = [str(Path(__file__)), name, str(size.batch), str(size.seq), gpu]
            row = {"size": name, "gpu": gpu, "batch": size.batch, "seq": size.seq}
            row |= {"card_bytes": gpu_static.GPUS[gpu]["memory"], **gpu_static.compiled_alone(script, args.timeout)}
            compiled["rows"].append(row)
            if not args.tiny:
                gpu_train_page.keep({"compiled": compiled}, Path(args.out))
    print(gpu_train_page.compiled_section(compiled))
    raise SystemExit(any("error" in row or row["spilled_bytes"] for row in compiled["rows"]))


if __name__ == "__main__":
    chosen, batch, seq, gpu = sys.argv[1:]
    step = gpu_train_case.sized(chosen, int(batch), int(seq))
    print(json.dumps(compile_step(step, gpu)))
