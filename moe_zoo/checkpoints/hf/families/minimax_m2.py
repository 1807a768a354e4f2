"""MiniMax-M2: sigmoid scores with a correction bias, query-key norm over the full width, half of each head rotated."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(),
        C.tied(),
        key("intermediate_size", "moe_intermediate_size"),
        key("num_local_experts", "num_experts", default=256),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=8),
    ),
    parts=(C.Heads(kv=8, size=128), Rope(5e6), every("moe"), C.BalanceLoss()),
    fixed={
        "attention.qk_norm": "full",
        "router.score_function": "sigmoid",
        "router.correction_bias": True,
        "router.norm_topk_prob": True,
    },
    layer={
        **C.ATTENTION,
        **C.QK_NORM,
        **C.NORMS,
        **C.MIXTRAL_EXPERTS,
        "ffn.router.kernel": linear("block_sparse_moe.gate.weight"),
        "ffn.router.correction": Stored("block_sparse_moe.e_score_correction_bias"),
    },
    whole=WHOLE,
    unused=(r"model\.mtp.*", r"mtp.*"),
)
