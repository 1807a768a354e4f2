"""The quickstart's mixture with a recurrent state in three of four layers, as Qwen3-Next has it: Gated DeltaNet.

Command:  python scripts/train.py --config=configs/hybrid.py --workdir=runs/hybrid
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  not trained to the end yet; "tiny" goes from 7.9 bits per byte at step 5 to 7.4 at step 10
Presets:  "" (the above), "tiny" (20 steps of a very small model: seconds, for tests)

Another mixer: --config.model.mixer.name=mamba2 (or mamba, short_conv, kimi_delta, lightning), each with sizes of its
own: --config.model.mixer.state_size=32. Which layers have attention: --config.model.layers="2*(moe moe:attention)".
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", TINY if arg == "tiny" else FULL))


FULL = {"model": {"layers": "1*(moe moe moe moe:attention)", "mixer": {"name": "gated_delta_net"}}}
TINY = {
    "model": {
        "layers": "1*(moe moe:attention)",
        "mixer": {
            "name": "gated_delta_net",
            "num_key_heads": 2,
            "num_value_heads": 2,
            "key_head_dim": 16,
            "value_head_dim": 16,
        },
    }
}
