"""The dense decoder with the Routing Transformer's attention: half of the heads look around them, half into clusters.

Command:  python scripts/train.py --config=configs/routing_transformer.py --workdir=runs/routing_transformer
          that no token sees the future in training, too: --config.model.mixer.assignment=token_argmax
          the control, random clusters: --config.model.mixer.clusters=random
          in the last layer alone: --config.model.layers="3*dense:attention 1*dense"
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/routing_transformer.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)

The clusters of a row together have as many members as it has tokens.
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"dense:{arg}", changes))


def changes(base: dict) -> dict:
    clusters = max(4, base["data"]["seq_len"] // 128)
    window = base["data"]["seq_len"] // clusters
    mixer = {"name": "routed_attention", "local_window": window, "num_clusters": clusters, "window": window}
    return {"model": {"mixer": mixer}}
