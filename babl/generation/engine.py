"""The one way Babl makes a model write: evaluation, training's samples, the terminal and the browser all come here.

Prompts of any lengths are read together, rows that are done leave the batch, and every row is answered as if it were
alone, but for rounding, which in bfloat16 may choose between two tokens that are almost equally likely. Decoders read a
beginning that several prompts share, such as a paragraph asked about twice, once.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from babl.errors import UserError
from babl.generation.beam import beam_search
from babl.generation.graph import GraphedStep
from babl.generation.memory import placement
from babl.generation.packed import pack
from babl.generation.reuse import common_prefix, draft, read_once, shared_prefixes
from babl.generation.row import Answer, Row, Scored, Stream
from babl.generation.sampling import GenerationConfig, choose
from babl.models import from_pretrained
from babl.models.cache import Cache
from babl.models.layers import Model
from babl.text import Detokenizer, Tokenizer, load_tokenizer
from babl.text.prompts import Style, continuation_ids, prompt_ids

Prompt = str | Sequence[int]  # a text, or the ids the model is to read as they are
ROUNDING = 1e-5  # how far logits computed in another way may lie apart, relative to the largest
SCORED_TOGETHER = 256  # tokens of a prompt whose log-probabilities are computed together
BATCH_TOKENS = 16_384  # prompt tokens computed together, padding included


def _close(logits: Tensor) -> Tensor:
    """Returns, (...) bool, whether rounding could make another token the likeliest of logits (..., V)."""
    first, second = logits.topk(2).values.unbind(-1)
    return first - second < ROUNDING * logits.abs().amax(-1)


def prompt_limit(context: int | None, max_new_tokens: int) -> int | None:
    """Returns the most tokens of a prompt that leave room for an answer, at least half the context; None for any.

    Args:
        context: Of the model, in tokens; None where it has no bound.
        max_new_tokens: Of the answer.
    """
    return None if context is None else context - min(max_new_tokens, context // 2)


class Decoding:
    """Rows that are answered together, one step at a time.

    Between steps a row may be cancelled, and another decoding may join; what the others write does not change.

    Attributes:
        rows: Those it was made of and those that joined, as far as they are not known to be done.
        read: Whether the prompts are read, and each row has its first token.
    """

    def __init__(self, engine: "Engine", rows: list[Row], read_tokens: int | None = None):
        self.engine, self.rows, self.read = engine, rows, False
        self._drafted = max((row.config.prompt_lookup_num_tokens for row in rows), default=0)
        self._reading = self._read(read_tokens)
        self._step: Callable[[Tensor, Cache], Tensor] = self._plain_step
        self._cache: Cache
        self._tied = False  # whether a choice was too close to be made among several tokens

    @property
    def done(self) -> bool:
        """Whether every row has its answer."""
        return all(row.finish for row in self.rows)

    @torch.inference_mode()
    def step(self) -> None:
        """Each row has another token, or those of a draft that were right; before that, prompts are read."""
        if not self.read:
            state = next(self._reading)
            if state is None:
                return
            self.read = True
            drafts: list[list[int]] = [[] for _ in self.rows]
            logits = self.engine.logits(state)[:, None]  # (B, 1, V)
        else:
            self._drop()
            drafts = [[] if self._tied else self._draft(row) for row in self.rows]
            fed = [[row.ids[-1], *tokens] for row, tokens in zip(self.rows, drafts, strict=True)]
            logits = self._step(self.engine._padded(fed), self._cache)  # (B, n, V)
        self._tied = self._accept(drafts, logits)
        if logits.shape[1] > 1:  # of what was drafted, the cache keeps what was right
            lengths = [row.origin + len(row.ids) - 1 for row in self.rows]
            self._cache.cut(torch.tensor(lengths, device=self.engine.device), max(lengths))

    @torch.inference_mode()
    def join(self, other: "Decoding") -> None:
        """The rows of the other decoding go on in this one; both are read, and neither is done."""
        self._drop()
        other._drop()
        self.rows = [*self.rows, *other.rows]
        self._drafted = max(self._drafted, other._drafted)
        self._tied = self._tied or other._tied
        self._cache.join(other._cache, max(row.origin + row.limit for row in self.rows) + self._drafted)
        self._step = self._plain_step

    def _read(self, read_tokens: int | None) -> Iterator[Tensor | None]:
        """Yields None after each part of the prompts, but after the last the state (B, C) after each."""
        engine, prompts = self.engine, [row.prompt for row in self.rows]
        room = max(row.limit for row in self.rows) + self._drafted
        width = max(map(len, prompts))
        part = width if read_tokens is None else max(1, read_tokens // len(prompts))
        echo = any(row.config.echo for row in self.rows)
        first = 1 if echo else part  # what is read at first gives no states but the last
        if engine.model.is_encoder_decoder or first >= width:
            self._cache, state = engine._read(prompts, room)
            self._echo(state[:, None], 0)
        else:
            self._cache, state = engine._prefill([prompt[:first] for prompt in prompts], width - first + room)
            self._echo(state[:, None], 0)
            for at in range(first, width, part):
                yield None
                # A row that is over is filled up, after its end; it is cut there afterwards.
                ids = engine._padded([prompt[at : at + part] for prompt in prompts])
                states = engine.model.decode(ids, self._cache)  # (B, part, C)
                self._echo(states, at)
                for i, prompt in enumerate(prompts):
                    if at < len(prompt) <= at + part:
                        state[i] = states[i, len(prompt) - 1 - at]
            self._cache.cut(torch.tensor([len(prompt) for prompt in prompts], device=engine.device), width)
        for row, length in zip(self.rows, self._cache.lengths.tolist(), strict=True):
            row.origin = length
        if engine.device.type == "cuda" and len(self.rows) == 1 and not self._drafted and engine.hook is None:
            # One row waits for kernel launches more than for anything else.
            self._step = GraphedStep(self._plain_step, self._cache)
        yield state

    def _echo(self, states: Tensor, at: int) -> None:
        """Records what states (B, n, C), from the prompts' token `at` on, say of those after it, where rows echo."""
        for row, own in zip(self.rows, states, strict=True):
            if row.config.echo:
                row.scored = row.scored or [Scored(row.prompt[0], None, [])]
                tokens = row.prompt[at + 1 : at + 1 + len(own)]
                for i in range(0, len(tokens), SCORED_TOGETHER):
                    part = tokens[i : i + SCORED_TOGETHER]
                    row.score(part, self.engine.logits(own[i : i + len(part)]))
                for place, (_, log_prob, _) in enumerate(row.scored[at + 1 :], at + 1):
                    self.engine.check_finite(log_prob or 0.0, place, "prompt")

    def _plain_step(self, ids: Tensor, cache: Cache) -> Tensor:
        """Puts ids (B, n) into the cache and returns the logits (B, n, V) after each."""
        return self.engine.logits(self.engine.model.decode(ids, cache))

    def _drop(self) -> None:
        """Rows that are done are gone."""
        kept = [i for i, row in enumerate(self.rows) if row.finish is None]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[i] for i in kept]
            self._cache.keep_rows(torch.tensor(kept, device=self.engine.device))

    def _accept(self, drafts: list[list[int]], logits: Tensor) -> bool:
        """Each row writes the tokens of its draft that it would have written, and the one after; logits (B, n, V).

        Returns whether a row stopped short of a choice too close to be made among several tokens, whose logits are
        rounded otherwise than a single one's; the next step must have no drafts.
        """
        stop_ids = self.engine.tokenizer.stop_ids
        several = logits.shape[1] > 1
        best = logits.max(-1)  # (B, n)
        likeliest = best.indices.tolist()
        log_probs = (best.values - logits.logsumexp(-1)).tolist()
        close = _close(logits).tolist() if several else None
        tied = False
        for b, (row, tokens) in enumerate(zip(self.rows, drafts, strict=True)):
            if row.finish:  # cancelled while it was read
                continue
            row.steps += 1
            if not row.config.greedy:
                self.engine.check_finite(log_probs[b][0], len(row.ids))
                token = choose(logits[b, 0], row.config, [*row.seen, *row.ids], row.rng)
                row.write(token, float(logits[b, 0].log_softmax(-1)[token]), stop_ids)
                row.score([token], logits[b, :1])
                continue
            right = 0  # tokens of the draft
            for place in range(len(tokens) + 1):
                if close and close[b][place]:
                    tied = True
                    break
                self.engine.check_finite(log_probs[b][place], len(row.ids))
                row.write(likeliest[b][place], log_probs[b][place], stop_ids)
                row.score([likeliest[b][place]], logits[b, place : place + 1])
                if row.finish or place == len(tokens) or tokens[place] != likeliest[b][place]:
                    break
                right += 1
            if tokens:  # who copied all copies on; who did not is not worth a long draft
                row.drafts = 2 * len(tokens) if right == len(tokens) else max(1, right)
        return tied

    def _draft(self, row: Row) -> list[int]:
        number = min(row.config.prompt_lookup_num_tokens, row.drafts, row.limit - len(row.ids) - 1)
        if number < 1 or not row.config.greedy:
            return []
        source = row.prompt if self.engine.model.is_encoder_decoder else [*row.prompt, *row.ids]
        return draft(source, row.ids, number)


class Engine:
    """A model and its tokenizer, answering.

    Attributes:
        style: How the model's family words a question, see `babl.text.prompts`.
        hook: Where set, sees the logits (N, V) of every step, in no promised order, and returns those to choose from.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, name: str = "the model"):
        """The engine answers with this model; errors call it by the name."""
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.device = next(model.parameters()).device
        self.style: Style = "t5" if model.is_encoder_decoder else "decoder"
        self.hook: Callable[[Tensor], Tensor] | None = None
        self._begun: tuple[list[int], Cache] | None = None  # what all prompts of `answer` begin with

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", dtype: str = "auto") -> "Engine":
        """Returns the engine of a model folder.

        Args:
            folder: Holds model and tokenizer.
            device: As for `placement`.
            dtype: As for `placement`.

        Raises:
            UserError: The folder is not what it should be, or this machine has no such device.
        """
        device, loaded = placement(device, dtype)
        model = from_pretrained(folder, loaded, device)
        pack(model)
        return cls(model, load_tokenizer(folder), str(folder))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * math.prod(self.model.config.cache_shape) * next(self.model.parameters()).element_size()

    def prompt_limit(self, max_new_tokens: int) -> int | None:
        """Returns the most tokens of a prompt that leave room for an answer, see `prompt_limit`."""
        return prompt_limit(self.model.context_length, max_new_tokens)

    def generate(self, prompts: Sequence[Prompt], **settings: object) -> list[str]:
        """Returns the text written for each prompt, in order.

        Args:
            prompts: Of any lengths.
            **settings: Of `GenerationConfig`, such as max_new_tokens or temperature.
        """
        return [answer.text for answer in self.answer(prompts, GenerationConfig(**settings))]  # type: ignore[arg-type]

    def answer(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] = GenerationConfig(),  # noqa: B008 (frozen)
        batch_tokens: int = BATCH_TOKENS,
        progress: bool = False,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Answer]:
        """Returns what is written for each prompt, in the order of the prompts.

        Args:
            prompts: Of any lengths; those with a common beginning, then those of like length, are computed together.
            config: Settings of all, or of each.
            batch_tokens: Most prompt tokens computed together, padding included.
            progress: Whether stderr shows a bar.
            cancelled: Asked after every step; once it says yes, what is written so far is the answer.

        Raises:
            UserError: A prompt is empty, fills the model's context, or has an id that the model does not.
            FloatingPointError: The model's logits are not finite.
        """
        configs = [config] * len(prompts) if isinstance(config, GenerationConfig) else config
        rows = [self._row(ids, c) for ids, c in zip(self._encode(prompts), configs, strict=True)]
        with tqdm(total=len(rows), desc="answers", unit="q", disable=not progress) as bar:
            for batch in self._batches([row.prompt for row in rows], batch_tokens):
                for _ in self._run([rows[i] for i in batch], cancelled):
                    pass
                bar.update(len(batch))
        self._begun = None  # the weights may be others next time
        return [row.answer() for row in rows]

    def stream(self, prompt: Prompt, cancelled: Callable[[], bool] | None = None, **settings: object) -> Stream:
        """Returns an iterator over the pieces of one answer; together they are what `generate` returns.

        Args:
            prompt: What to continue or answer.
            cancelled: As for `answer`.
            **settings: Of `GenerationConfig`; beam search has only one piece.

        Raises:
            UserError: The prompt fills the model's context.
        """
        (ids,) = self._encode([prompt])
        row = self._row(ids, GenerationConfig(**settings))  # type: ignore[arg-type]
        return Stream(row, self._run([row], cancelled))

    def begin(
        self, prompts: Sequence[Prompt], configs: Sequence[GenerationConfig], read_tokens: int | None = None
    ) -> "Decoding":
        """Returns the prompts' decoding, for whoever answers several things in turns; nothing is computed yet.

        Args:
            prompts: Computed together.
            configs: Of each; without beam search.
            read_tokens: Most prompt tokens of a decoder that one step reads; None for all.

        Raises:
            UserError: A prompt fills the model's context.
        """
        rows = [self._row(ids, config) for ids, config in zip(self._encode(prompts), configs, strict=True)]
        return Decoding(self, rows, read_tokens)

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], batch_tokens: int = BATCH_TOKENS
    ) -> list[list[float]]:
        """Returns the natural logarithm of the probability of each token of each continuation, the last one EOS.

        Args:
            prompts: What stands before, one for each continuation.
            continuations: What may follow, such as `babl.text.prompts.qa_target` words it.
            batch_tokens: Most prompt tokens computed together, padding included.
        """
        if len(prompts) != len(continuations):
            raise UserError(f"there are {len(continuations)} continuations, expected {len(prompts)}, one a prompt")
        sources, targets = self._encode(prompts), continuation_ids(continuations, self.tokenizer, self.style)
        found: list[list[float]] = [[] for _ in sources]
        training = self.model.training
        self.model.eval()
        for batch in self._batches(sources, batch_tokens):
            width = max(len(targets[i]) for i in batch)
            cache, state = self._read([sources[i] for i in batch], width)
            ids = self._padded([targets[i] for i in batch])  # (B, T)
            states = torch.cat((state[:, None], self.model.decode(ids[:, :-1], cache)), 1)  # (B, T, C)
            log_probs = self.logits(states).log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # (B, T)
            for i, row in zip(batch, log_probs.tolist(), strict=True):
                found[i] = row[: len(targets[i])]
                for place, value in enumerate(found[i]):
                    self.check_finite(value, place)
        self.model.train(training)
        return found

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise UserError(f"prompts is one text, {prompts[:40]!r}; expected a list of them: [text]")
        encoded = iter(prompt_ids([p for p in prompts if isinstance(p, str)], self.tokenizer, self.style))
        found = [next(encoded) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        for ids in found:
            self.check(ids)
        return found

    def check(self, prompt: Sequence[int]) -> None:
        """The model can read the prompt.

        Raises:
            UserError: It is empty, or has an id that the model does not.
        """
        rows = self.model.config.vocab_size
        if not prompt:
            raise UserError(f"the prompt is empty, and {self.name} has no token that begins a text; expected a word")
        outside = next((token for token in prompt if not 0 <= token < rows), None)
        if outside is not None:
            raise UserError(f"the prompt has token id {outside}, expected 0 to {rows - 1}")

    def _row(self, prompt: list[int], config: GenerationConfig) -> Row:
        limit, at_limit = config.max_new_tokens, "length"
        context = self.model.context_length
        if context is not None:
            if len(prompt) >= context:
                raise UserError(
                    f"the prompt has {len(prompt)} tokens, expected fewer than the model's context, {context}"
                )
            if limit > context - len(prompt):
                limit, at_limit = context - len(prompt), "context"
        if config.echo and self.model.is_encoder_decoder:
            raise UserError(
                f"echo: {self.name} reads a prompt with its encoder, which gives its tokens no probabilities"
            )
        joined = not self.model.is_encoder_decoder
        seen = prompt if joined else [self.model.config.decoder_start_token_id]
        text = Detokenizer(self.tokenizer, prompt if joined else ())
        return Row(prompt, config, limit, at_limit, seen, text, random.Random(config.seed))  # type: ignore[arg-type]

    def _batches(self, prompts: list[list[int]], batch_tokens: int) -> Iterator[list[int]]:
        """Yields the indices of the prompts that are computed together, the longest first, groups side by side."""
        if self.model.is_encoder_decoder:
            order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        else:
            groups = sorted(
                shared_prefixes(prompts, common_prefix(prompts)), key=lambda g: -max(len(prompts[i]) for i in g[1])
            )
            order = [i for _, members in groups for i in members]
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * max(len(prompts[j]) for j in (batch[0], i)) > batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _run(self, rows: list[Row], cancelled: Callable[[], bool] | None) -> Iterator[None]:
        """The rows are answered; yields after every step of the decoder."""
        training = self.model.training
        self.model.eval()
        try:
            decoding = Decoding(self, [row for row in rows if row.config.num_beams == 1])
            while not decoding.done:
                decoding.step()
                if cancelled is not None and cancelled():
                    for row in decoding.rows:
                        row.cancel()
                yield
            for row in rows:
                if row.config.num_beams > 1:
                    self._beams(row, cancelled)
                    yield
        finally:
            self.model.train(training)

    def _beams(self, row: Row, cancelled: Callable[[], bool] | None) -> None:
        cache, state = self._read([row.prompt], row.limit)

        def logits(state: Tensor) -> Tensor:
            found = self.logits(state)
            for likeliest in found.amax(-1).tolist():
                self.check_finite(likeliest, row.steps)
            return found

        def step(ids: Tensor, cache: Cache) -> Tensor:
            row.steps += 1
            return logits(self.model.decode(ids, cache)[:, -1])

        stops = self.tokenizer.stop_ids
        written = beam_search(
            step, cache, logits(state), row.limit, stops, row.seen, row.config, cancelled or (lambda: False)
        )
        for token, log_prob in written:
            if not row.finish:
                row.write(token, log_prob, stops)
        row.finish = row.finish or "cancelled"

    def check_finite(self, value: float, place: int, of: str = "answer") -> None:
        """A value computed from logits is a number, and so were the logits.

        Args:
            value: A log-probability, or a logit.
            place: Tokens that stand before.
            of: What they are the beginning of.

        Raises:
            FloatingPointError: It is not; the model's weights or activations are broken, and no token is its choice.
        """
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{self.name}: logits after {place} tokens of the {of} are not finite; its weights are damaged, or "
                "overflow in this dtype"
            )

    def logits(self, states: Tensor) -> Tensor:
        """Returns logits (..., V) of states (..., C), fp32 or wider, for the ids the tokenizer has.

        A model may have more rows than its tokenizer has tokens; those are never chosen. Where the model gives one
        logit that is not finite, all beside it are NaN: what is computed from any of them then fails `check_finite`.
        """
        logits = self.model.head(states)[..., : self.tokenizer.vocab_size]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits + 0 * logits.sum(-1, keepdim=True)
        if self.hook is None:
            return logits
        return self.hook(logits.flatten(0, -2)).view_as(logits)

    def _read(self, prompts: list[list[int]], room: int) -> tuple[Cache, Tensor]:
        """Returns the cache of the prompts, with room for more, and the state (B, C) after each.

        A decoder reads each beginning that several prompts share once, then what is each prompt's own.
        """
        if self.model.is_encoder_decoder or len(prompts) == 1:
            return self._prefill(prompts, room)
        (before, _), *steps = read_once(prompts)
        if not steps:
            return self._prefill(prompts, room)
        cache = self._beginning(before[0]) if len(before) == 1 else self._prefill(before, 0)[0]
        for rows, parents in steps:
            own = [row[len(before[parent]) :] for row, parent in zip(rows, parents, strict=True)]
            cache.keep_rows(torch.tensor(parents, device=self.device))
            cache.grow(max(map(len, before)) + max(map(len, own)) + (room if rows is steps[-1][0] else 0))
            states = self.model.decode(self._padded(own), cache)  # (B, longest of own, C)
            cache.cut(torch.tensor([len(row) for row in rows], device=self.device), max(map(len, rows)))
            before = rows
        last = torch.tensor([len(ids) - 1 for ids in own], device=self.device)
        return cache, states[torch.arange(len(prompts), device=self.device), last]

    def _beginning(self, ids: list[int]) -> Cache:
        """Returns the cache of what all prompts begin with; batches that begin alike read it once."""
        if self._begun is None or self._begun[0] != ids:
            self._begun = ids, self._prefill([ids], 0)[0]
        return replace(self._begun[1])

    def _prefill(self, prompts: list[list[int]], room: int) -> tuple[Cache, Tensor]:
        ids = self._padded(prompts)  # (B, S)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        mask = (torch.arange(ids.shape[1], device=self.device) < lengths[:, None]).long()
        return self.model.prefill(ids, mask, room)

    def _padded(self, rows: list[list[int]]) -> Tensor:
        """Returns the rows as (B, longest) int64, filled with what is never looked at.

        The tokenizer's pad id may be beyond the rows of the model's table; 0 is not.
        """
        width = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)
