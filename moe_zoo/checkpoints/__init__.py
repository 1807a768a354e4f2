"""Checkpoints: our own runs, through orbax (`native`), and published ones, as safetensors (`hf`)."""

from moe_zoo.checkpoints.native import CheckpointError, Checkpoints

__all__ = ["CheckpointError", "Checkpoints"]
