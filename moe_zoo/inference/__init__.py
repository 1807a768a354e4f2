"""Using a trained model: loading, logits, generation."""

from moe_zoo.inference.classify import Classified, load_classifier
from moe_zoo.inference.generate import generate
from moe_zoo.inference.loaded import Loaded, Output, load
from moe_zoo.inference.saving import save, save_hf

__all__ = ["Classified", "Loaded", "Output", "generate", "load", "load_classifier", "save", "save_hf"]
