"""What was loaded, trained or changed as a directory: `moe_zoo.save_hf` for transformers, `moe_zoo.save` any model."""

from pathlib import Path

from moe_zoo.checkpoints import CheckpointError, hf
from moe_zoo.inference.loaded import Loaded


def save_hf(loaded: Loaded, path: str | Path) -> str:
    """Writes config.json, weights under their published names, and the tokenizer's files.

    A model that came from a published directory is written as it was there, where nothing was changed; a run of ours as
    the family that has its settings. Returns the name of its class. Raises CheckpointError when there is none, naming
    what does not fit.
    """
    if loaded.config.adapted:
        raise CheckpointError(
            "published models have no adapters: transform.merge puts them into the weights, transform.save_adapter "
            "writes them by themselves"
        )
    if loaded.model.selects:
        raise CheckpointError("published models have no selectors of depth: moe_zoo.save writes any model")
    tokens = {}
    theirs = loaded.published is not None and loaded.published.family is not hf.OURS
    if not theirs and loaded.tokenizer is not None:
        ids = {f"{kind}_token_id": getattr(loaded.tokenizer, f"{kind}_id") for kind in ("bos", "eos", "pad")}
        tokens = {name: value for name, value in ids.items() if value < loaded.config.vocab_size}
    family = hf.save(Path(path), loaded.model, loaded.config, loaded.published, extras=loaded.folder, settings=tokens)
    return family.architectures[0]


def save(loaded: Loaded, path: str | Path) -> None:
    """Writes any model as `moe_zoo.load` opens it: every setting in config.json, safetensors under our names, and the
    tokenizer's files (`checkpoints/hf/ours.py`). Adapters are written as they are, beside their base.

    Raises CheckpointError for experts that were narrowed to int8, or when the disk says no.
    """
    settings = {"tokenizer": "bytes"} if loaded.tokenizer_spec == "bytes" and loaded.tokenizer is not None else {}
    hf.save(Path(path), loaded.model, loaded.config, family=hf.OURS, extras=loaded.folder, settings=settings)
