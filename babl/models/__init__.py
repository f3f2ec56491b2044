"""T5, LLaMA and BLOOM, and the folders models live in."""

from babl.models.weights import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
