"""Fine-tune T5, LLaMA and BLOOM with a loop you can read, and measure whether context helps."""

__version__ = "0.2.0"
