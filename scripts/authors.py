"""Routers, losses, adapters and layers beside their authors' code: same weights, same inputs, the largest difference.

    python scripts/authors.py --checkouts=DIR [--only=soft,switch]

DIR holds git checkouts named `owner+name`, `owner/name` or `name`; what is missing is named and skipped. Nothing of
theirs is kept here: single functions and classes are read from the committed source and executed with stubs for what
does not matter on a CPU (process groups, kernels, recorders). So this runs the checkouts' code: know what you give it.
Most comparisons need torch; `huggingface` needs transformers and no checkout (both: `pip install -e .[parity]`).

One line per comparison. `choices` counts (token, expert) pairs that only one side chose, `k` steps with another number
of experts; the rest are largest absolute differences, float32 on both sides. What exceeds its tolerance is marked `!`
and makes the exit code 1. T = B * S tokens, D model, E experts, K experts per token, V vocabulary, C capacity.
"""

import argparse
import importlib
import pathlib
import sys

from authors_attention import palbert, routing_transformer
from authors_inputs import TOLERANCE
from authors_jax import expert_choice, gshard, noisy_top_k, soft, sparse_ot, switch
from authors_lora import glider, mos
from authors_models import deepseek_moe, openmoe
from authors_torch import (
    block_ffn,
    deepseek,
    hashed,
    huggingface,
    null_experts,
    recurrent,
    relu,
    sinkhorn,
    smoe_dropout,
    thor,
    top_p,
)
from authors_vision import biformer
from checkout import Checkout, Missing, torch

COMPARISONS = {  # name -> function, what it needs
    "soft": (soft, "google-research/vmoe"),
    "expert_choice": (expert_choice, "google/flaxformer"),
    "switch": (switch, "google/flaxformer"),
    "noisy_top_k": (noisy_top_k, "tensorflow/tensor2tensor"),
    "gshard": (gshard, "tensorflow/mesh"),
    "deepseek": (deepseek, "deepseek-ai/DeepSeek-V3"),
    "deepseek_moe": (deepseek_moe, "deepseek-ai/deepseek-moe-16b-base"),
    "openmoe": (openmoe, "hpcaitech/ColossalAI"),
    "huggingface": (huggingface, "transformers"),
    "recurrent": (recurrent, "qiuzh20/RMoE"),
    "relu": (relu, "thu-ml/ReMoE"),
    "block_ffn": (block_ffn, "thunlp/BlockFFN"),
    "smoe_dropout": (smoe_dropout, "VITA-Group/Random-MoE-as-Dropout"),
    "null_experts": (null_experts, "CengZihao/AdaMoE"),
    "top_p": (top_p, "ZhenweiAn/Dynamic_MoE"),
    "sinkhorn": (sinkhorn, "thu-ml/ReMoE"),
    "sparse_ot": (sparse_ot, "google-research/vmoe"),
    "thor": (thor, "microsoft/Stochastic-Mixture-of-Experts"),
    "hash": (hashed, "facebookresearch/ParlAI"),
    "glider": (glider, "UNITES-Lab/glider"),
    "mos": (mos, "Forence1999/MoS"),
    "biformer": (biformer, "rayleizhu/BiFormer"),
    "palbert": (palbert, "tinkoff-ai/palbert"),
    "routing_transformer": (routing_transformer, "lucidrains/routing-transformer"),
}


def report(name: str, directory: pathlib.Path) -> bool:
    """Runs and prints one comparison: whether all of it is within tolerance, or it could not be run."""
    compare, source = COMPARISONS[name]
    try:
        if torch is None and compare not in (soft, expert_choice, switch, noisy_top_k, gshard, sparse_ot):
            raise Missing("needs torch")
        given = Checkout(directory, source) if "/" in source else importlib.import_module(source)
        source += f"@{given.commit[:12]}" if "/" in source else f" {given.__version__}"
        figures = compare(given)
    except (Missing, ImportError) as missing:
        print(f"{name}: skipped: {missing}")
        return True
    bad = [n for n, v in figures.items() if not v <= (0 if isinstance(v, int) else TOLERANCE)]
    text = [f"{n} {v if isinstance(v, int) else f'{v:.1e}'}{' !' * (n in bad)}" for n, v in figures.items()]
    print(f"{name}: {source}: {', '.join(text)}", flush=True)
    return not bad


def main() -> int:
    """Runs the comparisons that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkouts", type=pathlib.Path, required=True, help="folder with the authors' repositories")
    parser.add_argument("--only", default=",".join(COMPARISONS), help="some of %(default)s")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(COMPARISONS):
        parser.error(f"--only: no comparison {', '.join(unknown)}; there are {', '.join(COMPARISONS)}")
    return 0 if all([report(name, args.checkouts) for name in args.only.split(",")]) else 1


if __name__ == "__main__":
    sys.exit(main())
