"""Activation functions with their derivatives, in one place for all implementations of the op.

Inputs and outputs are float32 or wider.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def _silu(z: Array) -> tuple[Array, Array]:
    s = jax.nn.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


def gelu(z: Array, erf: Callable[[Array], Array] = jax.lax.erf) -> tuple[Array, Array]:
    """The exact GELU, from an error function."""
    cdf = 0.5 * (1 + erf(z * math.sqrt(0.5)))
    return z * cdf, cdf + z * jnp.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh(z: Array) -> tuple[Array, Array]:
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = jnp.tanh(c * (z + a * z * z * z))
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * a * z * z)


def _quick_gelu(z: Array) -> tuple[Array, Array]:
    a = 1.702
    s = jax.nn.sigmoid(a * z)
    return z * s, s * (1 + a * z * (1 - s))


def _relu(z: Array) -> tuple[Array, Array]:
    # The derivative at 0 is 0, as in jax.nn.relu.
    return jnp.maximum(z, 0), (z > 0).astype(z.dtype)


def _relu2(z: Array) -> tuple[Array, Array]:
    r = jnp.maximum(z, 0)
    return r * r, 2 * r


#: name -> function giving (value, derivative). "gelu" is the exact one (erf), "gelu_tanh" its tanh approximation,
#: "quick_gelu" its sigmoid one, z * sigmoid(1.702 z);
#: "relu2" the squared ReLU of Primer (https://arxiv.org/abs/2109.08668).
ACTIVATIONS: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "silu": _silu,
    "gelu": gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "relu2": _relu2,
}


def hidden(activation: str, gate_RF: Array | None, up_RF: Array) -> Array:
    """act(gate) * up, or act(up) without a gate."""
    act = ACTIVATIONS[activation]
    if gate_RF is None:
        return act(up_RF)[0]
    return act(gate_RF)[0] * up_RF


def hidden_and_gradients(
    activation: str, gate_RF: Array | None, up_RF: Array, dhidden_RF: Array
) -> tuple[Array, Array | None, Array]:
    """The hidden layer again, and the gradients of its pre-activations: (hidden, dgate or None, dup)."""
    act = ACTIVATIONS[activation]
    if gate_RF is None:
        value, slope = act(up_RF)
        return value, None, dhidden_RF * slope
    value, slope = act(gate_RF)
    return value * up_RF, dhidden_RF * up_RF * slope, dhidden_RF * value


def scaled_hidden_and_gradients(
    activation: str, gate_RF: Array | None, up_RF: Array, dhidden_RF: Array, scale_R1: Array | None
) -> tuple[Array, Array | None, Array, Array | None]:
    """The same if the hidden layer is then multiplied by `scale`, dhidden being the gradient of that product.

    (scale * hidden, dgate or None, dup, dscale or None).
    """
    if scale_R1 is None:
        return *hidden_and_gradients(activation, gate_RF, up_RF, dhidden_RF), None
    scale_R1 = scale_R1.astype(dhidden_RF.dtype)
    value, dgate, dup = hidden_and_gradients(activation, gate_RF, up_RF, dhidden_RF * scale_R1)
    return value * scale_R1, dgate, dup, jnp.sum(value * dhidden_RF, axis=1, keepdims=True)
