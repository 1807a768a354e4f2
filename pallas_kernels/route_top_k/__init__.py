"""Which experts a token takes, and its place among their rows."""

from pallas_kernels.route_top_k.api import TopKRoutes, expert_positions, expert_rows, route_top_k

__all__ = ["TopKRoutes", "expert_positions", "expert_rows", "route_top_k"]
