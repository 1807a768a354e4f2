"""Nemotron-H and Nemotron 3 Nano (arXiv 2504.03624): a layer is Mamba-2, attention, dense or routed, squared ReLU.

Attention without positions, feed-forward networks without gates, the routing of DeepSeek-V3.
"""

from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import Family, Only, compress, expand, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.mamba import NoLimit, NoPositions, tensors
from moe_zoo.checkpoints.hf.order import Given
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig

_KINDS = {
    "linear_attention": "mixer", "full_attention": "mixer:attention", "moe": "moe:none", "mlp": "dense:none",
    "mamba": "mixer", "attention": "mixer:attention",
}  # fmt: skip
_LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


class _Layers:
    """`layers_block_type`, or a letter for each in `hybrid_override_pattern`."""

    def read(self, given: Given) -> dict[str, Any]:
        types = given.get("layers_block_type") or given.get("layer_types")
        types = types or [_LETTERS.get(x, x) for x in given.get("hybrid_override_pattern", "ME*-")]
        unknown = [kind for kind in types if kind not in _KINDS]
        if unknown:
            raise CheckpointError(f"layers_block_type: unknown {unknown[0]!r}; known: {', '.join(_KINDS)}")
        return {"layers": compress([_KINDS[kind] for kind in types])}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        back = {ours: theirs for theirs, ours in reversed(_KINDS.items())}
        kinds = expand(config)
        if not set(kinds) <= set(back):
            raise CheckpointError("layers: each is either a mixer or a feed-forward part")
        return {"layers_block_type": [back[kind] for kind in kinds], "num_hidden_layers": len(kinds)}


FAMILY = Family(
    model_type="nemotron_h",
    architectures=("NemotronHForCausalLM",),
    keys=(
        key("vocab_size"),
        key("hidden_size"),
        key("mlp_hidden_act", "mlp.activation", "experts.activation", default="relu2", values=C.ACTIVATIONS),
        key("layer_norm_epsilon", "norm_eps", "mixer.norm_eps", default=1e-5),
        C.tied(),
        *C.V3_KEYS[2:],
        key("intermediate_size", default=21504),
        key("moe_intermediate_size", default=7688),
        key("moe_shared_expert_intermediate_size", "shared_expert_size", default=7688),
        key("n_routed_experts", "num_experts", default=8, also=("num_local_experts",)),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=2),
        key("norm_topk_prob", "router.norm_topk_prob", default=True),
        key("mamba_num_heads", "mixer.num_heads", default=128),
        key("mamba_head_dim", "mixer.head_dim", default=64),
        key("n_groups", "mixer.num_groups", default=8, also=("mamba_n_groups",)),
        key("ssm_state_size", "mixer.state_size", default=128),
        key("conv_kernel", "mixer.conv_kernel", default=4, also=("mamba_d_conv",)),
        key("use_conv_bias", "mixer.conv_bias", default=True, also=("mamba_conv_bias",)),
        key("use_bias", "mixer.proj_bias", default=False),
        key("time_step_min", "mixer.dt_min", default=0.001, also=("mamba_dt_min",)),
    ),
    parts=(
        C.Heads(kv=8, size=128),
        NoPositions(),
        _Layers(),
        C.NoLoss(),
        NoLimit(),
        Only({"mlp_bias": (False,), "moe_latent_size": (None,), "mamba_hidden_act": ("silu",)}),
    ),
    fixed={"mixer.name": "mamba2", "mlp.gated": False, "experts.gated": False, **C.V3_ROUTER},
    layer={
        **{name: Stored(s.name.replace("self_attn", "mixer"), s.form, s.inputs) for name, s in C.ATTENTION.items()},
        **tensors("mixer"),
        "mixer_norm.scale": Stored("norm.weight"),
        "ffn_norm.scale": Stored("norm.weight"),
        **{f"ffn.w_{x}": linear(f"mixer.{x}_proj.weight") for x in ("up", "down")},
        **{f"ffn.experts.w_{x}": linear(f"mixer.experts.{{e}}.{x}_proj.weight") for x in ("up", "down")},
        **{f"ffn.shared.w_{x}": linear(f"mixer.shared_experts.{x}_proj.weight") for x in ("up", "down")},
        "ffn.router.kernel": linear("mixer.gate.weight"),
        "ffn.router.correction": Stored("mixer.gate.e_score_correction_bias"),
    },
    whole={
        "embed.table": Stored("backbone.embeddings.weight"),
        "norm.scale": Stored("backbone.norm_f.weight"),
        "head.kernel": linear("lm_head.weight"),
    },
    unused=(r"mtp.*",),
    prefix="backbone.layers.{layer}.",
)
