"""Which questions a run trains and validates on."""

from dataclasses import dataclass
from pathlib import Path

from babl.data.contexts import TrainArm, View, see
from babl.data.fictional import fictional_examples
from babl.data.squad import Example, load_squad, split_by_article
from babl.errors import UserError

FICTIONAL = "fictional"  # in place of a file: the embedded corpus
VALIDATION_SHARE = 0.05


@dataclass
class DataConfig:
    """Section [data] of a run.

    Attributes:
        train: A file of `load_squad`, or "fictional".
        validation: Likewise; where empty, a slice of the training articles is held out.
        context: The arm.
        max_source_tokens: Longest prompt in tokens; longer contexts are read through windows.
        stride: Tokens neighbouring windows share.
        context_seed: Of the arm's draws.
        exclude: A file of question ids, one a line, that are neither trained nor validated on.
    """

    train: str = FICTIONAL
    validation: str = ""
    context: TrainArm = "gold"
    max_source_tokens: int = 512
    stride: int = 128
    context_seed: int = 0
    exclude: str = ""


def load_sets(cfg: DataConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """Returns training and validation examples that share no article; `seed` makes the embedded corpus."""
    if cfg.train == FICTIONAL:
        return fictional_examples(seed)
    train = load_squad(cfg.train)
    if not cfg.validation:
        return split_by_article(train, VALIDATION_SHARE, seed=0)
    validation = load_squad(cfg.validation)
    shared = {e.title for e in train} & {e.title for e in validation}
    if shared:
        raise UserError(
            f"data.validation: {cfg.validation} shares {len(shared)} articles with {cfg.train}, first {min(shared)!r}"
        )
    return train, validation


def load_views(cfg: DataConfig, examples: list[Example]) -> list[View]:
    """Returns what the model is shown of the examples: those that the arm can be built for and `exclude` does not name.

    Raises:
        UserError: The file cannot be read, or nothing is left.
    """
    excluded: set[str] = set()
    if cfg.exclude:
        try:
            excluded = set(Path(cfg.exclude).read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.exclude: {cfg.exclude} cannot be read ({error})") from None
    views, missing = see(examples, cfg.context, cfg.context_seed)
    views = [view for view in views if view.id not in excluded]
    if not views:
        raise UserError(
            f'data.context is "{cfg.context}", which leaves none of {len(examples)} questions: {len(missing)} cannot '
            f"be built, {len(examples) - len(missing)} are excluded"
        )
    return views
