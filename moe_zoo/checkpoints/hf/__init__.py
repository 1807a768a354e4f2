"""Published checkpoints in Hugging Face's format: safetensors and config.json, in and out."""

from moe_zoo.checkpoints.hf.families import architectures, families
from moe_zoo.checkpoints.hf.ours import OURS
from moe_zoo.checkpoints.hf.reading import Published, compute_dtype, describe, download, is_published, load
from moe_zoo.checkpoints.hf.writing import choose, save

__all__ = [
    "OURS", "Published", "architectures", "choose", "compute_dtype", "describe", "download", "families", "is_published",
    "load", "save",
]  # fmt: skip
