"""Which questions a run trains and validates on."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from babl.config import NonNegativeInt, PositiveInt
from babl.data.articles import disjoint, split_by_article
from babl.data.contexts import TrainArm, View, build_views
from babl.data.fictional import fictional_examples
from babl.data.squad import Example, Reading, load_squad
from babl.errors import UserError

FICTIONAL = "fictional"  # in place of a file: the embedded corpus
VALIDATION_SHARE = 0.05


@dataclass
class DataConfig:
    """Section [data] of a run.

    Attributes:
        train: A file, a folder, or a pattern with *, as `load_squad` reads them, or "fictional".
        validation: Likewise; where empty, a slice of the training articles is held out.
        context: The arm.
        max_source_tokens: Longest prompt in tokens; longer contexts are read through windows.
        stride: Tokens neighbouring windows share.
        context_seed: Of the arm's draws.
        strict: Whether an answer that does not stand at its offset, character by character, is an error.
        faulty: Whether a record that cannot be read is an error, or left out and counted.
        impossible: Whether answers beside `is_impossible: true` are an error, or read as no answer and counted.
        articles: What makes an article, whose questions stay on one side: its title, or, where all have the same one,
            the context.
        overlong: Whether a question that is too long to be read is left out and counted, or an error.
    """

    train: str = FICTIONAL
    validation: str = ""
    context: TrainArm = "gold"
    max_source_tokens: PositiveInt = 512
    stride: NonNegativeInt = 128
    context_seed: NonNegativeInt = 0
    strict: bool = False
    faulty: Literal["refuse", "leave-out"] = "refuse"
    impossible: Literal["refuse", "unanswerable"] = "refuse"
    articles: Literal["title", "context"] = "title"
    overlong: Literal["drop", "error"] = "drop"

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return Reading(self.strict, self.faulty, self.impossible, self.articles)


def load_sets(
    cfg: DataConfig, seed: int, tell: Callable[[str], object] = lambda line: None
) -> tuple[list[Example], list[Example]]:
    """Returns training and validation examples that share no article.

    Args:
        cfg: Which files, and how they are read.
        seed: Makes the embedded corpus.
        tell: Takes a line on what was read of each file, and on what is nearly the same in both sets.

    Raises:
        UserError: A file cannot be read, or both have the same article, by title or by context.
    """
    if cfg.train == FICTIONAL:
        return fictional_examples(seed)
    train = load_squad(cfg.train, cfg.reading, tell)
    if cfg.validation:
        validation = load_squad(cfg.validation, cfg.reading, tell)
    else:
        train, validation = split_by_article(train, VALIDATION_SHARE, seed=0)
    line = disjoint(train, validation, "data.validation", (cfg.train, cfg.validation or "the slice held out"))
    if line:
        tell(line)
    return train, validation


def load_views(cfg: DataConfig, examples: list[Example]) -> tuple[list[View], Counter[str]]:
    """Returns what the model is shown of the examples that the arm can be built for, and how many not, by reason.

    Raises:
        UserError: There are none.
    """
    views, missing = build_views(examples, cfg.context, cfg.context_seed, spans=True)
    if not views:
        reason = next(iter(missing.values()))
        raise UserError(f'data.context is "{cfg.context}", which can be built for no question: {reason}')
    return views, Counter(missing.values())
