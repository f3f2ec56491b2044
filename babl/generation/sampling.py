"""Which token comes next: the settings of a request, and the choice from one row of logits."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from babl.config import at_least
from babl.errors import UserError

LOOKUP_TOKENS = 6  # drafted for questions, whose answers stand in the prompt more often than not


@dataclass(frozen=True)
class GenerationConfig:
    """How a request is answered, by transformers' names.

    Attributes:
        max_new_tokens: Most tokens to write, EOS included.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k: Draw among this many likeliest tokens; 0 for all.
        top_p: Draw among the fewest likeliest tokens whose probabilities reach this sum.
        min_p: Draw among tokens at least this share as likely as the likeliest.
        repetition_penalty: Divides positive logits of tokens already there, and multiplies negative ones.
        num_beams: Above 1, beam search, which draws nothing.
        length_penalty: A beam's log-probability is divided by its length to this power.
        stop_strings: The text ends before the first of these.
        seed: Of what is drawn; the same prompt with the same seed is answered the same way in any batch.
        prompt_lookup_num_tokens: Most tokens guessed by copying from the prompt and verified in one step; 0 for none.
            What is written is the same; only greedy choice can verify.
        likeliest: Record each token written with its log-probability and those of so many likeliest; None records none.
        echo: Record those of the prompt, too; a decoder's alone.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    stop_strings: Sequence[str] = field(default=())
    seed: int = 0
    prompt_lookup_num_tokens: int = 0
    likeliest: int | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        at_least(1, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)
        at_least(0, temperature=self.temperature, top_k=self.top_k, seed=self.seed)
        at_least(0, prompt_lookup_num_tokens=self.prompt_lookup_num_tokens)
        if self.likeliest is not None:
            at_least(0, likeliest=self.likeliest)
        for name in ("top_p", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not (self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise UserError(f"top_p is {self.top_p} and min_p {self.min_p}, expected at most 1")
        if self.num_beams > 1 and self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}, expected 0 with num_beams {self.num_beams}")
        if isinstance(self.stop_strings, str):
            raise UserError(f"stop_strings is one text, {self.stop_strings[:40]!r}; expected a list of them: [text]")
        if "" in self.stop_strings:
            raise UserError("stop_strings has an empty one, which is everywhere")

    @property
    def greedy(self) -> bool:
        """Whether the next token is the one with the highest logit, whatever came before."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.num_beams == 1


def penalize(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Returns logits (V,) with those of the tokens seen made less likely. Ref: Keskar et al. 2019, section 4.1."""
    if penalty == 1.0 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    values = logits[ids]
    return logits.index_put((ids,), torch.where(values < 0, values * penalty, values / penalty))


def probabilities(logits: Tensor, config: GenerationConfig) -> Tensor:
    """Returns the distribution (V,) that the settings leave of logits (V,); order of the filters as in transformers."""
    logits = logits / config.temperature
    if 0 < config.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[-1], -torch.inf)
    if config.top_p < 1.0:
        ordered, order = logits.sort()
        below = ordered.softmax(-1).cumsum(-1) <= 1 - config.top_p  # the tail that is not needed for the sum
        below[-1] = False
        logits = logits.index_fill(-1, order[below], -torch.inf)
    probs = logits.softmax(-1)
    if config.min_p > 0.0:
        probs = torch.where(probs < config.min_p * probs.max(), 0.0, probs)
        probs = probs / probs.sum()
    return probs


def choose(logits: Tensor, config: GenerationConfig, seen: Sequence[int], rng: random.Random) -> int:
    """Returns the next token.

    Args:
        logits: (V,), fp32.
        config: Decides how.
        seen: Ids the repetition penalty falls on.
        rng: Draws; a number between 0 and 1 is all it gives, so that every device draws alike.
    """
    logits = penalize(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return int(logits.argmax())
    cumulated = probabilities(logits, config).double().cumsum(-1)
    drawn = torch.searchsorted(cumulated, rng.random() * cumulated[-1], right=True)
    return min(int(drawn), logits.numel() - 1)
