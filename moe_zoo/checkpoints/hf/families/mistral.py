"""Mistral (arXiv 2310.06825): dense, grouped queries, a sliding window in the first release."""

from moe_zoo.checkpoints.hf import common as C
from moe_zoo.checkpoints.hf.family import WHOLE, Family, key
from moe_zoo.checkpoints.hf.order import every
from moe_zoo.checkpoints.hf.rope import Rope

FAMILY = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    keys=(
        *C.SIZES,
        C.norm_eps(),
        C.tied(),
        key("intermediate_size"),
        key("sliding_window", "attention.sliding_window", default=4096),
    ),
    parts=(C.Heads(kv=8), Rope(), every("dense")),
    fixed={},
    layer={**C.ATTENTION, **C.NORMS, **C.DENSE},
    whole=WHOLE,
)
