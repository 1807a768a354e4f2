"""LongCat-Flash (arXiv 2509.01322): two latent attentions per layer, experts beside them, some of which do nothing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.latent import TENSORS, Latent
from moe_zoo.checkpoints.hf.layout import Stored
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.models import ModelConfig


class _Order:
    """A layer of theirs is two: `num_hidden_layers` is not what it says."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        n = given["num_layers"] if "num_layers" in given else given["num_hidden_layers"] // 2
        return every("shortcut").read({"num_hidden_layers": n})

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"num_layers": every("shortcut").write(config)["num_hidden_layers"]}


class _Latent(Latent):
    """Queries and the latent are as large as if they came straight from the hidden state."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        paths = super().read(given)
        for x in ("q", "kv"):
            rank = given[f"{x}_lora_rank"]
            paths[f"attention.latent.{x}_scale"] = (given["hidden_size"] / rank) ** 0.5
        return paths

    def write(self, config: ModelConfig) -> dict[str, Any]:
        # their class rotates what it calls a head
        return super().write(config) | {"head_dim": config.attention.latent.qk_rope_head_dim}


def _half(i: int) -> dict[str, Stored]:
    """Attention and norms of one half of a layer."""
    mixer = {name: dataclasses.replace(s, name=s.name.replace("attn.", f"attn.{i}.")) for name, s in TENSORS.items()}
    norms = {
        name: dataclasses.replace(s, name=s.name.replace(".weight", f".{i}.weight")) for name, s in C.NORMS.items()
    }
    return {**mixer, **norms}


FAMILY = Family(
    model_type="longcat_flash",
    architectures=("LongcatFlashForCausalLM",),
    keys=(
        *C.SIZES,
        key("rms_norm_eps", "norm_eps", default=1e-5),
        C.tied(),
        key("ffn_hidden_size", "intermediate_size", also=("intermediate_size",)),
        key("expert_ffn_hidden_size", "moe_intermediate_size", also=("moe_intermediate_size",)),
        key("n_routed_experts", "num_experts", also=("num_local_experts",)),
        key("zero_expert_num", "router.num_zero_experts", default=256),
        key("moe_topk", "router.num_experts_per_tok", default=12, also=("num_experts_per_tok",)),
        key("routed_scaling_factor", "router.routed_scaling_factor", default=6.0),
    ),
    parts=(
        _Latent(),
        _Order(),
        C.NoLoss(),
        Only({"zero_expert_type": ("identity",), "attention_bias": (False,), "router_bias": (False,)}),
    ),
    fixed={
        "attention.rope_interleaved": True,
        "router.correction_bias": True,
        "router.norm_topk_prob": False,
    },
    layer={
        **_half(0),
        **{f"second.{name}": stored for name, stored in _half(1).items()},
        **C.gated("dense", "mlps.0"),
        **C.gated("second.ffn", "mlps.1"),
        **C.EXPERTS,
        **C.parts("mlp.router.classifier.weight", "ffn.router.kernel", "ffn.router.zero_kernel"),
        "ffn.router.correction": Stored("mlp.router.e_score_correction_bias", part=0, parts=2),
        "ffn.router.zero_correction": Stored("mlp.router.e_score_correction_bias", part=1, parts=2),
    },
    whole=WHOLE,
    # transformers gives experts that do nothing a gate
    unused=(r"model\.mtp\..*", r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj\.weight"),
)
