"""What every family computes identically."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from babl import ops, rng
from babl.errors import UserError
from babl.models.cache import Cache


class Model(nn.Module, ABC):
    """What loop, engine and folders ask of every family; calling it gives logits for each position.

    Attributes:
        is_encoder_decoder: Whether the prompt is read by a stack of its own (T5), or begins what is written.
        config: Sizes and variants, by transformers' names.
        context_length: Most positions of prompt and answer together; None where there is no bound.
    """

    is_encoder_decoder: ClassVar[bool]
    config: Any
    context_length: int | None = None

    def units(self) -> list[nn.Module]:
        """Returns the blocks of every stack, in order: what is recomputed, or sharded, as one."""
        stacks = [module for name, module in self.named_modules() if name.rpartition(".")[2] == "blocks"]
        return [block for stack in stacks for block in stack.children()]

    @abstractmethod
    def tie_weights(self) -> None:
        """Head and embedding are one parameter, where the config says so."""

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Every parameter is drawn anew, from `generator` alone."""

    @abstractmethod
    def prefill(self, input_ids: Tensor, attention_mask: Tensor, room: int) -> tuple[Cache, Tensor]:
        """Returns a cache with room for `room` new tokens, and the state (B, C) that the first of them comes from.

        Args:
            input_ids: (B, S) int64, prompts padded on the right.
            attention_mask: (B, S), 0 on padding.
            room: New tokens there must be space for.
        """

    @abstractmethod
    def decode(self, ids: Tensor, cache: Cache) -> Tensor:
        """Returns states (B, n, C) after each of the new tokens, (B, n) int64, which enter the cache."""

    @abstractmethod
    def head(self, x: Tensor, labels: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
        """Returns logits (..., V) for the token after states (..., C), or what `Head` makes of them and labels."""


def stated_fields(
    cls: type, config: dict[str, Any], aliases: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Returns what a parsed config.json says of the fields of a family's config.

    A null means that it says nothing, except of a token's id, which a model may not have.

    Args:
        cls: The family's config, a dataclass.
        config: Parsed.
        aliases: Older names of fields.

    Raises:
        UserError: A value is not of its field's type.
    """
    stated: dict[str, Any] = {}
    defaults = {f.name: f.default for f in fields(cls)}
    for key, value in config.items():
        name = aliases.get(key, key)
        if name not in defaults or (value is None and not name.endswith("_token_id")):
            continue
        expected = type(defaults[name])
        if expected in (int, float, bool, str) and not name.endswith("_token_id"):
            exact = type(value) is expected
            if not exact and not (expected is float and type(value) is int):
                raise UserError(f"{key} is {value!r}, expected {expected.__name__}")
        stated[name] = value
    return stated


class Head(nn.Linear):
    """From states to logits, or, where there are labels, straight to their loss."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__(width, vocabulary, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
        """Returns logits (..., V) of states (..., C); or the summed cross-entropy of labels (N,), every one a target.

        Args:
            x: (..., C); (N, C) where there are labels.
            labels: (N,) int64, or None.
            label_smoothing: Share of the target spread evenly over the vocabulary.
        """
        if labels is None:
            return super().forward(x)
        return ops.linear_cross_entropy_sum(x, self.weight, labels, label_smoothing)


class Dropout(nn.Module):
    """Dropout whose mask belongs to the example, not to its place in a batch.

    `number_sites` gives each instance of a model its own stream.
    """

    site: int = 0

    def __init__(self, p: float):
        """Drops a share p.

        Raises:
            UserError: p is not a share below 1.
        """
        super().__init__()
        rng.threshold(p)
        self.p = p

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        """Returns x, (B, ..., N), dropped by `key`, (B,) int64; by torch's own generator where key is None."""
        drop = self.of(key)
        return x if drop is None else ops.dropped(x, drop)

    def of(self, key: Tensor | None) -> ops.Drop | None:
        """Returns what this dropout does in a forward with this key; None where it does nothing."""
        return ops.Drop(self.p, key, self.site) if self.training and self.p > 0.0 else None


def number_sites(model: nn.Module) -> None:
    """Every Dropout of the model has a number of its own, in the order the modules were built."""
    for site, module in enumerate(m for m in model.modules() if isinstance(m, Dropout)):
        module.site = site


def visible_bias(queries: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """Returns a bias (B, 1, T, S) between query positions, (B, T) int64, and keys 0 .. S-1: later keys are hidden."""
    keys = torch.arange(num_keys, device=queries.device)
    return ops.mask_bias(keys <= queries[:, None, :, None], dtype)
