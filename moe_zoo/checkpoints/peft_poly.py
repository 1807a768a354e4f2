"""Poly and MHR as PEFT keeps them on disk: the skills of every linear layer and its table of tasks.

    MODULE.poly_lora_A [h, S, D/h, r], .poly_lora_B [h, S, r, N/h], .poly_router.module_logits [tasks, h S]

h heads, S skills; y += 1/r (x A) B of the mixed A and B. Ours are the same numbers in another order: A [S, r, D],
B [S, r, N], table [tasks, h, S].
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_zoo.checkpoints import peft
from moe_zoo.checkpoints.native import CheckpointError

_KEY = re.compile(r"(.+)\.(poly_lora_A|poly_lora_B|poly_router\.module_logits)")


@dataclasses.dataclass(frozen=True)
class PolyModule:
    """One linear layer's skills, in our order: `a` [S, r, D], `b` [S, r, N], `logits` [tasks, h, S]."""

    a: np.ndarray
    b: np.ndarray
    logits: np.ndarray


def read(folder: str | Path) -> dict[str, PolyModule]:
    """By module path. Raises CheckpointError for what is no Poly, lacks tensors, or contradicts its settings."""
    path, settings = Path(folder) / peft.CONFIG, peft.read_settings(folder)
    sizes = {key: settings.get(key) for key in ("r", "n_tasks", "n_skills", "n_splits")}
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise CheckpointError(f"{path}: {key}: expected a whole number > 0, got {size!r}")
    if settings.get("poly_type", "poly") != "poly" or settings.get("modules_to_save"):
        raise CheckpointError(f"{path}: poly_type other than 'poly', or modules_to_save: not supported")
    r, tasks, S, h = sizes.values()
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in peft.read_tensors(folder).items():
        match = _KEY.fullmatch(name)
        if not match:
            raise CheckpointError(f"{Path(folder) / peft.WEIGHTS}: tensor {name!r} is no part of Poly")
        found.setdefault(match[1], {})[match[2]] = array
    modules = {}
    for module, parts in sorted(found.items()):
        a, b, table = (parts.get(key) for key in ("poly_lora_A", "poly_lora_B", "poly_router.module_logits"))
        fits = a is not None and b is not None and table is not None
        fits = fits and a.ndim == b.ndim == 4 and (*a.shape[:2], a.shape[3]) == (h, S, r)
        if not fits or b.shape[:3] != (h, S, r) or table.shape != (tasks, h * S):
            has = {key: list(value.shape) for key, value in parts.items()}
            raise CheckpointError(f"{path}: {module!r} has {has}, its settings are {sizes}")
        modules[module] = PolyModule(
            a.transpose(1, 3, 0, 2).reshape(S, r, -1),
            b.transpose(1, 2, 0, 3).reshape(S, r, -1),
            table.reshape(tasks, h, S),
        )
    return modules


def save(folder: str | Path, modules: Mapping[str, PolyModule], settings: Mapping[str, Any]) -> None:
    """Writes the directory. `settings`: further keys of adapter_config.json."""
    first = next(iter(modules.values()))
    (tasks, h, S), r = first.logits.shape, first.a.shape[1]
    tensors = {}
    for module, m in modules.items():
        tensors[f"{module}.poly_lora_A"] = m.a.reshape(S, r, h, -1).transpose(2, 0, 3, 1)
        tensors[f"{module}.poly_lora_B"] = m.b.reshape(S, r, h, -1).transpose(2, 0, 1, 3)
        tensors[f"{module}.poly_router.module_logits"] = m.logits.reshape(tasks, h * S)
    text = {
        "peft_type": "POLY", "task_type": "CAUSAL_LM", "inference_mode": True, "poly_type": "poly",
        "modules_to_save": None, "init_weights": True, "target_modules": sorted(modules), "r": r, "n_tasks": tasks,
        "n_skills": S, "n_splits": h,
    }  # fmt: skip
    peft.write(folder, text | dict(settings), tensors)
