"""Modality groups on the quickstart's data and size: half the experts are of prose, half of code, markup and tables.

Command:  python scripts/train.py --config=configs/modality_groups.py --workdir=runs/modality_groups
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/modality_groups.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "test_bits_per_byte",
    "lower",
    baseline="dense",
    says="experts of their own for each modality, which pick its tokens, beat a dense model at the same compute",
    source="arXiv 2407.21770",
)

# of the embedded corpus and of the one that scripts/prepare_data.py makes; all other domains are prose, group 0
FORMAL = "python_code|c_headers|character_names|go|mathematics|*_manual"


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    E = base["model"]["num_experts"]
    return {
        "model": {
            # noise is for experts that begin as copies of each other; these do not
            "router": {"name": "modality_groups", "groups": [f"{FORMAL}=1"], "gumbel_noise": False},
            "dispatch": {"name": "dropless", "max_active": E // 2},
            "losses": {},
        },
    }
