"""From prompts to answers."""

from babl.generation.engine import Engine

__all__ = ["Engine"]
