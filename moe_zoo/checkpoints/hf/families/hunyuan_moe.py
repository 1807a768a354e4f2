"""Hunyuan-A13B: softmax routing beside one shared expert, query-key norm per head behind the rotation."""

from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig


class _Experts:
    """Numbers that are given once or per layer. The shared expert is as wide as a routed one."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        size = given["intermediate_size"]
        for name, expected in (("moe_intermediate_size", size), ("num_shared_expert", 1)):
            found = C.one_number(given, name, expected)
            if found not in (None, expected):
                raise CheckpointError(f"{name}: {found} is not supported; expected {expected}")
        return {
            "moe_intermediate_size": size,
            "shared_expert_size": size,
            "num_experts": C.one_number(given, "num_experts", 1),
            "router.num_experts_per_tok": C.one_number(given, "moe_topk", 1),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        K = getattr(config.router.config, "num_experts_per_tok", 1)
        return {"intermediate_size": config.moe_intermediate_size, "num_experts": config.num_experts, "moe_topk": K}


class _Rope(Rope):
    """`alpha` makes theta larger, once and for all: what its class calls dynamic is not."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        rope = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
        if (rope.get("rope_type") or rope.get("type")) != "dynamic" or not rope.get("alpha"):
            return super().read(given)
        size = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
        theta = rope.get("rope_theta") or given.get("rope_theta") or self.theta
        plain = {"rope_type": "default", "rope_theta": theta * rope["alpha"] ** (size / (size - 2))}
        return super().read({**given, "rope_scaling": None, "rope_parameters": plain})


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    architectures=("HunYuanMoEV1ForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(),
        key("attention_bias", "attention.qkv_bias", "attention.output_bias", default=False),
    ),
    parts=(
        C.Heads(),
        _Rope(),
        every("moe"),
        _Experts(),
        C.NoLoss(),
        Only({"use_cla": (False,), "use_qk_norm": (True,)}),
    ),
    fixed={"attention.qk_norm": "head", "attention.qk_norm_after_rope": True, "router.norm_topk_prob": True},
    layer={
        **C.ATTENTION,
        **C.QKV_BIAS,
        **C.O_BIAS,
        **C.NORMS,
        **C.EXPERTS,
        **C.gated("ffn.shared", "mlp.shared_mlp"),
        "mixer.q_norm.scale": Stored("self_attn.query_layernorm.weight"),
        "mixer.k_norm.scale": Stored("self_attn.key_layernorm.weight"),
        "ffn.router.kernel": linear("mlp.gate.wg.weight"),
    },
    whole=WHOLE,
)
