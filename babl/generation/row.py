"""One prompt on its way to an answer: what is written, what is known of each token, and where the text ends."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from babl.generation.sampling import GenerationConfig
from babl.text import Detokenizer

Finish = Literal["eos", "stop", "length", "context", "cancelled"]


class Scored(NamedTuple):
    """A token, and what the model thought of it where it stands.

    Attributes:
        id: Of the token.
        log_prob: Natural logarithm of its probability; None for the first of a prompt, before which there is nothing.
        likeliest: The likeliest tokens there and theirs, as many as were asked for.
    """

    id: int
    log_prob: float | None
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: Without special tokens, and without the stop string it ended at.
        ids: Tokens written, the stop token included.
        log_prob: Natural logarithm of the probability of the ids.
        finish: Why it ended: the model's own end, a stop string, `max_new_tokens`, the model's context, or a call.
        prompt_tokens: Tokens read.
        steps: Times the decoder ran; fewer than ids where a draft was right.
        scored: The prompt's tokens where they are echoed, then the ids, where `GenerationConfig.likeliest` asks for it.
    """

    text: str
    ids: tuple[int, ...]
    log_prob: float
    finish: Finish
    prompt_tokens: int
    steps: int
    scored: tuple[Scored, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether it ended where it should."""
        return self.finish in ("eos", "stop")


@dataclass
class Row:
    """One prompt on its way to an answer."""

    prompt: list[int]
    config: GenerationConfig
    limit: int  # tokens it may write
    at_limit: Finish  # what stopping there is called
    seen: list[int]  # what the repetition penalty falls on, besides what is written
    text: Detokenizer
    rng: random.Random
    origin: int = 0  # positions in the cache before the answer
    drafts: int = field(init=False)  # tokens worth drafting, by how the last draft went
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    log_prob: float = 0.0
    steps: int = 0
    scored: list[Scored] = field(default_factory=list)
    finish: Finish | None = None
    shown: int = 0  # characters that `piece` has given

    def __post_init__(self) -> None:
        self.drafts = self.config.prompt_lookup_num_tokens

    def write(self, token: int, log_prob: float, stop_ids: frozenset[int]) -> None:
        """The token is part of the answer, and perhaps its last."""
        self.ids.append(token)
        self.log_prob += log_prob
        if token in stop_ids:
            self.finish = "eos"
            return
        piece = self.text.add(token)
        if piece:
            self.pieces.append(piece)
            if self._stopped():
                self.finish = "stop"
        if len(self.ids) == self.limit and not self.finish:
            self.finish = self.at_limit

    def score(self, tokens: Sequence[int], logits: Tensor) -> None:
        """Records, where that is asked for, what logits (n, V) say of the tokens they predict."""
        if self.config.likeliest is None:
            return
        log_probs = logits.log_softmax(-1)
        own = log_probs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
        best = log_probs.topk(min(self.config.likeliest, log_probs.shape[-1]))
        for token, value, ids, values in zip(tokens, own, best.indices.tolist(), best.values.tolist(), strict=True):
            self.scored.append(Scored(token, value, list(zip(ids, values, strict=True))))

    def _stopped(self) -> bool:
        """Whether a stop string stands in the text; what follows its beginning is then gone."""
        if not self.config.stop_strings:
            return False
        text = "".join(self.pieces)
        found = [at for at in map(text.find, self.config.stop_strings) if at >= 0]
        if found:
            self.pieces = [text[: min(found)]]
        return bool(found)

    def cancel(self) -> None:
        """What is written so far is the answer."""
        self.finish = self.finish or "cancelled"

    def piece(self) -> str:
        """Returns the text that was written since the last call, but for what may be the beginning of a stop string."""
        if self.finish:
            text = self.answer().text
            safe = len(text)
        else:
            text = "".join(self.pieces)
            safe = len(text) - _unsafe(text, self.config.stop_strings)
        piece = text[self.shown : safe]
        self.shown = max(self.shown, safe)
        return piece

    def answer(self) -> Answer:
        """Returns what was written."""
        if self.finish != "stop":
            self.pieces.append(self.text.rest())
            self._stopped()
        text = "".join(self.pieces)
        finish = self.finish or "length"
        return Answer(text, tuple(self.ids), self.log_prob, finish, len(self.prompt), self.steps, tuple(self.scored))


class Stream:
    """Iterates over the pieces of an answer as it is written; then `answer` has the whole."""

    answer: Answer

    def __init__(self, row: Row, steps: Iterator[None]):
        self._row, self._steps = row, steps

    def __iter__(self) -> Iterator[str]:
        for _ in self._steps:
            if piece := self._row.piece():
                yield piece
        self.answer = self._row.answer()


def _unsafe(text: str, stop_strings: Sequence[str]) -> int:
    """Returns how many characters at the end of the text may be the beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in stop_strings), default=0)
    tails = range(min(longest, len(text)), 0, -1)
    return next((n for n in tails if any(stop.startswith(text[-n:]) for stop in stop_strings)), 0)
