"""Jamba (arXiv 2403.19887): one layer of attention, without positions, to seven of Mamba; every second one routed."""

from typing import Any

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.hf.mamba import NoPositions
from moe_zoo.checkpoints.hf.order import Given, Layers
from moe_zoo.models import ModelConfig

_MAMBA = {f"mixer.{x}_norm.scale": Stored(f"mamba.{x}_layernorm.weight") for x in ("dt", "b", "c")}


def _kinds(given: Given, n: int) -> list[str]:
    def at(i: int, name: str, period: int, offset: int) -> bool:
        return i % given.get(f"{name}_layer_period", period) == given.get(f"{name}_layer_offset", offset)

    return [
        ("moe" if at(i, "expert", 2, 1) else "dense") + ":attention" * at(i, "attn", 8, 4) for i in range(n)
    ]  # fmt: skip


def _back(kinds: list[str]) -> dict[str, Any]:
    n, written = len(kinds), {}
    for name, has in (("expert", lambda k: k.startswith("moe")), ("attn", lambda k: k.endswith(":attention"))):
        places = [i for i, kind in enumerate(kinds) if has(kind)]
        first = places[0] if places else n
        period = places[1] - first if len(places) > 1 else n + 1
        written |= {f"{name}_layer_period": period, f"{name}_layer_offset": first}
    return written


class _Rank:
    """`mamba_dt_rank`: a number or "auto"."""

    def read(self, given: Given) -> dict[str, Any]:
        rank = given.get("mamba_dt_rank", "auto")
        return {"mixer.dt_rank": -(-given["hidden_size"] // 16) if rank == "auto" else rank}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if config.mixer.name != "mamba":
            return {}
        return {"mamba_dt_rank": config.mixer.config.rank(config.hidden_size)}


FAMILY = Family(
    model_type="jamba",
    architectures=("JambaForCausalLM",),
    keys=(
        *C.SIZES,
        key("rms_norm_eps", "norm_eps", "mixer.norm_eps", default=1e-6),
        C.tied(),
        key("intermediate_size", "moe_intermediate_size", "intermediate_size", default=14336),
        key("num_experts", default=16),
        key("num_experts_per_tok", "router.num_experts_per_tok", default=2),
        key("mamba_d_state", "mixer.state_size", default=16),
        key("mamba_d_conv", "mixer.conv_kernel", default=4),
        key("mamba_expand", "mixer.expand", default=2),
        key("mamba_conv_bias", "mixer.conv_bias", default=True),
        key("mamba_proj_bias", "mixer.proj_bias", default=False),
    ),
    parts=(C.Heads(kv=8), NoPositions(), Layers(_kinds, _back), _Rank(), C.BalanceLoss()),
    fixed={"mixer.name": "mamba", "router.norm_topk_prob": False},
    layer={
        **C.ATTENTION,
        **_MAMBA,
        "mixer.in_x": linear("mamba.in_proj.weight", part=0, parts=2),
        "mixer.in_z": linear("mamba.in_proj.weight", part=1, parts=2),
        "mixer.in_x_bias": Stored("mamba.in_proj.bias", part=0, parts=2),
        "mixer.in_z_bias": Stored("mamba.in_proj.bias", part=1, parts=2),
        "mixer.conv": Stored("mamba.conv1d.weight", "conv"),
        "mixer.conv_bias": Stored("mamba.conv1d.bias"),
        "mixer.x_proj": linear("mamba.x_proj.weight"),
        "mixer.dt_proj": linear("mamba.dt_proj.weight"),
        "mixer.dt_bias": Stored("mamba.dt_proj.bias"),
        "mixer.A_log": Stored("mamba.A_log"),
        "mixer.skip": Stored("mamba.D"),
        "mixer.out": linear("mamba.out_proj.weight"),
        "mixer.out_bias": Stored("mamba.out_proj.bias"),
        "mixer_norm.scale": Stored("input_layernorm.weight"),
        "ffn_norm.scale": Stored("pre_ff_layernorm.weight"),
        **C.gated("ffn", "feed_forward"),
        **C.gated("ffn.experts", "feed_forward.experts.{e}"),
        "ffn.router.kernel": linear("feed_forward.router.weight"),
    },
    whole=WHOLE | {"norm.scale": Stored("model.final_layernorm.weight")},
)
