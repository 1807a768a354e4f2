"""Mixtral (arXiv 2401.04088): the Mistral decoder with eight experts, two per token, gates renormalised."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.layout import linear
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(),
        key("sliding_window", "attention.sliding_window", default=None),
        key("intermediate_size", "moe_intermediate_size"),
        key("num_local_experts", "num_experts", default=8),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=2),
    ),
    parts=(C.Heads(kv=8), Rope(1e6), every("moe"), C.BalanceLoss()),
    fixed={"router.norm_topk_prob": True},
    layer={
        **C.ATTENTION,
        **C.NORMS,
        **C.MIXTRAL_EXPERTS,
        "ffn.router.kernel": linear("block_sparse_moe.gate.weight"),
    },
    whole=WHOLE,
)
