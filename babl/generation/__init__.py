"""From prompts to answers."""

from babl.generation.engine import Answer, Engine
from babl.generation.sampling import GenerationConfig

__all__ = ["Answer", "Engine", "GenerationConfig"]
