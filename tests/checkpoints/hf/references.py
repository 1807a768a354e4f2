"""Models that transformers has no class for: tiny checkpoints as published, and what a reference of our own makes of
them.

    python tests/checkpoints/hf/references.py     # writes golden.json: the references' logits, which are kept
"""

import json
import zlib
from pathlib import Path

import numpy as np
import reference
import reference_deepseek
import reference_openmoe
from safetensors.numpy import save_file

GOLDEN = Path(__file__).with_name("golden.json")
_MODULES = (reference_deepseek, reference_openmoe)
_OF = {name: module for module in _MODULES for name in module.TINY}
#: name -> config.json
TINY = reference.TINY | {name: module.TINY[name] for name, module in _OF.items()}
IDS = np.random.RandomState(1).randint(0, 96, 9)


def tensors(name: str) -> dict[str, np.ndarray]:
    """Random weights under the published names: routers decide, norms and biases act. numpy keeps this stream."""
    if name not in _OF:
        return reference.tensors(TINY[name])
    found = {}
    for path, shape in _OF[name].shapes(TINY[name]).items():
        drawn = np.random.RandomState(zlib.crc32(f"{name}/{path}".encode())).standard_normal(shape)
        router = path.endswith(("gate.weight", "gate_weight"))
        scale = 1.0 if router else 0.3 if len(shape) == 1 else 0.2
        found[path] = (("norm" in path) + scale * drawn).astype(np.float32)
    return found


def save(name: str, folder: Path) -> None:
    """A directory as it would be published."""
    (folder / "config.json").write_text(json.dumps(TINY[name]))
    save_file(tensors(name), folder / "model.safetensors")


def logits(name: str, ids: np.ndarray, **more) -> tuple[np.ndarray, list[list[list[int]]]]:
    """([S, V] of one text, per routed layer and token the chosen experts), in float64."""
    if name not in _OF:
        return reference.logits(name, ids)
    wide = {path: array.astype(np.float64) for path, array in tensors(name).items()}
    return _OF[name].logits(TINY[name], wide, ids, **more)


def module(name: str):
    """The reference of a model that has golden logits."""
    return _OF[name]


def golden() -> dict[str, np.ndarray]:
    """Name -> logits f64[4, V] of the last tokens of `IDS`, as they were when they were written."""
    return {name: np.array(rows) for name, rows in json.loads(GOLDEN.read_text()).items()}


def write_golden() -> None:
    """A row per token."""
    rows = {name: [json.dumps([round(float(x), 5) for x in row]) for row in logits(name, IDS)[0][-4:]] for name in _OF}
    models = [f' "{name}": [\n  ' + ",\n  ".join(lines) + "\n ]" for name, lines in rows.items()]
    GOLDEN.write_text("{\n" + ",\n".join(models) + "\n}\n")


if __name__ == "__main__":
    write_golden()
