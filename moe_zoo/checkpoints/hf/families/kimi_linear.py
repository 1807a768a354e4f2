"""Kimi Linear (arXiv 2510.26692): Kimi Delta Attention, every fourth layer latent attention without positions.

The routing of DeepSeek-V3.
"""

import dataclasses
import re
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.latent import TENSORS, Latent
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.mamba import NoPositions
from moe_zoo.checkpoints.hf.order import Given, Layers, hybrid
from moe_zoo.checkpoints.hf.safetensors import Tensor
from moe_zoo.models import ModelConfig

_KDA = {"num_heads": ("num_heads", 32), "head_dim": ("head_dim", 128), "conv_kernel": ("short_conv_kernel_size", 4)}
_FLAT = {"num_heads": "linear_num_heads", "head_dim": "linear_head_dim", "conv_kernel": "linear_conv_kernel_dim"}


def _kinds(given: Given, n: int) -> list[str]:
    types = given.get("mlp_layer_types")
    if types is None:
        first = given.get("first_k_dense_replace", 1)
        types = ["dense" if i < first else "sparse" for i in range(n)]
    return ["moe" if kind == "sparse" else "dense" for kind in types]


def _back(kinds: list[str]) -> dict[str, Any]:
    return {"mlp_layer_types": ["sparse" if kind == "moe" else "dense" for kind in kinds]}


def _is_full(given: Given, i: int) -> bool:
    """Layers of `linear_attn_config` count from 1."""
    nested = given.get("linear_attn_config") or {}
    return i + 1 in nested["full_attn_layers"] if "full_attn_layers" in nested else i > 0 and i % 4 == 0


class _Sizes:
    """Of Kimi Delta Attention, in a section of their own (as released) or beside the others."""

    def read(self, given: Given) -> dict[str, Any]:
        nested = given.get("linear_attn_config") or {}
        return {
            f"mixer.{ours}": nested.get(theirs, given.get(_FLAT[ours], default))
            for ours, (theirs, default) in _KDA.items()
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = {"pad_token_id": None}  # the default of their class is beyond a smaller vocabulary
        if config.mixer.name != "kimi_delta":
            return written
        return written | {theirs: getattr(config.mixer.config, ours) for ours, theirs in _FLAT.items()}


@dataclasses.dataclass(frozen=True)
class _Latent(Latent):
    """Without rotation, of which config.json says nothing."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = super().write(config)
        return {key: value for key, value in written.items() if not key.startswith("rope")}


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense layers under their released names: transformers 5.24 saves them under those of routed ones."""
    return {re.sub(r"block_sparse_moe\.(\w+_proj\.weight)", r"mlp.\1", name): t for name, t in tensors.items()}


FAMILY = Family(
    model_type="kimi_linear",
    architectures=("KimiLinearForCausalLM",),
    keys=(
        *C.SIZES,
        key("rms_norm_eps", "norm_eps", "mixer.norm_eps", default=1e-5),
        C.tied(),
        key("intermediate_size", default=9216),
        key("moe_intermediate_size", default=1024),
        key("n_group", "router.n_group", default=1, also=("num_expert_group",)),
        key("topk_group", "router.topk_group", default=1),
        key("routed_scaling_factor", "router.routed_scaling_factor", default=2.446),
        key("num_local_experts", "num_experts", default=256, also=("num_experts",)),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=8, also=("num_experts_per_token",)),
        key("norm_topk_prob", "router.norm_topk_prob", default=True, also=("moe_renormalize",)),
    ),
    parts=(
        _Latent(),
        NoPositions(),
        hybrid(Layers(_kinds, _back), _is_full),
        _Sizes(),
        C.SharedExperts(1, also="num_shared_experts"),
        C.NoLoss(),
        Only({"attention_bias": (False,), "moe_layer_freq": (1,), "mla_use_nope": (True,)}),
    ),
    # the norms inside of latent attention have their class's epsilon
    fixed={"mixer.name": "kimi_delta", "attention.norm_eps": 1e-6, **C.V3_ROUTER},
    layer={
        **C.ATTENTION,
        **TENSORS,
        **{f"mixer.conv_{x}": Stored(f"self_attn.{x}_conv1d.weight", "conv") for x in "qkv"},
        "mixer.b": linear("self_attn.b_proj.weight"),
        **{f"mixer.{x}_{y}": linear(f"self_attn.{x}_{y}_proj.weight") for x in "fg" for y in "ab"},
        "mixer.dt_bias": Stored("self_attn.dt_bias", "flat"),
        "mixer.A_log": Stored("self_attn.A_log", "column"),
        "mixer.norm.scale": Stored("self_attn.o_norm.weight"),
        **C.NORMS,
        **C.DENSE,
        **C.MIXTRAL_EXPERTS,
        **C.gated("ffn.shared", "block_sparse_moe.shared_experts"),
        "ffn.router.kernel": linear("block_sparse_moe.gate.weight"),
        "ffn.router.correction": Stored("block_sparse_moe.gate.e_score_correction_bias"),
    },
    whole=WHOLE,
    unpack=_renamed,
)
