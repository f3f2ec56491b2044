"""Greedy decoding with a cache, batched by length; the one way Babl makes a model write."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from babl.models.layers import Model
from babl.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: Without special tokens.
        log_prob: Natural logarithm of the probability of the ids, EOS included.
        complete: False where `max_new_tokens` cut it off.
    """

    text: str
    log_prob: float
    complete: bool


class Engine:
    """A model and its tokenizer, answering."""

    def __init__(self, model: Model, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 32, batch_tokens: int = 16_384) -> list[str]:
        """Returns the text written for each prompt, in order; arguments as for `answer`."""
        return [answer.text for answer in self.answer(prompts, max_new_tokens, batch_tokens)]

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[str], max_new_tokens: int = 32, batch_tokens: int = 16_384, progress: bool = False
    ) -> list[Answer]:
        """Returns the most likely token after token for each prompt, in the order of the prompts.

        Args:
            prompts: Of any lengths; prompts of like length are computed together.
            max_new_tokens: Most tokens to write, EOS included.
            batch_tokens: Most prompt tokens computed together, padding included.
            progress: Whether stderr shows a bar.
        """
        sources = [[*ids, self.tokenizer.eos_id] for ids in self.tokenizer.encode_batch(list(prompts))]
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        answers: list[Answer | None] = [None] * len(sources)
        training = self.model.training
        self.model.eval()
        with tqdm(total=len(sources), desc="answers", unit="q", disable=not progress) as bar:
            while order:
                size = max(1, batch_tokens // len(sources[order[-1]]))  # the longest left decides
                rows = order[-size:]
                for row, answer in zip(rows, self._decode([sources[i] for i in rows], max_new_tokens), strict=True):
                    answers[row] = answer
                del order[-size:]
                bar.update(len(rows))
        self.model.train(training)
        return [answer for answer in answers if answer is not None]

    def _decode(self, sources: list[list[int]], max_new_tokens: int) -> list[Answer]:
        """Returns the answers of one batch; rows that are done leave it."""
        width, pad = max(map(len, sources)), self.tokenizer.pad_id or 0
        input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in sources], device=self.device)  # (B, S)
        lengths = torch.tensor([len(ids) for ids in sources], device=self.device)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()  # (B, S)
        cache, logits = self.model.prefill(input_ids, mask, max_new_tokens)
        ids: list[list[int]] = [[] for _ in sources]
        log_probs = [0.0] * len(sources)
        rows = list(range(len(sources)))  # which prompt each row of the batch belongs to
        for step in range(max_new_tokens):
            tokens, scores = self._pick(logits)  # (B,), (B,)
            done = []
            for row, token, log_prob in zip(rows, tokens.tolist(), scores.tolist(), strict=True):
                ids[row].append(token)
                log_probs[row] += log_prob
                done.append(token == self.tokenizer.eos_id)
            if all(done) or step + 1 == max_new_tokens:
                break
            if any(done):
                kept = [i for i, end in enumerate(done) if not end]
                rows = [rows[i] for i in kept]
                index = torch.tensor(kept, device=self.device)
                cache.keep_rows(index)
                tokens = tokens[index]
            logits = self.model.decode(tokens[:, None], cache)[:, -1]
        return [
            Answer(self.tokenizer.decode(row), log_prob, row[-1] == self.tokenizer.eos_id)
            for row, log_prob in zip(ids, log_probs, strict=True)
        ]

    def _pick(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the likeliest token of each row, (B,), and its log-probability; logits are (B, V).

        A model may have more rows than its tokenizer has tokens; those are never chosen.
        """
        log_probs = logits[:, : self.tokenizer.vocab_size].float().log_softmax(-1)
        best = log_probs.max(-1)
        return best.indices, best.values
