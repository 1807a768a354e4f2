"""Whole networks."""

from moe_zoo.models.config import ModelConfig
from moe_zoo.models.decoder import Decoder, ModelAux
from moe_zoo.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, make_model

__all__ = ["Decoder", "EncoderDecoder", "EncoderDecoderConfig", "ModelAux", "ModelConfig", "make_model"]
