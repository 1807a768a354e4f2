"""What both sides of a comparison are given: sizes, values, a router of ours, a context. Dims as in authors.py."""

import jax.numpy as jnp
import numpy as np

from moe_zoo.core import param
from moe_zoo.core.context import RoutingContext
from moe_zoo.routing import ROUTERS
from moe_zoo.routing.router import Dims

B, S, D, E, K, V = 2, 64, 32, 16, 4, 500
T = B * S
TOLERANCE = 1e-5


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Standard normal float32 values, times `scale`."""
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


X_TD, KERNEL_DE, BIAS_E, MIX_TE = normal(0, T, D), normal(1, D, E, scale=0.3), normal(2, E, scale=0.4), normal(3, T, E)


def router(name: str, values: dict, **settings):
    """Our router with these settings and variables."""
    cls = ROUTERS.get(name)
    made = param.materialize(cls(cls.Config(**settings), Dims(num_experts=E, hidden_size=D, vocab_size=V)), 0)
    return param.replace(made, {**param.arrays(made), **{n: jnp.asarray(v) for n, v in values.items()}})


def context(**fields) -> RoutingContext:
    """B sequences of S tokens."""
    return RoutingContext(batch=B, seq=S, **fields)


def spread(experts_TK, gates_TK) -> np.ndarray:
    """[T, E] gates from the ids and gates of either side."""
    dense_TE = np.zeros((T, E + 1))
    np.put_along_axis(dense_TE, np.asarray(experts_TK), np.asarray(gates_TK, np.float64), axis=1)
    return dense_TE[:, :E]
