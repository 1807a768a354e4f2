"""HydraLoRA (Tian et al., arXiv 2404.19245): one A for all experts, a B for each.

y = y0 + s sum_e softmax(x W_g)_e (x A) B_e
"""

from moe_zoo.adapters.routed import Routed


class HydraLora(Routed):
    """HydraLoRA: experts share their A; softmax gates over the heads B."""

    shared_a = True
    takes_loras = False
