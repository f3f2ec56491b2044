"""Beam search over one prompt, with the results of transformers."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from babl.generation.sampling import GenerationConfig, penalize
from babl.models.cache import Cache

Written = list[tuple[int, float]]  # ids, each with its log-probability


def beam_search(
    step: Callable[[Tensor, Cache], Tensor],
    cache: Cache,
    logits: Tensor,
    limit: int,
    stop_ids: Iterable[int],
    seen: list[int],
    config: GenerationConfig,
    cancelled: Callable[[], bool],
) -> Written:
    """Returns the best ids found, with the stop token they end in, each with its log-probability.

    A hypothesis is finished where it ends among the best `num_beams`; its score is its log-probability, changed by the
    repetition penalty, divided by its length to the power of the length penalty. The search ends once it has as many
    finished as beams and the best that is still open scores no higher than the worst of them.

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
    open_: list[tuple[float, Written]] = [(0.0, [])]  # log-probability with the penalty, tokens
    finished: list[tuple[float, Written]] = []  # score, tokens
    for length in range(1, limit + 1):
        log_probs = logits.float().log_softmax(-1)
        ranked_by = torch.stack(
            [
                penalize(row, [*seen, *(token for token, _ in written)], config.repetition_penalty)
                for row, (_, written) in zip(log_probs, open_, strict=True)
            ]
        )
        totals = ranked_by + torch.tensor([[total] for total, _ in open_], device=logits.device)
        best = totals.flatten().topk(min(candidates, totals.numel()))
        own = log_probs.flatten()[best.indices]
        goes_on: list[tuple[float, Written]] = []
        parents: list[int] = []
        found = zip(best.values.tolist(), best.indices.tolist(), own.tolist(), strict=True)
        for rank, (total, place, log_prob) in enumerate(found):
            parent, token = divmod(place, logits.shape[-1])
            written = [*open_[parent][1], (token, log_prob)]
            if token in stops or length == limit:
                if rank < beams:
                    finished.append((total / length**config.length_penalty, written))
            elif len(goes_on) < beams:
                goes_on.append((total, written))
                parents.append(parent)
        finished = sorted(finished, key=lambda hypothesis: -hypothesis[0])[:beams]
        full = len(finished) == beams
        if cancelled():
            finished = finished or goes_on[:1]
            break
        if not goes_on or (full and goes_on[0][0] / length**config.length_penalty <= finished[-1][0]):
            break
        open_ = goes_on
        cache.keep_rows(torch.tensor(parents, device=logits.device))
        logits = step(torch.tensor([[written[-1][0]] for _, written in open_], device=logits.device), cache)
    return finished[0][1]
