"""The comparison: which idea is better at equal cost, with what certainty, from one command."""

from moe_zoo.compare.adapters.recipe import Recipe
from moe_zoo.compare.claims import Claim, Reference

__all__ = ["Claim", "Recipe", "Reference"]
