"""From prompts to answers."""

from babl.generation.engine import Engine
from babl.generation.row import Answer
from babl.generation.sampling import GenerationConfig

__all__ = ["Answer", "Engine", "GenerationConfig"]
