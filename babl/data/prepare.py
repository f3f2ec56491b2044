"""From questions to what a run trains and validates on: the arm's views, and their windows as token ids."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from babl.data.collate import Feature, longest_prompt, make_features
from babl.data.contexts import View
from babl.data.sets import DataConfig, load_views
from babl.data.squad import Example
from babl.errors import UserError
from babl.text import Tokenizer
from babl.text.prompts import Style
from babl.text.segment import words

Window = tuple[Tokenizer, int, int, Style]  # what `make_features` and `make_prompts` cut contexts with


class Prepared(NamedTuple):
    """The examples of a run.

    Attributes:
        train: One for each window that is trained on.
        words: Of each one's context, however much of it is shown: what tells long from short alike in every arm.
        validation: Likewise, of the validation set.
        validation_views: What these are made of.
        window: How contexts were cut.
    """

    train: list[Feature]
    words: list[int]
    validation: list[Feature]
    validation_views: list[View]
    window: Window


def prepare_data(
    cfg: DataConfig,
    sets: tuple[list[Example], list[Example]],
    window: Window,
    context_length: int | None,
    say: Callable[[str], None],
) -> Prepared:
    """Returns the examples of a run.

    Args:
        cfg: The arm, and whether a question that is too long is left out.
        sets: Questions to train and to validate on.
        window: The tokenizer, how long a prompt may be, how much neighbours share, and the wording.
        context_length: Of the model, in tokens; None where it has no bound.
        say: Told how many there are, and what is left out.

    Raises:
        UserError: Nothing is left to train or to validate on, or a question is too long and `data.overlong` says
            "error".
    """
    names = ("train", "validation")
    built = {name: load_views(cfg, examples) for name, examples in zip(names, sets, strict=True)}
    views = {name: of for name, (of, _) in built.items()}
    tokenizer, most, stride, style = window
    limit = longest_prompt([*views["train"], *views["validation"]], tokenizer, most, style, context_length)
    if limit < most:
        say(f"prompts have at most {limit} tokens, not {most}: the answer needs room in a context of {context_length}")
    window = tokenizer, limit, stride, style
    features = {}
    for name, examples in zip(names, sets, strict=True):
        features[name], truncation = make_features(views[name], *window, context_length)
        why = "".join(f", {number:,} not: {reason}" for reason, number in built[name][1].most_common())
        shown = f"{len(examples):,} questions, {len(views[name]):,} shown{why}"
        counts = f"{shown}; {len(features[name]):,} examples, {truncation}"
        if truncation.overlong and cfg.overlong == "error":
            raise UserError(
                f"data.{name}: {len(truncation.overlong):,} of {len(views[name]):,} questions are too long, and "
                f'data.overlong is "error"; first: {next(iter(truncation.overlong.values()))}'
            )
        if not features[name]:
            raise UserError(f"data.{name} leaves no example: {counts}")
        say(f"data.{name}: {counts}")
    sizes = dict(zip((e.id for e in sets[0]), context_words(sets[0]), strict=True))
    sources = [sizes[feature.id] for feature in features["train"]]
    return Prepared(features["train"], sources, features["validation"], views["validation"], window)


def context_words(examples: Sequence[Example]) -> list[int]:
    """Returns how many words each question's context has, which is what `deal_epoch` tells long from short by."""
    sizes = {context: len(words(context)) for context in {e.context for e in examples}}
    return [sizes[e.context] for e in examples]
