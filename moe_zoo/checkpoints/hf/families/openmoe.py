"""OpenMoE (arXiv 2402.01739): a dense network behind every layer's experts, three factors in each, scores not scaled.

Every `moe_layer_interval`-th layer adds its experts' output to the stream, and then that of `extra_mlp` with a norm of
its own: two of ours, "moe" and "dense:none". A network is (x A) * silu(x B) * (x U) W, with A above B in one tensor.
Rotary positions have a base of 10,000 whatever config.json says, and the scores of attention are plain products.

Experts of theirs have places for K * 2 T / E tokens of a batch of T, at inference too, and drop the rest. Here nothing
is dropped; a dispatcher that drops the same is `CapacityConfig` with what `router_*` says and `rounding` "even".
"""

from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, Only, compress, expand, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.order import Given
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig

_EXTRA = "dense:none"


def _of_layers(kinds: list[str]) -> list[tuple[int, str]]:
    found, layer = [], -1
    for kind in kinds:
        layer += kind != _EXTRA
        found.append((layer, "extra." if kind == _EXTRA else ""))
    return found


class _Order:
    """Routed are the last of every `moe_layer_interval` layers, each with its second network behind it."""

    def read(self, given: Given) -> dict[str, Any]:
        n, step = given["num_hidden_layers"], given["moe_layer_interval"]
        if not isinstance(n, int) or n < 1:
            raise CheckpointError(f"num_hidden_layers: expected a number >= 1, got {n!r}")
        kinds = [["dense"] if (i + 1) % step else ["moe", _EXTRA] for i in range(n)]
        return {"layers": compress([kind for layer in kinds for kind in layer])}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        plain = [kind for kind in expand(config) if kind != _EXTRA]
        step = plain.index("moe") + 1 if "moe" in plain else len(plain) + 1
        return {"num_hidden_layers": len(plain), "moe_layer_interval": step}


class _Losses:
    """Theirs are means over the routed layers, and count each of a token's K experts whole."""

    def read(self, given: Given) -> dict[str, Any]:
        layers = max(1, given["num_hidden_layers"] // given["moe_layer_interval"])
        balance = given.get("router_aux_loss_factor", 0.01) * given.get("router_topk", given.get("topk", 2)) / layers
        coefs = {"load_balance": balance, "z_loss": given.get("router_z_loss_factor", 1e-4) / layers}
        return {"losses": {name: {"coef": coef} for name, coef in coefs.items() if coef}}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        coefs = {chosen.name: chosen.config.coef * max(1, expand(config).count("moe")) for chosen in config.losses}
        K = getattr(config.router.config, "num_experts_per_tok", 1)
        return {
            "router_aux_loss_factor": coefs.get("load_balance", 0.0) / K,
            "router_z_loss_factor": coefs.get("z_loss", 0.0),
        }


def _network(ours: str, theirs: str) -> dict[str, Stored]:
    return {
        **C.parts(f"{theirs}.gate_proj.weight", f"{ours}.w_linear", f"{ours}.w_gate"),
        f"{ours}.w_up": linear(f"{theirs}.up_proj.weight"),
        f"{ours}.w_down": linear(f"{theirs}.down_proj.weight"),
    }


FAMILY = Family(
    # the class of its settings is Llama's
    model_type="llama",
    architectures=("OpenMoeForCausalLM",),
    keys=(
        key("vocab_size"),
        key("hidden_size"),
        C.norm_eps(),
        C.tied(),
        key("intermediate_size", "intermediate_size", "moe_intermediate_size"),
        key("num_experts"),
        key("router_topk", "router.num_experts_per_tok", default=2, also=("topk",)),
    ),
    parts=(
        C.Heads(),
        _Order(),
        _Losses(),
        Only({"hidden_act": ("swiglu",), "mlp_gated": (True,), "gated": (True,), "pretraining_tp": (1,)}),
    ),
    fixed={
        "attention.softmax_scale": 1.0,
        "attention.rope_theta": 10_000.0,
        "mlp.linear_factor": True,
        "experts.linear_factor": True,
        "router.norm_topk_prob": False,
    },
    layer={
        **C.ATTENTION,
        **C.NORMS,
        **_network("ffn", "mlp"),
        **_network("extra.ffn", "extra_mlp"),
        "extra.ffn_norm.scale": Stored("pre_extra_mlp_layernorm.weight"),
        "ffn.router.kernel": linear("mlp.gate_weight"),
        "ffn.experts.w_linear": Stored("mlp.experts.wi_gate", part=0, parts=2),
        "ffn.experts.w_gate": Stored("mlp.experts.wi_gate", part=1, parts=2),
        "ffn.experts.w_up": Stored("mlp.experts.wi_up"),
        "ffn.experts.w_down": Stored("mlp.experts.wo"),
    },
    whole=WHOLE,
    of_layers=_of_layers,
)
