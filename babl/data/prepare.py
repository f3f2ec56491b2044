"""From questions to what a run trains and validates on: the arm's views, and their windows as token ids."""

from collections.abc import Callable
from typing import NamedTuple

from babl.data.collate import Feature, check_context, make_features
from babl.data.contexts import View
from babl.data.sets import DataConfig, load_views
from babl.data.squad import Example
from babl.errors import UserError
from babl.text import Tokenizer
from babl.text.prompts import Style

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
        cfg: The arm.
        sets: Questions to train and to validate on.
        window: The tokenizer, how long a prompt may be, how much neighbours share, and the wording.
        context_length: Of the model, in tokens; None where it has no bound.
        say: Told how many there are.

    Raises:
        UserError: The arm can be built for no question, an example is longer than the model can read, or there is none
            to validate on.
    """
    train_views, validation_views = (load_views(cfg, examples) for examples in sets)
    features, losses = make_features(train_views, *window)
    validation, _ = make_features(validation_views, *window)
    if not validation:
        raise UserError("data.validation has no example to validate on: no window of its contexts keeps an answer")
    check_context([*features, *validation], context_length)
    say(f"{len(sets[0]):,} questions, {len(train_views):,} shown, {len(features):,} examples; {losses}")
    words = {e.id: len(e.context.split()) for e in sets[0]}
    return Prepared(features, [words[f.id] for f in features], validation, validation_views, window)
