"""MiniMax-01 (arXiv 2501.08313): lightning attention, every eighth layer softmax attention; norms in the stream."""

from typing import Any

import numpy as np

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, expand, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import Given, every, hybrid
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.mixers.lightning import slopes
from moe_zoo.models import ModelConfig

_PARTS = ("full_attn", "linear_attn", "mlp")


class _Residual:
    """What the stream (alpha) and a branch (beta) are multiplied by: one number each for all kinds of branches here."""

    def read(self, given: Given) -> dict[str, Any]:
        paths = {}
        for greek, ours in (("alpha", "skip_multiplier"), ("beta", "residual_multiplier")):
            numbers = {given.get(f"{part}_{greek}_factor", 1) for part in _PARTS}
            if len(numbers) > 1:
                raise CheckpointError(f"mlp_{greek}_factor: expected that of attention, got {sorted(numbers)}")
            paths[ours] = numbers.pop()
        return paths

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {f"{part}_alpha_factor": config.skip_multiplier for part in _PARTS} | {
            f"{part}_beta_factor": config.residual_multiplier for part in _PARTS
        }


class _Sizes:
    """Lightning attention has as many heads as the other, of the same size."""

    def read(self, given: Given) -> dict[str, Any]:
        N = given["num_attention_heads"]
        return {"mixer.num_heads": N, "mixer.head_dim": given.get("head_dim") or given["hidden_size"] // N}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


def _derived(config: ModelConfig, given: Given) -> dict[str, np.ndarray]:
    """Decays between the tokens of a block, as their class computes and keeps them."""
    kinds, C = expand(config), given.get("block_size", 256)
    H, at = config.attention.num_attention_heads, np.arange(1, C + 1, dtype=np.float32)
    found = {}
    for layer, kind in enumerate(kinds):
        if kind.endswith(":attention"):
            continue
        rate = np.asarray(slopes(H, len(kinds), layer), np.float32)[:, None, None]
        apart = rate * (at[:, None] - at)[None, None]
        with np.errstate(over="ignore"):
            between = np.where(apart >= 0, np.exp(-apart), np.float32(0))
        found |= {
            f"model.layers.{layer}.self_attn.{name}": np.asarray(value, np.float32)
            for name, value in {
                "slope_rate": rate,
                "query_decay": np.exp(-rate * at[:, None]),
                "key_decay": np.exp(-rate * (C - at[:, None])),
                "diagonal_decay": between,
            }.items()
        }
    return found


FAMILY = Family(
    model_type="minimax",
    architectures=("MiniMaxForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(),
        key("sliding_window", "attention.sliding_window", default=None),
        key("intermediate_size", "moe_intermediate_size"),
        key("num_local_experts", "num_experts", default=8),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=2),
    ),
    parts=(
        C.Heads(kv=8),
        Rope(1e6),
        hybrid(every("moe"), lambda given, i: (i + 1) % 2 == 1),
        _Residual(),
        _Sizes(),
        C.BalanceLoss(),
    ),
    # the norm inside of lightning attention has its class's epsilon
    fixed={
        "mixer.name": "lightning",
        "mixer.norm_eps": 1e-6,
        "norm_placement": "stream",
        "router.norm_topk_prob": True,
    },
    layer={
        **C.ATTENTION,
        **{
            f"mixer.w_{x}": linear("self_attn.qkv_proj.weight", part=i, parts=3, by_head=True)
            for i, x in enumerate("qkv")
        },
        "mixer.gate": linear("self_attn.output_gate.weight"),
        "mixer.norm.scale": Stored("self_attn.norm.weight"),
        "mixer.out": linear("self_attn.out_proj.weight", inputs=2),
        **C.NORMS,
        **C.MIXTRAL_EXPERTS,
        "ffn.router.kernel": linear("block_sparse_moe.gate.weight"),
    },
    whole=WHOLE,
    unused=(r"model\.layers\.\d+\.self_attn\.(slope_rate|(query|key|diagonal)_decay)",),
    derived=_derived,
)
