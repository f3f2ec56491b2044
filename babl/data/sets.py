"""Which questions a run trains and validates on."""

from dataclasses import dataclass

from babl.data.contexts import Arm
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
    """

    train: str = FICTIONAL
    validation: str = ""
    context: Arm = "gold"
    max_source_tokens: int = 512
    stride: int = 128


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
