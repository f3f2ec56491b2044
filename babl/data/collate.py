"""From examples to ids, and from ids to one batch.

A context too long for the model is read through windows that overlap; a question is never cut. In training, a window
that does not hold the answer is no example (or, in a set with unanswerable questions, an unanswerable one). What is
lost on the way is counted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from babl.data.contexts import View
from babl.errors import UserError
from babl.text import Tokenizer
from babl.text.prompts import Style, continuation_ids, prompt_ids, qa_prompt, qa_target

IGNORE = -100  # a label that is no target


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with what it may see, as text.

    Attributes:
        view: Index of the view.
        text: The whole prompt.
        span: Code points [start, end) of the context shown.
    """

    view: int
    text: str
    span: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Feature:
    """One training example in ids: the prompt as the model reads it, and the answer with EOS at its end."""

    id: str
    source: list[int]
    target: list[int]

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens computed of source and target."""
        return len(self.source), len(self.target)


class CausalFeature(Feature):
    """One for a decoder, which reads both as one sequence; its last token is only a target."""

    __slots__ = ()

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens computed; there is no second sequence."""
        return len(self.source) + len(self.target) - 1, 0


@dataclass
class Losses:
    """What did not fit.

    Attributes:
        windowed: Examples whose context was read through windows.
        excluded_windows: Windows without the answer, left out of training.
        lost_answers: Examples whose answer no window holds, which are not trained on.
    """

    windowed: int = 0
    excluded_windows: int = 0
    lost_answers: int = 0


def make_prompts(
    views: Sequence[View], tokenizer: Tokenizer, max_tokens: int, stride: int, style: Style = "t5"
) -> list[Prompt]:
    """Returns one prompt per view, or several windows where its context is too long.

    Args:
        views: Questions and the contexts shown.
        tokenizer: Counts the tokens.
        max_tokens: Longest prompt in tokens, BOS and EOS included.
        stride: Tokens that neighbouring windows share.
        style: Wording of the prompt.

    Raises:
        UserError: A question leaves no room for its context.
    """
    texts = [qa_prompt(view.question, view.context, style) for view in views]
    prompts = []
    for i, (text, ids) in enumerate(zip(texts, prompt_ids(texts, tokenizer, style), strict=True)):
        context = views[i].context
        if context is None:
            prompts.append(Prompt(i, text, (0, 0)))
        elif len(ids) <= max_tokens:
            prompts.append(Prompt(i, text, (0, len(context))))
        else:
            (bare,) = prompt_ids([qa_prompt(views[i].question, "", style)], tokenizer, style)
            room = max_tokens - len(bare)
            if room < 2 * stride or room < 1:
                raise UserError(
                    f"max_source_tokens is {max_tokens}, but question {views[i].id} leaves {room} tokens for its "
                    f"context, expected at least twice the stride of {stride}"
                )
            for start, end in _windows(context, tokenizer, room, stride):
                prompts.append(Prompt(i, qa_prompt(views[i].question, context[start:end], style), (start, end)))
    return prompts


def _windows(context: str, tokenizer: Tokenizer, room: int, stride: int) -> list[tuple[int, int]]:
    """Returns code point spans of whole words, each at most `room` tokens, sharing `stride` tokens or a little more."""
    words = [match.span() for match in re.finditer(r"\S+\s*", context)]
    counts = [len(ids) for ids in tokenizer.encode_batch([context[start:end] for start, end in words])]
    spans, first = [], 0
    while True:
        last, tokens = first, 0
        while last < len(words) and (last == first or tokens + counts[last] <= room):
            tokens += counts[last]
            last += 1
        spans.append((words[first][0], words[last - 1][1]))
        if last == len(words):
            return spans
        back, shared = last, 0
        while back > first + 1 and shared < stride:
            back -= 1
            shared += counts[back]
        first = back


def make_features(
    views: Sequence[View], tokenizer: Tokenizer, max_tokens: int, stride: int, style: Style = "t5"
) -> tuple[list[Feature], Losses]:
    """Returns what the model is trained on, and the count of what it is not; arguments as for `make_prompts`.

    The target is the view's, or the words for "no answer". Where the context is not to hold the answer, as in the
    arm `random`, its first window is the example.
    """
    prompts = make_prompts(views, tokenizer, max_tokens, stride, style)
    with_unanswerable = any(not view.golds for view in views)
    windows = [0] * len(views)
    for prompt in prompts:
        windows[prompt.view] += 1
    losses = Losses(windowed=sum(number > 1 for number in windows))
    answered = set()
    kept: list[tuple[Prompt, str | None]] = []
    for prompt in prompts:
        view = views[prompt.view]
        answer = view.target
        if answer is not None and windows[prompt.view] > 1 and not _shows(prompt, view):
            if view.at is None or not with_unanswerable:
                losses.excluded_windows += 1
                continue
            answer = None
        if answer is not None or not view.golds:
            answered.add(prompt.view)
        kept.append((prompt, answer))
    losses.lost_answers = len(views) - len(answered)
    sources = prompt_ids([prompt.text for prompt, _ in kept], tokenizer, style)
    targets = continuation_ids([qa_target(answer, style) for _, answer in kept], tokenizer, style)
    feature = Feature if style == "t5" else CausalFeature
    features = [
        feature(views[prompt.view].id, source, target)
        for (prompt, _), source, target in zip(kept, sources, targets, strict=True)
    ]
    return features, losses


def _shows(prompt: Prompt, view: View) -> bool:
    """Whether the window holds the answer, or is the first of a context that does not hold it anywhere."""
    start, end = prompt.span
    if view.at is None:
        return start == 0
    return start <= view.at and view.at + len(view.target or "") <= end


def check_context(features: Sequence[Feature], context_length: int | None) -> None:
    """Every example fits the model's context, where that has a bound.

    Raises:
        UserError: One does not.
    """
    longest = max(features, key=lambda feature: feature.lengths[0], default=None)
    if longest is not None and context_length is not None and longest.lengths[0] > context_length:
        raise UserError(
            f"data.max_source_tokens: example {longest.id} has {longest.lengths[0]} tokens with its answer, but the "
            f"model's context is {context_length}"
        )


@dataclass
class Batch:
    """One micro-batch; what the model takes is in `inputs`, by the names of its arguments.

    Attributes:
        inputs: input_ids (B, S), logits_at (B, T), dropout_key (B,), and for T5 attention_mask (B, S) and
            decoder_input_ids (B, T).
        labels: (B, T) int64, `IGNORE` where there is no target; of a decoder, T = S.
        ids: The examples.
        tokens: Real tokens, source and target.
        padded: Tokens computed, padding included.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    ids: list[str]
    tokens: int
    padded: int

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels.to(device, non_blocking=True), self.ids, self.tokens, self.padded)


def collate(features: Sequence[Feature], pad_id: int, start_id: int, keys: Sequence[int]) -> Batch:
    """Returns a T5 batch: source padded on the right, decoder inputs the targets moved right by one.

    Args:
        features: B examples; none gives one blank row without targets, so that every rank has something to compute.
        pad_id: Fills input ids.
        start_id: The decoder's first input.
        keys: Of the dropout, one int64 per example.
    """
    sources = [feature.source for feature in features] or [[pad_id]]
    targets = [feature.target for feature in features] or [[]]
    input_ids = _padded(sources, pad_id)
    labels = _padded(targets, IGNORE)
    lengths = torch.tensor([len(source) for source in sources])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "decoder_input_ids": _padded([[start_id, *target[:-1]] for target in targets], pad_id),
    }
    return _batch(features, inputs, labels, keys, input_ids.numel() + labels.numel())


def collate_causal(features: Sequence[Feature], pad_id: int, keys: Sequence[int]) -> Batch:
    """Returns a decoder's batch: source and target are one sequence, padded on the right; only the answer is a target.

    The label stands where its token is predicted, one place before it: logits[b, t] predicts labels[b, t]. Padding
    behind a text is seen by none of its tokens, so there is no mask. Arguments as for `collate`.
    """
    rows = [[*f.source, *f.target[:-1]] for f in features] or [[pad_id]]
    input_ids = _padded(rows, pad_id)
    labels = _padded([[IGNORE] * (len(f.source) - 1) + f.target for f in features] or [[]], IGNORE)
    return _batch(features, {"input_ids": input_ids}, labels, keys, input_ids.numel())


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Returns the rows as (B, longest, at least 1) int64."""
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def _batch(
    features: Sequence[Feature], inputs: dict[str, Tensor], labels: Tensor, keys: Sequence[int], padded: int
) -> Batch:
    inputs["logits_at"] = labels != IGNORE
    inputs["dropout_key"] = torch.tensor(list(keys) or [0], dtype=torch.int64)
    real = sum(sum(feature.lengths) for feature in features)
    return Batch(inputs, labels, [feature.id for feature in features], real, padded)
