"""Where a stack of layers is left: probabilities of leaving behind each layer, and a prior for them.

    lambda_l: of leaving behind layer l, having come that far;   p_l = lambda_l prod_{j<l} (1 - lambda_j)
    prior:    q_l = a (1 - a)^(l - 1), the last layer takes what remains

B batch, L layers.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

#: what becomes of the mass behind the last layer: it gets it (PonderNet), nobody does, or as the code of PALBERT has it
Tail = Literal["last", "open", "released"]


def exit_pdf(
    halt_BL: Float[Array, "B L"], tail: Tail, eps: float = 0.05
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """(p, which layers were passed by before). `halt`: lambda.

    "released": as soon as the sum of p before a layer exceeds 1 - eps, the layer's is the constant eps / L, which
    counts in that sum; then p does not add up to 1, and the example has passed.
    """
    B, L = halt_BL.shape
    alive_B, sum_B, pdf, passed = jnp.ones(B, halt_BL.dtype), jnp.zeros(B, halt_BL.dtype), [], []
    for layer in range(L):
        halt_B = halt_BL[:, layer]
        p_B = alive_B if tail == "last" and layer == L - 1 else halt_B * alive_B
        passed.append(sum_B > 1 - eps if tail == "released" else jnp.zeros(B, bool))
        p_B = jnp.where(passed[-1], eps / L, p_B)
        alive_B, sum_B = alive_B * (1 - halt_B), sum_B + p_B
        pdf.append(p_B)
    return jnp.stack(pdf, 1), jnp.stack(passed, 1)


def geometric(rate: float, L: int) -> Float[np.ndarray, "L"]:
    """The prior; `rate` in (0, 1]."""
    prior = rate * (1 - rate) ** np.arange(L)
    prior[-1] = 1 - prior[:-1].sum()
    return prior


def divergence(
    p_BL: Float[Array, "B L"], prior_L: Float[np.ndarray, "L"], direction: Literal["prior_to_exit", "exit_to_prior"]
) -> Float[Array, "B"]:
    """KL(prior || p), which forbids p = 0 wherever the prior has mass (PALBERT's code), or KL(p || prior) (PonderNet),
    in nats. Logarithms are of 1e-30 at the least.
    """
    log = lambda x: jnp.log(jnp.maximum(x, 1e-30))
    prior_L = jnp.asarray(prior_L, p_BL.dtype)
    if direction == "prior_to_exit":
        return jnp.sum(prior_L * (log(prior_L) - log(p_BL)), -1)
    return jnp.sum(p_BL * (log(p_BL) - log(prior_L)), -1)
