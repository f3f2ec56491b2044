"""The model a run starts from: a folder's, or a new one."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from babl.config import PositiveInt
from babl.errors import UserError, did_you_mean
from babl.models.layers import Model
from babl.models.weights import FAMILIES, Family, from_pretrained
from babl.text import Tokenizer, load_tokenizer


@dataclass
class ModelConfig:
    """Section [model] of a run.

    Attributes:
        path: A model folder to start from; where empty, a model of `family` and `shape` is made.
        family: Of a new model.
        shape: Its sizes by transformers' names; the others are the family's defaults.
        tokenizer: A folder; where empty, the model folder's, or one trained on the training data.
        tokenizer_size: Tokens of a trained one.
    """

    path: str = ""
    family: Family = "t5"
    shape: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    tokenizer_size: PositiveInt = 1000


def build_model(cfg: ModelConfig, trained_tokenizer: Path, seed: int) -> tuple[Model, Tokenizer]:
    """Returns model and tokenizer; a folder's model is on the meta device, for each rank to read what it keeps.

    Args:
        cfg: What to start from.
        trained_tokenizer: The folder of the tokenizer trained for this run, where the configuration names none.
        seed: Of the weights of a new model.

    Raises:
        UserError: A folder is not what it should be, or a key of the shape is unknown or ill-typed.
    """
    if cfg.path:
        return from_pretrained(cfg.path, device="meta"), load_tokenizer(cfg.tokenizer or cfg.path)
    tokenizer = load_tokenizer(cfg.tokenizer or trained_tokenizer)
    family = FAMILIES[cfg.family]
    types = get_type_hints(family.config)
    names = [f.name for f in fields(family.config)]
    for name, value in cfg.shape.items():
        if name not in names:
            raise UserError(f"unknown key 'model.shape.{name}'{did_you_mean(name, names)}")
        if not isinstance(value, types[name]):
            expected = getattr(types[name], "__name__", types[name])
            raise UserError(f"model.shape.{name} is {value!r}, expected {expected}")
    known = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
    known |= {} if tokenizer.pad_id is None else {"pad_token_id": tokenizer.pad_id}
    model = family.model(family.config(**({name: value for name, value in known.items() if name in names} | cfg.shape)))
    if model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.shape.vocab_size is {model.config.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids"
        )
    model.init_weights(torch.Generator().manual_seed(seed))
    return model, tokenizer
