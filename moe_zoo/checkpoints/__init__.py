"""Checkpoints: our own runs, through orbax."""

from moe_zoo.checkpoints.native import CheckpointError, Checkpoints

__all__ = ["CheckpointError", "Checkpoints"]
