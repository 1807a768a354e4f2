"""The quickstart's mixture with DyT in place of its RMSNorms: tanh(alpha x), no statistic at all.

Command:  python scripts/train.py --config=configs/dyt.py --workdir=runs/dyt
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/bhyt.md
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)

Where alpha begins matters, and the wider the model the smaller: 1 here, `tanh_norm.alpha_mixer`, `alpha_ffn`,
`alpha_last`; the settings' own defaults are LLaMA-7B's. Embeddings, which no statistic brings to size 1, are multiplied
by a learned scalar that begins at 64, sqrt(hidden_size) of LLaMA-7B.
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {
    "model": {
        "norm": "dyt_no_bias",
        "tanh_norm": {"alpha_mixer": 1.0, "alpha_ffn": 1.0, "alpha_last": 1.0},
        "embedding_scale": 64.0,
    }
}
