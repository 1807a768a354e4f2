"""Duo-LLM's first stage on the quickstart's data: a big and a small network in every layer, tokens draw one of the two.

Command:  python scripts/train.py --config=configs/duo_llm.py --workdir=runs/duo_llm
          then its router: configs/depth/duo_llm_router.py
          with a skip, drawn as often: --config.model.num_experts=3
Cost:     as the quickstart, at most 5 minutes of training on 2 CPU cores
Reaches:  see docs/zoo/duo_llm.md
Presets:  "" (the above), "tiny" (20 steps: seconds, for tests), "cpu", "gpu", "pod" (docs/comparison.md)

Any route works afterwards: `moe_zoo.transform.search_greedily` tries them, `losses_along` follows one. The networks are
the bank `big_small`; the draw, with probability 1/2 for each token and layer and no loss, is that of the router `thor`
for single tokens. What a run says of its test data is with drawn experts, too. There are no n-gram embeddings, which
would do much of what the big networks are for.
"""

from ml_collections import ConfigDict

from moe_zoo.train.config import extend


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(extend(f"quickstart:{arg}", changes))


def changes(base: dict) -> dict:
    # as wide as a dense layer of that model usually is
    width = 4 * base["model"]["hidden_size"]
    # the smallest preset is for tests, where compiling counts
    dispatch = "everywhere" if width < 256 else "dropless"
    return {
        "model": {
            "num_experts": 2,
            "moe_intermediate_size": width,
            "experts": {"name": "big_small"},
            "router": {"name": "thor", "granularity": "token", "eval_granularity": "token"},
            "dispatch": {"name": dispatch},
            "losses": {},
            "ngram": {},
        },
        "optim": {"lr_scales": []},
    }
