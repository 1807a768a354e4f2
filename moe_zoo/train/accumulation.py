"""What a router loss may know of the other micro-batches of its step: their load (arXiv 2501.11873).

A loss that says `of_step = "step"` needs the load of all micro-batches before the first gradient, so a pass forward
counts it: with it, the mean of the micro-batches' losses and gradients is that of the whole step. One that says
"before" gets what has been counted so far in the step. Nobody asks: nothing is counted.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

#: {"load": float32 [L, E], "tokens": float32 [L]} of all L layers: choices per expert, valid tokens
Loads = dict[str, Float[Array, "L ..."]]


class Load:
    """Counts for the losses of one model, layer by layer; E is that of its widest layer."""

    def __init__(self, model):
        self.blocks = list(model.routed())
        asked = {getattr(loss, "of_step", None) for _, block, _ in self.blocks for _, loss in block.ffn.losses}
        self.asked = asked - {None}
        self.shape = model.config.num_layers, max([block.ffn.num_experts for _, block, _ in self.blocks], default=0)

    def zeros(self) -> Loads | None:
        if not self.asked:
            return None
        return {"load": jnp.zeros(self.shape, jnp.float32), "tokens": jnp.zeros(self.shape[:1], jnp.float32)}

    def added(self, loads: Loads | None, layers: dict[str, dict]) -> Loads | None:
        """`loads` and the statistics of one more micro-batch."""
        if loads is None:
            return None
        load_LE, tokens_L = loads["load"], loads["tokens"]
        for path, block, ids in self.blocks:
            if "load" in layers[path]:
                at = jnp.asarray(ids)
                load_LE = load_LE.at[at, : block.ffn.num_experts].add(layers[path]["load"].total)
                tokens_L = tokens_L.at[at].add(layers[path]["experts_per_token"].weight)
        return {"load": load_LE, "tokens": tokens_L}

    def of_step(self, layers_of: Callable, xs) -> Loads | None:
        """The load of all micro-batches `xs` and their mean number of tokens; None if no loss asks.

        `layers_of(*micro-batch)` gives the statistics of its layers.
        """
        if "step" not in self.asked:
            return None
        total, _ = jax.lax.scan(lambda loads, x: (self.added(loads, layers_of(*x)), None), self.zeros(), xs)
        return total | {"tokens": total["tokens"] / jax.tree.leaves(xs)[0].shape[0]}

    def inputs(self, step: Loads | None, before: Loads | None) -> dict[str, dict[str, Loads]]:
        """What a micro-batch gets beside its rows."""
        known = {name: loads for name, loads in (("step", step), ("before", before)) if name in self.asked}
        return {"inputs": known} if known else {}
