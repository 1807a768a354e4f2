"""FTP on any model that can be loaded: four numbers of a token decide which layers it goes through; the model stays.

Command:  python scripts/train.py --config=configs/depth/ftp.py --init-from=PATH --workdir=runs/ftp
          PATH: a run of ours or a published directory
Cost:     300 steps of 16 rows of 256 tokens, each through the model twice
Reaches:  see docs/zoo/ftp.md
Presets:  "" (the above), "tiny" (20 steps of few rows: seconds, for tests)

`--config.model.depth.sparsities="(0.0, 0.3, 0.5, 0.2)"`: the part of the tokens that passes each layer by, as
`moe_zoo.transform.search_sparsities` finds it; one number is of all layers.
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"lora/lora:{arg}", CHANGES if arg else CHANGES | FULL))


CHANGES = {
    "model": {"adapters": {"name": "none"}, "depth": {"name": "ftp"}},
    "data": {"source": "embedded"},
    "optim": {"learning_rate": 1e-2},
    "train": {"objective": {"name": "distill"}},
}

FULL = {
    "data": {"source": "embedded", "seq_len": 256, "batch_size": 16},
    "train": {"steps": 300, "objective": {"name": "distill"}},
}
