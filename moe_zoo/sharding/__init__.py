"""Meshes and the rule table from logical axes to mesh axes. Knows arrays and axes, no models."""

from moe_zoo.sharding.mesh import MESH_AXES, MeshConfig, make_mesh
from moe_zoo.sharding.rules import DEFAULT_RULES, batch_sharding, readable, sharding_of

__all__ = ["DEFAULT_RULES", "MESH_AXES", "MeshConfig", "batch_sharding", "make_mesh", "readable", "sharding_of"]
