"""LFM2-MoE (arXiv 2511.23404): short convolutions between layers of attention, sigmoid scores with a bias."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import Layers, hybrid
from moe_zoo.checkpoints.hf.rope import Rope

_W = ("w1", "w3", "w2")
_ORDER = Layers(
    lambda given, n: ["dense" if i < given.get("num_dense_layers", 2) else "moe" for i in range(n)],
    lambda kinds: {"num_dense_layers": next((i for i, k in enumerate(kinds) if k == "moe"), len(kinds))},
)

FAMILY = Family(
    model_type="lfm2_moe",
    architectures=("Lfm2MoeForCausalLM",),
    keys=(
        key("vocab_size"),
        key("hidden_size"),
        C.norm_eps("norm_eps", 1e-5),
        key("tie_word_embeddings", default=True, also=("tie_embedding",)),
        key("intermediate_size", default=7168),
        key("moe_intermediate_size", default=1792),
        key("num_experts", default=32),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=4),
        key("norm_topk_prob", "router.norm_topk_prob", default=True),
        key("use_expert_bias", "router.correction_bias", default=True),
        key("routed_scaling_factor", "router.routed_scaling_factor", default=1.0),
        key("conv_L_cache", "mixer.conv_kernel", default=3),
        key("conv_bias", "mixer.bias", default=False),
    ),
    parts=(
        C.Heads(kv=8),
        Rope(1e6),
        hybrid(_ORDER, lambda given, i: True, names=("conv", "full_attention")),
        C.NoLoss(),
        Only({"hidden_act": ("silu",)}),
    ),
    fixed={
        "mixer.name": "short_conv",
        "attention.qk_norm": "head",
        "router.score_function": "sigmoid",
        "router.norm_topk_eps": 1e-6,
    },
    layer={
        **C.ATTENTION,
        "mixer.o": linear("self_attn.out_proj.weight", inputs=2),
        "mixer.q_norm.scale": Stored("self_attn.q_layernorm.weight"),
        "mixer.k_norm.scale": Stored("self_attn.k_layernorm.weight"),
        **{f"mixer.in_{x}": linear("conv.in_proj.weight", part=i, parts=3) for i, x in enumerate("bcx")},
        **{f"mixer.in_{x}_bias": Stored("conv.in_proj.bias", part=i, parts=3) for i, x in enumerate("bcx")},
        "mixer.conv": Stored("conv.conv.weight", "conv"),
        "mixer.conv_bias": Stored("conv.conv.bias"),
        "mixer.out": linear("conv.out_proj.weight"),
        "mixer.out_bias": Stored("conv.out_proj.bias"),
        "mixer_norm.scale": Stored("operator_norm.weight"),
        "ffn_norm.scale": Stored("ffn_norm.weight"),
        **C.gated("ffn", "feed_forward", _W),
        **C.gated("ffn.experts", "feed_forward.experts.{e}", _W),
        "ffn.router.kernel": linear("feed_forward.gate.weight"),
        "ffn.router.correction": Stored("feed_forward.expert_bias"),
    },
    whole=WHOLE | {"norm.scale": Stored("model.embedding_norm.weight")},
)
