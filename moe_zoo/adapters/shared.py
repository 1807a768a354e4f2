"""What adapters of all layers have in common: one module of the model, beside what each layer has of its own."""

from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float


class SharedAdapters(nnx.Module):
    """A subclass says what its adapters find in their context (`Adapter.make_shared`)."""

    #: whether the layers are run twice, the first time to decide by (`second`)
    two_passes: ClassVar[bool] = False
    #: numbers of an instruction's embedding, for adapters that look at it; None: they do not
    instruction_size: int | None = None

    def first(self, instructions: Float[Array, "B M"] | None) -> Any:
        """What adapters find as `ctx.shared["adapters"]`; with two passes, in the first. `instructions`: an embedding
        for each sequence, if the call was given any.
        """
        return None

    def second(self, h_BSD: Float[Array, "B S D"]) -> Any:
        """What they find in the pass that counts, given the last hidden states of the first."""
        raise NotImplementedError

    def per_layer(self) -> dict[str, Any]:
        """What adapters find as `ctx.inputs["adapters"]`: their own layer's slice of arrays [L, ...]."""
        return {}

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token; multiply-adds count two."""
        return 0
