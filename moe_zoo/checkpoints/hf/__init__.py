"""Published checkpoints in Hugging Face's format: safetensors and config.json, in and out."""

from moe_zoo.checkpoints.hf.families import architectures, families
from moe_zoo.checkpoints.hf.reading import Published, compute_dtype, describe, download, is_published, load

__all__ = ["Published", "architectures", "compute_dtype", "describe", "download", "families", "is_published", "load"]
