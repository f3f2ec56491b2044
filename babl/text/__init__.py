"""Text to ids and back, and the one place where prompts are worded."""

from babl.text.tokenizer import Detokenizer, Tokenizer, load_tokenizer, train_tokenizer

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer", "train_tokenizer"]
