"""What families share: numbers of the same name, heads, the tensors of attention and feed-forward parts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf.family import key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig

ACTIVATIONS = (
    ("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"),
    ("gelu_new", "gelu_tanh"), ("relu", "relu"), ("relu2", "relu2"),
)  # fmt: skip

SIZES = (
    key("vocab_size"),
    key("hidden_size"),
    key("hidden_act", "mlp.activation", "experts.activation", default="silu", values=ACTIVATIONS),
)

NORMS = {
    "mixer_norm.scale": Stored("input_layernorm.weight"),
    "ffn_norm.scale": Stored("post_attention_layernorm.weight"),
}
ATTENTION = {
    "mixer.q": linear("self_attn.q_proj.weight"),
    "mixer.k": linear("self_attn.k_proj.weight"),
    "mixer.v": linear("self_attn.v_proj.weight"),
    "mixer.o": linear("self_attn.o_proj.weight", inputs=2),
}
QKV_BIAS = {f"mixer.{x}_bias": Stored(f"self_attn.{x}_proj.bias") for x in "qkv"}
O_BIAS = {"mixer.o_bias": Stored("self_attn.o_proj.bias")}
QK_NORM = {f"mixer.{x}_norm.scale": Stored(f"self_attn.{x}_norm.weight") for x in "qk"}


def gated(
    ours: str, theirs: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, Stored]:
    """Three linear weights of a gated feed-forward network, or of one expert with "{e}" in `theirs`."""
    return {f"{ours}.w_{x}": linear(f"{theirs}.{name}.weight") for x, name in zip(("gate", "up", "down"), names)}


DENSE = gated("ffn", "mlp")
DENSE_BIAS = {f"ffn.b_{x}": Stored(f"mlp.{x}_proj.bias") for x in ("gate", "up", "down")}
EXPERTS = gated("ffn.experts", "mlp.experts.{e}")
NORM_BIAS = {name.replace("scale", "bias"): Stored(s.name.replace("weight", "bias")) for name, s in NORMS.items()}
MIXTRAL_EXPERTS = gated("ffn.experts", "block_sparse_moe.experts.{e}", ("w1", "w3", "w2"))


def parts(theirs: str, *ours: str, **more) -> dict[str, Stored]:
    """Several linear weights one after the other in a single tensor."""
    return {name: linear(theirs, part=i, parts=len(ours), **more) for i, name in enumerate(ours)}


def one_number(given: Mapping[str, Any], name: str, default: Any) -> Any:
    """What may be given once or per layer, where all layers are alike."""
    value = given.get(name, default)
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise CheckpointError(f"{name}: {value} differs from layer to layer, which is not supported")
    return value[0]


V3_KEYS = (
    key("intermediate_size"),
    key("moe_intermediate_size"),
    key("n_group", "router.n_group", default=1),
    key("topk_group", "router.topk_group", default=1),
    key("routed_scaling_factor", "router.routed_scaling_factor", default=1.0),
)
V3_ROUTER = {"router.score_function": "sigmoid", "router.correction_bias": True, "router.group_score": "top2_sum"}
V3_MOE = {
    **EXPERTS,
    **gated("ffn.shared", "mlp.shared_experts"),
    "ffn.router.kernel": linear("mlp.gate.weight"),
    "ffn.router.correction": Stored("mlp.gate.e_score_correction_bias"),
}


def norm_eps(theirs: str = "rms_norm_eps", default: float = 1e-6):
    """The epsilon of every norm."""
    return key(theirs, "norm_eps", "attention.norm_eps", default=default)


def tied(default: bool = False):
    """Whether the head is the embedding; their classes differ in the default."""
    return key("tie_word_embeddings", default=default)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads and their size. `kv`, `size`: what the class takes where config.json is silent, None for all and D / N."""

    kv: int | None = None
    size: int | None = None

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "attention.num_attention_heads": given["num_attention_heads"],
            "attention.num_key_value_heads": given.get("num_key_value_heads", self.kv),
            "attention.head_dim": given.get("head_dim", self.size),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        N, M, H = heads(config)
        return {"num_attention_heads": N, "num_key_value_heads": M, "head_dim": H}


def heads(config: ModelConfig) -> tuple[int, int, int]:
    """(query heads, key-value heads, head size), nothing left to defaults."""
    a = config.attention
    N = a.num_attention_heads
    return N, a.num_key_value_heads or N, a.head_dim or config.hidden_size // N


@dataclasses.dataclass(frozen=True)
class BalanceLoss:
    """`router_aux_loss_coef`: only training looks at it."""

    default: float = 0.001

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        coef = given.get("router_aux_loss_coef", self.default)
        return {"losses": {"load_balance": {"coef": coef}} if coef else {}}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        coefs = [chosen.config.coef for chosen in config.losses if chosen.name == "load_balance"]
        return {"router_aux_loss_coef": coefs[0] if coefs else 0.0}


@dataclasses.dataclass(frozen=True)
class NoLoss:
    """Families that balance by a bias."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"losses": {}}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class SharedExperts:
    """So many shared experts of a routed one's width, stored as one wide network."""

    default: int = 0
    key: str = "n_shared_experts"
    also: str = ""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        count = given.get(self.key, given.get(self.also, self.default)) or 0
        return {"shared_expert_size": count * given["moe_intermediate_size"]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.key: config.shared_expert_size // config.moe_intermediate_size}
