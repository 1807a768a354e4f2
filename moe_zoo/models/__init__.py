"""Whole networks."""

from moe_zoo.models.config import ModelConfig
from moe_zoo.models.decoder import Decoder, ModelAux

__all__ = ["Decoder", "ModelAux", "ModelConfig"]
