"""ERNIE 4.5 MoE: softmax scores with a correction bias, shared experts, interleaved rotary pairs."""

from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import Given, Layers
from moe_zoo.checkpoints.hf.rope import Rope


def _kinds(given: Given, n: int) -> list[str]:
    first, last = given.get("moe_layer_start_index", 1), given.get("moe_layer_end_index", -1)
    last, step = n - 1 if last == -1 else last, given.get("moe_layer_interval", 1)
    return ["moe" if first <= i <= last and (i + 1) % step == 0 else "dense" for i in range(n)]


def _back(kinds: list[str]) -> dict[str, Any]:
    routed = [i for i, kind in enumerate(kinds) if kind == "moe"]
    step = routed[1] - routed[0] if len(routed) > 1 else 1
    first, last = (routed[0], routed[-1]) if routed else (len(kinds), len(kinds))
    return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": step}


FAMILY = Family(
    model_type="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(True),
        key("intermediate_size"),
        key("moe_intermediate_size"),
        key("moe_num_experts", "num_experts", default=64, also=("num_experts",)),
        key("moe_k", "router.num_experts_per_tok", default=6, also=("num_experts_per_tok",)),
    ),
    parts=(
        C.Heads(kv=4),
        Rope(500_000.0),
        Layers(_kinds, _back),
        C.SharedExperts(2, "moe_num_shared_experts"),
        C.BalanceLoss(),
        Only({"use_bias": (False,)}),
    ),
    fixed={"attention.rope_interleaved": True, "router.correction_bias": True, "router.norm_topk_prob": True},
    layer={
        **C.ATTENTION,
        **C.NORMS,
        **C.DENSE,
        **C.EXPERTS,
        **C.gated("ffn.shared", "mlp.shared_experts"),
        "ffn.router.kernel": linear("mlp.gate.weight"),
        "ffn.router.correction": Stored("mlp.moe_statics.e_score_correction_bias", "row"),
    },
    whole=WHOLE,
    unused=(r"model\.mtp_.*", r"mtp.*"),
)
