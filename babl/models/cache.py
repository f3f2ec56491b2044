"""What a model remembers between decoding steps."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Cache:
    """Keys and values of every layer, in buffers written in place; rows may have different lengths.

    Row b holds positions 0 .. lengths[b] - 1; what stands after them is left over and never looked at, because a
    query sees only keys up to its own position.

    Attributes:
        keys: One (B, K, T, D) per layer; T is the room reserved.
        values: Like keys.
        lengths: (B,) int64, positions already decided per row; the next tokens are written after them.
        reach: No row is longer, so attention reads no further. A number, so that nothing waits for a GPU.
        cross: Keys and values over the source, one pair of (B, H, S, D) per layer (T5 only).
        cross_bias: (B, 1, 1, S), hides the source's padding (T5 only).
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    reach: int = 0
    cross: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    cross_bias: Tensor | None = None

    @classmethod
    def empty(
        cls,
        layers: int,
        batch: int,
        heads: int,
        room: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Cache":
        """Returns a cache with nothing in it and room for `room` positions."""

        def buffers() -> list[Tensor]:
            return [torch.zeros(batch, heads, room, width, dtype=dtype, device=device) for _ in range(layers)]

        return cls(buffers(), buffers(), torch.zeros(batch, dtype=torch.int64, device=device))

    @property
    def room(self) -> int:
        """Positions there is space for."""
        return self.keys[0].shape[2]

    def place(self, count: int) -> Tensor:
        """Returns the positions, (B, count) int64, of the next tokens; the rows are that much longer from now on."""
        positions = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        self.lengths += count
        self.reach = min(self.reach + count, self.room)
        return positions

    def cut(self, lengths: Tensor, reach: int) -> None:
        """The rows end at these lengths, (B,) int64, none beyond `reach`; what stood after is forgotten."""
        self.lengths.copy_(lengths)
        self.reach = reach

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's keys and values as far as they reach, the new ones among them.

        Args:
            layer: Whose buffers.
            k: (B, K, n, D), the new keys.
            v: Like k.
            positions: (B, n) int64, where each belongs.
        """
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.keys[layer][rows, :, positions] = k.transpose(1, 2)  # indexing puts (B, n) first: (B, n, K, D)
        self.values[layer][rows, :, positions] = v.transpose(1, 2)
        return self.keys[layer][:, :, : self.reach], self.values[layer][:, :, : self.reach]

    def keep_rows(self, rows: Tensor) -> None:
        """The rows are these, (N,) int64, in this order; one may be named several times."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.lengths = self.lengths[rows]
        self.cross = [(k[rows], v[rows]) for k, v in self.cross]
        self.cross_bias = None if self.cross_bias is None else self.cross_bias[rows]

    def grow(self, room: int) -> None:
        """There is space for at least `room` positions."""
        more = max(0, room - self.room)
        self.keys = [F.pad(k, (0, 0, 0, more)) for k in self.keys]
        self.values = [F.pad(v, (0, 0, 0, more)) for v in self.values]

    def join(self, other: "Cache", room: int) -> None:
        """The other's rows stand after this one's; there is space for `room` positions, of which no row has more."""
        if self.cross_bias is not None and other.cross_bias is not None:
            source = max(self.cross_bias.shape[-1], other.cross_bias.shape[-1])
            self.cross = [
                (_stacked(k, other_k, source), _stacked(v, other_v, source))
                for (k, v), (other_k, other_v) in zip(self.cross, other.cross, strict=True)
            ]
            hidden = torch.finfo(self.cross_bias.dtype).min
            biases = (self.cross_bias, other.cross_bias)
            self.cross_bias = torch.cat([F.pad(b, (0, source - b.shape[-1]), value=hidden) for b in biases])
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, x in enumerate(theirs):  # what a layer had goes as what it has now comes
                ours[layer] = _stacked(ours[layer], x, room)
        self.lengths = torch.cat((self.lengths, other.lengths))
        self.reach = int(self.lengths.max())


def _stacked(a: Tensor, b: Tensor, room: int) -> Tensor:
    """Returns rows (A, H, S, D) and (B, H, T, D) as (A + B, H, room, D), cut or filled with zeros."""
    return torch.cat([F.pad(x[:, :, :room], (0, 0, 0, max(0, room - x.shape[2]))) for x in (a, b)])
