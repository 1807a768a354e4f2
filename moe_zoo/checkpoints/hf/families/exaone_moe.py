"""K-EXAONE: the routing of DeepSeek-V3, rotation only within windows, query-key norm per head."""

from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.layout import Stored
from moe_zoo.checkpoints.hf.order import Given, Layers, windows
from moe_zoo.checkpoints.hf.rope import Rope
from moe_zoo.checkpoints.native import CheckpointError


def _kinds(given: Given, n: int) -> list[str]:
    types = given.get("mlp_layer_types")
    if types is None and "is_moe_layer" in given:  # of the first release
        types = ["sparse" if routed else "dense" for routed in given["is_moe_layer"]]
    if types is None:
        return ["dense" if i < given.get("first_k_dense_replace", 1) else "moe" for i in range(n)]
    if not isinstance(types, list) or len(types) != n:
        raise CheckpointError(f"mlp_layer_types: expected one of each of {n} layers")
    return ["moe" if kind == "sparse" else "dense" for kind in types]


def _back(kinds: list[str]) -> dict[str, Any]:
    return {"mlp_layer_types": ["sparse" if kind == "moe" else "dense" for kind in kinds]}


def _near(given: Given, i: int) -> bool:
    """`sliding_window_pattern` n: all but every n-th; letters: those with an L, repeated, and never the last layer."""
    pattern = given.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):
        return pattern[i % len(pattern)] == "L" and i + 1 < given["num_hidden_layers"]
    return bool(pattern) and (i + 1) % pattern != 0


FAMILY = Family(
    model_type="exaone_moe",
    architectures=("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
    keys=(
        *C.SIZES,
        C.norm_eps(default=1e-5),
        C.tied(),
        key("intermediate_size"),
        key("moe_intermediate_size"),
        key("n_group", "router.n_group", default=1),
        key("topk_group", "router.topk_group", default=1),
        key("routed_scaling_factor", "router.routed_scaling_factor", default=2.5),
        key("num_experts", default=64),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=8),
        key("norm_topk_prob", "router.norm_topk_prob", default=True),
    ),
    parts=(
        C.Heads(kv=32),
        Rope(),
        Layers(
            _kinds,
            _back,
            windows(_near, switched=False),
            far=lambda given: {"rotary_dim": 0} if given.get("sliding_window") else {},
        ),
        C.SharedExperts(1, "num_shared_experts"),
        C.NoLoss(),
    ),
    fixed={"attention.qk_norm": "head", **C.V3_ROUTER},
    layer={
        **C.ATTENTION,
        **C.QK_NORM,
        **C.NORMS,
        **C.DENSE,
        **C.V3_MOE,
        "ffn.router.correction": Stored("mlp.e_score_correction_bias"),
    },
    whole=WHOLE,
    unused=(r"mtp.*",),
    extra_layers=True,
)
