"""Beam search over one prompt, with the results of transformers."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from babl.generation.sampling import GenerationConfig, penalize
from babl.models.cache import Cache


def beam_search(
    step: Callable[[Tensor, Cache], Tensor],
    cache: Cache,
    logits: Tensor,
    limit: int,
    stop_ids: Iterable[int],
    seen: list[int],
    config: GenerationConfig,
    cancelled: Callable[[], bool],
) -> tuple[list[int], float]:
    """Returns the best ids found, with the stop token they end in, and their log-probability.

    A hypothesis is finished where it ends among the best `num_beams`; its score is its log-probability divided by its
    length to the power of the length penalty. The search ends once it has as many finished as beams and the best
    that is still open scores no higher than the worst of them.

    Args:
        step: Puts ids (beams, 1) into the cache and returns the logits (beams, V) that follow.
        cache: Of the prompt, one row.
        logits: (1, V), of the first token.
        limit: Most tokens to write.
        stop_ids: End a hypothesis.
        seen: Ids of the prompt, for the repetition penalty.
        config: Number of beams and penalties.
        cancelled: Asked before every step; once it says yes, the best so far is returned, finished or not.

    Ref: transformers' GenerationMixin._beam_search with early_stopping=False.
    """
    stops, beams = frozenset(stop_ids), config.num_beams
    candidates = max(2, 1 + len(stops)) * beams  # enough that `beams` of them go on, even if the others all end
    open_: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, float, list[int]]] = []  # score, log-probability, ids
    for length in range(1, limit + 1):
        log_probs = logits.float().log_softmax(-1)
        log_probs = torch.stack(
            [
                penalize(row, [*seen, *ids], config.repetition_penalty)
                for row, (_, ids) in zip(log_probs, open_, strict=True)
            ]
        )
        totals = log_probs + torch.tensor([[total] for total, _ in open_], device=logits.device)
        best = totals.flatten().topk(min(candidates, totals.numel()))
        goes_on: list[tuple[float, list[int]]] = []
        parents: list[int] = []
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(place, logits.shape[-1])
            ids = [*open_[parent][1], token]
            if token in stops or length == limit:
                if rank < beams:
                    finished.append((total / length**config.length_penalty, total, ids))
            elif len(goes_on) < beams:
                goes_on.append((total, ids))
                parents.append(parent)
        finished = sorted(finished, key=lambda hypothesis: -hypothesis[0])[:beams]
        full = len(finished) == beams
        if cancelled():
            finished = finished or [(0.0, *goes_on[0])]
            break
        if not goes_on or (full and goes_on[0][0] / length**config.length_penalty <= finished[-1][0]):
            break
        open_ = goes_on
        cache.keep_rows(torch.tensor(parents, device=logits.device))
        logits = step(torch.tensor([[ids[-1]] for _, ids in open_], device=logits.device), cache)
    _, log_prob, ids = finished[0]
    return ids, log_prob
