"""The quickstart's mixture with DyT in place of its RMSNorms: tanh(alpha x), no statistic at all.

Command:  python scripts/train.py --config=configs/dyt.py --workdir=runs/dyt
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  not trained to the end yet; docs/zoo/bhyt.md has what the norms cost
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)

Where alpha begins matters and falls with the width: --config.model.tanh_norm.alpha_mixer=0.8, alpha_ffn, alpha_last.
Embeddings are multiplied by a learned scalar that begins at sqrt(hidden_size), as the paper has it for LLaMA.
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    return {"model": {"norm": "dyt_no_bias", "embedding_scale": base["model"]["hidden_size"] ** 0.5}}
