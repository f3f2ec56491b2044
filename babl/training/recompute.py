"""Activation checkpointing: what a block computes is forgotten, and computed again where the backward needs it."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from babl.models.layers import Model

Recompute = Literal["none", "selective", "all"]
_aten = torch.ops.aten
PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def recompute_blocks(model: Model, what: Recompute) -> None:
    """Has the blocks of a model keep less for the backward, which gives the same gradients.

    `all` keeps a block's input alone; `selective` keeps the results of matrix products too, so that only what is cheap
    is computed twice. A dropout that belongs to the example drops the same again.

    Ref: Chen et al. 2016; Korthikanti et al. 2022, section 5.
    """
    if what == "none":
        return
    contexts = partial(create_selective_checkpoint_contexts, PRODUCTS) if what == "selective" else noop_context_fn
    for block in model.units():
        # The method, not a module around it: parameters keep their names.
        setattr(block, "forward", _recomputed(block.forward, contexts))  # noqa: B010 (mypy knows forward as a method)


def _recomputed(forward: Callable[..., Any], contexts: Callable[[], Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run
