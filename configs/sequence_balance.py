"""Top-k on the quickstart's data and size, load balanced within every sequence instead of the whole batch: the
sequence-wise loss of DeepSeek-V2, and the smallest group of "Demons in the Detail".

Command:  python scripts/train.py --config=configs/sequence_balance.py --workdir=runs/sequence_balance
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/load_balance.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)
"""

from ml_collections import ConfigDict

from moe_zoo.compare import Claim
from moe_zoo.train.config import extend

CLAIM = Claim(
    "specialization",
    "lower",
    baseline="top_k",
    says="balance within every sequence keeps experts from becoming those of a domain",
    source="arXiv 2501.11873",
)


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", CHANGES))


CHANGES = {"model": {"losses": {"load_balance": {"coef": 0.01, "over": "sequence"}, "z_loss": {"coef": 0.001}}}}
