"""Steps that would ruin the weights are skipped and counted; too many in a row end the run with what is known.

A step is skipped when its loss or its gradient is not finite, or, with `spike`, when the gradient's norm is more than
that many times its running mean. A skipped step changes nothing but the counters: no weight, moment, buffer or
coefficient. The batch is gone: the next step has the next one.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """`max_skipped`: so many skipped steps in a row end the run. `spike`: skip gradients whose norm exceeds the running
    mean by this factor (10 is usual); None skips only what is not finite. `memory`: steps of that mean; it judges from
    then on.
    """

    max_skipped: int = 10
    spike: float | None = None
    memory: int = 100

    def validate(self, path: str) -> None:
        positive(self, path, "max_skipped", "memory")
        if self.spike is not None and self.spike <= 1:
            raise ConfigError(f"{join(path, 'spike')}: expected a factor > 1 or none, got {self.spike}")


def init() -> dict[str, Array]:
    """`skipped` steps in all and `in_a_row`; the mean gradient `norm` over the `counted` steps that were taken."""
    zero = jnp.int32(0)
    return {"skipped": zero, "in_a_row": zero, "counted": zero, "norm": jnp.float32(0)}


def judge(
    config: GuardConfig, state: dict[str, Array], loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], dict[str, Array]]:
    """(whether to take the step, the next state)."""
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.spike is not None:
        known = state["counted"] >= config.memory
        good &= ~known | (norm <= config.spike * state["norm"])
    counted = state["counted"] + good
    weight = 1 / jnp.clip(counted, 1, config.memory)
    mean = state["norm"] + (jnp.where(good, norm, state["norm"]) - state["norm"]) * weight
    skipped = state["skipped"] + ~good
    in_a_row = jnp.where(good, 0, state["in_a_row"] + 1)
    return good, {"skipped": skipped, "in_a_row": in_a_row, "counted": counted, "norm": mean.astype(jnp.float32)}


def gradient_norms(gradients: Mapping[str, Array], names: Mapping[str, Sequence[str]]) -> dict[str, Array]:
    """The norm of each parameter's gradient, one per layer where layers are stacked."""
    norms = {}
    for path, g in gradients.items():
        axes = tuple(range(1 if len(names[path]) > 1 or names[path][0] != path else 0, g.ndim))
        norms[path] = jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.promote_types(g.dtype, jnp.float32))), axis=axes))
    return norms


def global_norm(norms: Mapping[str, Array]) -> Float[Array, ""]:
    """The norm of all gradients together."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(norm)) for norm in norms.values()))


def explain(
    step: int, line: Mapping[str, Any], norms: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]]
) -> str:
    """One line: the step, what was wrong, in which layer, that layer's statistics, and what to try."""
    each = {name: float(n) for path, norm in norms.items() for name, n in zip(names[path], np.atleast_1d(norm))}
    # what is not finite spreads downwards through the backward pass: the last such layer is nearest to its origin
    broken = [name for name in each if not math.isfinite(each[name])]
    worst = max(broken, key=_depth) if broken else max(each, key=each.get)
    what = f"loss {line['loss']:.4g}, gradient norm {line['grad_norm']:.4g}, the largest of {worst} ({each[worst]:.4g})"
    layer = worst.split(".")[1] if worst.startswith("layers.") else None
    prefix = f"moe/layer_{int(layer):02d}/" if layer is not None else None
    known = {k.removeprefix(prefix): v for k, v in line.items() if prefix and k.startswith(prefix)}
    told = f"; layer {layer}: " + ", ".join(f"{k} {v:.3g}" for k, v in known.items()) if known else ""
    return (
        f"step {step}: {int(line['skipped_in_a_row'])} steps in a row were skipped ({what}{told}). "
        "Try a lower optim.learning_rate, more optim.warmup_steps or a smaller optim.clip_norm"
    )


def _depth(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("layers.") else -1
