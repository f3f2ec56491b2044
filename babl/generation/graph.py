"""A decoding step as one CUDA graph: the same kernels, without the time it takes to launch each."""

from collections.abc import Callable

import torch
from torch import Tensor

from babl.models.cache import Cache

WARMUP_STEPS = 3  # before capture, so that every library has its workspace


class GraphedStep:
    """Puts ids (B, 1) into one cache and returns the logits (B, 1, V) after each, by replaying a graph.

    Shapes must not change: attention looks at the whole room, of which the bias hides what is not written. The first
    step is computed in both ways; where they differ by more than rounding, the plain way is taken from then on.

    Args:
        step: The plain way.
        cache: The only cache it will be called with.
    """

    def __init__(self, step: Callable[[Tensor, Cache], Tensor], cache: Cache):
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ids = torch.zeros_like(cache.lengths)[:, None]  # (B, 1)
        cache.reach = cache.room

    def __call__(self, ids: Tensor, cache: Cache) -> Tensor:  # noqa: D102
        if ids.shape != self.ids.shape:
            return self.step(ids, cache)
        self.ids.copy_(ids)
        if self.graph is None:
            return self._capture(cache)
        self.graph.replay()
        return self.logits.clone()

    def _capture(self, cache: Cache) -> Tensor:
        """Returns the first step's logits, computed plainly; the graph is ready for the next."""
        before = cache.lengths.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                cache.lengths.copy_(before)
                plain = self.step(self.ids, cache).clone()
        torch.cuda.current_stream().wait_stream(stream)
        cache.lengths.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.step(self.ids, cache)
        graph.replay()
        if torch.allclose(self.logits, plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max())):
            self.graph = graph
        else:
            self.ids = self.ids[:0]  # no step has this shape: the plain way from now on
        return plain
