"""Random scores, the control of mixture of depths (arXiv 2404.02258): the same capacity, nothing learned.

    u_i ~ U(0, 1);   training: the C largest of a sequence go through;   inference: u_i > 1 - capacity;   weight 1

The paper draws Gaussian scores; only their order matters to who goes through.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.context import RoutingContext
from moe_zoo.depth.selector import Selection, Selector, drawn


class RandomDepth(Selector):
    """Tokens are drawn at random: what is left of mixture of depths without a router."""

    def __call__(self, x_BSD: Float[Array, "B S D"], ctx: RoutingContext) -> Selection:
        """Raises ValueError in training without a key: every step would draw the same."""
        if ctx.train and ctx.key is None:
            raise ValueError("selector 'random_depth' draws tokens: training needs a key, got none")
        scores_BS = drawn(ctx)
        return Selection(scores_BS, scores_BS > 1 - self.config.capacity, jnp.ones_like(scores_BS))
