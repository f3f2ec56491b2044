"""From examples to ids, and from ids to one batch.

A context too long for the model is read through windows that overlap; a question is never cut. In training, a window
that does not hold the answer is no example (or, in a set with unanswerable questions, an unanswerable one). What is
lost on the way is counted.
"""

import itertools
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from babl.data.contexts import View
from babl.text import Tokenizer
from babl.text.prompts import Message, Style, continuation_ids, prompt_ids, qa_prompt, qa_target
from babl.text.segment import line_breaks

IGNORE = -100  # a label that is no target
FILLER = 0  # an id that every model has; no target depends on it
LONG_WORD = 16  # tokens; what has no line break for longer (a URL, a row of spaces) may be cut at any of them


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with what it may see.

    Attributes:
        view: Index of the view.
        text: The whole prompt.
        ids: Of the text, as the model reads it.
        span: Code points [start, end) of the context shown.
    """

    view: int
    text: str
    ids: list[int]
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
class Truncation:
    """What did not fit.

    Attributes:
        windowed: Examples whose context was read through windows.
        excluded_windows: Windows without the answer, left out of training.
        lost_answers: Examples whose answer no window holds, which are not trained on.
        overlong: Question id -> why it does not fit, of those that are left out for it.
    """

    windowed: int = 0
    excluded_windows: int = 0
    lost_answers: int = 0
    overlong: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        line = (
            f"{self.windowed:,} read through windows, {self.excluded_windows:,} windows without the answer left out, "
            f"{self.lost_answers:,} answers in no window, {len(self.overlong):,} questions too long"
        )
        return f"{line}, first: {next(iter(self.overlong.values()))}" if self.overlong else line


def make_prompts(
    views: Sequence[View],
    tokenizer: Tokenizer,
    max_tokens: int,
    stride: int,
    style: Style = "t5",
    before: Sequence[Message] = (),
) -> tuple[list[Prompt], dict[str, str]]:
    """Returns one prompt per view, or several windows where its context is too long; and who is too long for that.

    Args:
        views: Questions and the contexts shown.
        tokenizer: Counts the tokens.
        max_tokens: Longest prompt in tokens, BOS and EOS included.
        stride: Tokens of the context that neighbouring windows share, at least; a word or so more.
        style: Wording of the prompt.
        before: As for `prompt_ids`; counts in every prompt.

    Returns:
        Prompts in the order of the views, and question id -> reason, for each question that leaves no room for its
        context (less than twice the stride) or is too long by itself; these have no prompt.
    """
    texts = [qa_prompt(view.question, view.context, style) for view in views]
    ids = prompt_ids(texts, tokenizer, style, before)
    long = [i for i, each in enumerate(ids) if len(each) > max_tokens]
    bare = [qa_prompt(views[i].question, None if views[i].context is None else "", style) for i in long]
    asked = dict(zip(long, map(len, prompt_ids(bare, tokenizer, style, before)), strict=True))
    rooms = {i: max_tokens - asked[i] for i in long if views[i].context is not None}
    rooms = {i: room for i, room in rooms.items() if room >= max(2 * stride, 1)}
    windows = _windows(views, rooms, tokenizer, max_tokens, stride, style, before)
    prompts, overlong = [], {}
    for i, view in enumerate(views):
        if i in windows:
            prompts += windows[i]
        elif i not in asked:
            prompts.append(Prompt(i, texts[i], ids[i], (0, len(view.context or ""))))
        else:
            overlong[view.id] = f"max_source_tokens is {max_tokens}, but question {view.id} takes {asked[i]} tokens"
            if view.context is not None:
                overlong[view.id] += f", which leaves less than twice the stride of {stride} for its context"
    return prompts, overlong


def _windows(
    views: Sequence[View],
    rooms: dict[int, int],
    tokenizer: Tokenizer,
    max_tokens: int,
    stride: int,
    style: Style,
    told: Sequence[Message],
) -> dict[int, list[Prompt]]:
    """Returns the windows of the views in `rooms`, whose values are the tokens that a window of the context may take.

    They are laid out on the tokens of the whole context. Alone, a piece may take one or two more or fewer, where a
    token goes across its ends: every prompt and all that neighbours share is counted as it stands alone, and a view
    where one is too long, or shares too little, is laid out again. A view without windows has no room for any.
    """
    contexts = {i: views[i].context or "" for i in rooms}
    different = list(dict.fromkeys(contexts.values()))
    starts = dict(zip(different, tokenizer.token_starts(different), strict=True))
    longest = min([LONG_WORD, *(max(room // 4, 1) for room in rooms.values())])
    breaks = {context: _breaks(context, starts[context], longest) for context in different}
    sharing = dict.fromkeys(rooms, stride)
    found: dict[int, list[Prompt]] = {}
    while rooms:
        laid = {i: _lay_out(breaks[contexts[i]], starts[contexts[i]], room, sharing[i]) for i, room in rooms.items()}
        alone = [qa_prompt(views[i].question, contexts[i][start:end], style) for i in laid for start, end in laid[i]]
        shared = [contexts[i][b:c] for i in laid for (_, c), (b, _) in itertools.pairwise(laid[i])]
        prompts = iter(zip(alone, prompt_ids(alone, tokenizer, style, told), strict=True))
        common = iter(tokenizer.encode_batch(shared))
        again = {}
        for i, spans in laid.items():
            windows = [Prompt(i, *next(prompts), span) for span in spans]
            excess = max(len(window.ids) for window in windows) - max_tokens
            missing = stride - min((len(next(common)) for _ in spans[1:]), default=stride)
            if excess > 0 or 0 < missing <= stride + LONG_WORD - sharing[i]:
                again[i] = rooms[i] - max(excess, 0)
                sharing[i] += max(missing, 0)
            else:
                found[i] = windows
        rooms = {i: room for i, room in again.items() if room > 0}
    return found


def _breaks(context: str, starts: Sequence[int], longest: int) -> list[int]:
    """Returns where a window may begin or end: at line breaks, and at any token of what has none for so many tokens."""
    points = line_breaks(context)
    inside = []
    for start, end in itertools.pairwise(points):
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        if last - first > longest:
            inside += [at for at in starts[first:last] if not unicodedata.combining(context[at])]
    return sorted({*points, *inside})


def _lay_out(breaks: Sequence[int], starts: Sequence[int], room: int, stride: int) -> list[tuple[int, int]]:
    """Returns code point spans between breaks, each of at most `room` tokens where breaks allow it, sharing `stride`.

    Args:
        breaks: Code points, from 0 to the end of the context.
        starts: Code point at which each token of the context begins.
        room: Most tokens of a window.
        stride: Least tokens that neighbours share.
    """
    before = [bisect_left(starts, at) for at in breaks]  # tokens
    spans, first = [], 0
    while True:
        last = max(bisect_right(before, before[first] + room) - 1, first + 1)
        spans.append((breaks[first], breaks[last]))
        if last == len(breaks) - 1:
            return spans
        first = max(bisect_right(before, before[last] - stride) - 1, first + 1)


def make_features(
    views: Sequence[View],
    tokenizer: Tokenizer,
    max_tokens: int,
    stride: int,
    style: Style = "t5",
    context_length: int | None = None,
) -> tuple[list[Feature], Truncation]:
    """Returns what the model is trained on, and the count of what it is not.

    The target is the view's, or the words for "no answer". Where the context is not to hold the answer, as in the
    arm `random`, its first window is the example. An example too long for the model with its answer is left out.

    Args:
        views: As for `make_prompts`.
        tokenizer: Likewise.
        max_tokens: Likewise.
        stride: Likewise.
        style: Likewise.
        context_length: Most tokens the model has positions for; None where there is no bound.
    """
    prompts, overlong = make_prompts(views, tokenizer, max_tokens, stride, style)
    with_unanswerable = any(not view.golds for view in views)
    windows = Counter(prompt.view for prompt in prompts)
    truncation = Truncation(windowed=sum(number > 1 for number in windows.values()), overlong=overlong)
    answered = set()
    kept: list[tuple[Prompt, str | None]] = []
    for prompt in prompts:
        view = views[prompt.view]
        answer = view.target
        if answer is not None and windows[prompt.view] > 1 and not _shows(prompt, view):
            if view.at is None or not with_unanswerable:
                truncation.excluded_windows += 1
                continue
            answer = None
        if answer is not None or not view.golds:
            answered.add(prompt.view)
        kept.append((prompt, answer))
    truncation.lost_answers = len(windows) - len(answered)
    targets = continuation_ids([qa_target(answer, style) for _, answer in kept], tokenizer, style)
    feature = Feature if style == "t5" else CausalFeature
    features = [
        feature(views[prompt.view].id, prompt.ids, target) for (prompt, _), target in zip(kept, targets, strict=True)
    ]
    if context_length is None:
        return features, truncation
    for long in (feature for feature in features if max(feature.lengths) > context_length):
        truncation.overlong[long.id] = (
            f"the model's context is {context_length}, but question {long.id} takes {max(long.lengths)} tokens with "
            "its answer"
        )
    return [feature for feature in features if max(feature.lengths) <= context_length], truncation


def longest_prompt(
    views: Sequence[View], tokenizer: Tokenizer, max_tokens: int, style: Style, context_length: int | None
) -> int:
    """Returns the most tokens of a prompt that leave a decoder room for the longest answer, up to a quarter of its own.

    Args:
        views: Whose answers the model is to write.
        tokenizer: Counts the tokens.
        max_tokens: Longest prompt that is asked for.
        style: Wording of the answer.
        context_length: Most tokens the model has positions for; None where there is no bound.
    """
    if context_length is None:
        return max_tokens
    answers = {qa_target(view.target, style) for view in views}
    longest = max(map(len, continuation_ids(sorted(answers), tokenizer, style)), default=0)
    return min(max_tokens, context_length - min(longest, context_length // 4))


def _shows(prompt: Prompt, view: View) -> bool:
    """Whether the window holds the answer, or is the first of a context that does not hold it anywhere."""
    start, end = prompt.span
    if view.at is None:
        return start == 0
    return start <= view.at and view.at + len(view.target or "") <= end


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


def collate(features: Sequence[Feature], start_id: int, keys: Sequence[int]) -> Batch:
    """Returns a T5 batch: source padded on the right, decoder inputs the targets moved right by one.

    Args:
        features: B examples; none gives one blank row without targets, so that every rank has something to compute.
        start_id: The decoder's first input.
        keys: Of the dropout, one int64 per example.
    """
    sources = [feature.source for feature in features] or [[FILLER]]
    targets = [feature.target for feature in features] or [[]]
    input_ids = _padded(sources, FILLER)
    labels = _padded(targets, IGNORE)
    lengths = torch.tensor([len(source) for source in sources])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "decoder_input_ids": _padded([[start_id, *target[:-1]] for target in targets], FILLER),
    }
    return _batch(features, inputs, labels, keys, input_ids.numel() + labels.numel())


def collate_causal(features: Sequence[Feature], keys: Sequence[int]) -> Batch:
    """Returns a decoder's batch: source and target are one sequence, padded on the right; only the answer is a target.

    The label stands where its token is predicted, one place before it: logits[b, t] predicts labels[b, t]. Padding
    after a text is seen by none of its tokens, so there is no mask. Arguments as for `collate`.
    """
    rows = [[*f.source, *f.target[:-1]] for f in features] or [[FILLER]]
    input_ids = _padded(rows, FILLER)
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
