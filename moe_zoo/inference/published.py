"""generation_config.json: which ids end a text, and the sampling its authors recommend."""

import json
from pathlib import Path
from typing import Any

from moe_zoo.checkpoints import CheckpointError


def generation_settings(folder: Path | None) -> dict[str, Any]:
    """{"stop_ids": [...], "sampling": {...}}. The ids always count; the sampling only where it is asked for.

    "sampling" has temperature, top_k, top_p and min_p as far as they are recommended; temperature 0 where the file says
    `do_sample: false`. What is not there is left out. Without the file, the ids are those of config.json.
    """
    if folder is None:
        return {"stop_ids": [], "sampling": {}}
    settings = _read(folder / "generation_config.json")
    given = settings if "eos_token_id" in settings else _read(folder / "config.json")
    eos = given.get("eos_token_id")
    stops = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    sampling = {name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p") if settings.get(name)}
    if not settings.get("do_sample", bool(sampling)):
        sampling = {"temperature": 0.0} if settings else {}
    return {"stop_ids": [int(i) for i in stops], "sampling": sampling}


def start_id(folder: Path) -> int | None:
    """What an encoder-decoder's answers begin with; None if neither generation_config.json nor config.json says it."""
    found = (_read(folder / name).get("decoder_start_token_id") for name in ("generation_config.json", "config.json"))
    return next((int(i) for i in found if i is not None), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(settings).__name__}")
    return settings
