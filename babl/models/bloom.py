"""BLOOM: a multilingual decoder that continues a text.

Workshop et al. 2022, "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model". What differs from the
transformer of 2017: positions enter as ALiBi, a penalty on the attention scores that grows with the distance, at a
slope of each head's own (Press et al. 2022); the embeddings are normed before the first block; queries, keys and
values come out of one linear layer, interleaved head by head; norms stand before each sub-layer; the head is tied.

Shapes: B batch, S positions of a whole text, T of its new part, C model width, H heads, D = C / H head width, V
vocabulary.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babl import ops
from babl.errors import UserError
from babl.models.cache import Cache
from babl.models.layers import Dropout, Head, Model, number_sites, stated_fields

ALIASES = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}


@dataclass
class BloomConfig:
    """Sizes and variants, by the names of transformers' BloomConfig."""

    model_type: ClassVar[str] = "bloom"
    vocab_size: int = 250880
    hidden_size: int = 1024
    n_layer: int = 24
    n_head: int = 16
    layer_norm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 3

    def __post_init__(self) -> None:
        if self.hidden_size % self.n_head:
            raise UserError(f"hidden_size is {self.hidden_size}, expected a multiple of n_head ({self.n_head})")

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and width of the keys, and of the values, that decoding remembers of each token."""
        return self.n_layer, self.n_head, self.hidden_size // self.n_head

    @classmethod
    def from_hf(cls, config: dict[str, Any], tied: bool) -> "BloomConfig":
        """Returns the config of a folder written by transformers 4 or 5, older names included.

        Args:
            config: The parsed config.json.
            tied: Whether the file holds no head of its own.

        Raises:
            UserError: The model is a variant of BLOOM that Babl does not compute.
        """
        if config.get("apply_residual_connection_post_layernorm"):
            raise UserError("apply_residual_connection_post_layernorm is true, expected false")
        known = stated_fields(cls, config, ALIASES)
        return cls(**(known | {"tie_word_embeddings": tied}))

    def to_hf(self) -> dict[str, Any]:
        """Returns what config.json says of this model."""
        return {"architectures": ["BloomForCausalLM"], "model_type": "bloom"} | asdict(self)


@lru_cache
def slopes(heads: int, device: torch.device) -> Tensor:
    """Returns the penalty per position of each head, (H,) fp32.

    A power of two of heads has 2**(-8/H), 2**(-16/H), ..., 2**-8; any other number has those of the power below, then
    every other one of the power above.

    Ref: Press et al. 2022, section 3; transformers' build_alibi_tensor.
    """
    below = 2 ** math.floor(math.log2(heads))
    with torch.inference_mode(False):  # made once, for training too

        def powers(of: int, number: int, every: int) -> Tensor:
            base = torch.tensor(2.0 ** (-8 / of), device=device)
            return base ** torch.arange(1, 1 + number * every, every, device=device)

        return torch.cat((powers(below, below, 1), powers(2 * below, heads - below, 2)))


def alibi(queries: Tensor, num_keys: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Returns the bias (B, H, T, S) between query positions, (B, T) int64, and keys 0 .. S-1; later keys are hidden.

    It is the distance times the slope. transformers adds slope times key position instead, which is the same to a
    softmax, but in bf16 rounds away positions beyond 256; near keys, the ones that matter, are exact here.
    """
    distance = queries.unsqueeze(-1) - torch.arange(num_keys, device=queries.device)  # (B, T, S)
    penalty = -distance[:, None].float() * slopes(heads, queries.device)[:, None, None]  # (B, H, T, S)
    return penalty.to(dtype).masked_fill(distance[:, None] < 0, torch.finfo(dtype).min)


class BloomAttention(nn.Module):
    """Causal attention with ALiBi; one linear layer makes queries, keys and values."""

    def __init__(self, config: BloomConfig):
        super().__init__()
        self.heads = config.n_head
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.attention_dropout)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | ops.Distances,
        key: Tensor | None,
        write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        """Returns what the positions of x gather, (B, T, C); arguments as for `BloomBlock`."""
        fused = self.qkv(x).unflatten(-1, (self.heads, 3, -1))  # (B, T, H, 3, D): a head's three lie together
        q, k, v = fused.transpose(1, 2).unbind(-2)  # (B, H, T, D) each
        scale = q.shape[-1] ** -0.5
        if write is not None:
            k, v = write(k, v)  # (B, H, S, D)
        out = ops.attention(q, k, v, bias, scale, self.dropout.of(key))  # (B, H, T, D)
        return self.o(out.transpose(1, 2).flatten(2))  # (B, T, C)


class BloomMLP(nn.Module):
    """GELU, by its tanh approximation, four times as wide as the model."""

    def __init__(self, config: BloomConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class BloomNorm(nn.Module):
    """Layer norm with weight and bias."""

    def __init__(self, config: BloomConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the norm of x, (..., C); or, where there is an update like x, their sum and its norm."""
        if update is None:
            return ops.layer_norm(x, self.weight, self.bias, self.eps)
        return ops.add_layer_norm(x, update, self.weight, self.bias, self.eps)


class BloomBlock(nn.Module):
    """Attention and feed-forward, each normed before and added to the stream."""

    def __init__(self, config: BloomConfig):
        super().__init__()
        self.attention_norm = BloomNorm(config)
        self.attention = BloomAttention(config)
        self.mlp_norm = BloomNorm(config)
        self.mlp = BloomMLP(config)
        self.dropout = nn.ModuleList(Dropout(config.hidden_dropout) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        bias: Tensor | ops.Distances,
        key: Tensor | None,
        write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Returns the stream after this block, (B, T, C).

        Args:
            x: (B, T, C).
            bias: ALiBi, (B, H, T, S), which also hides padding and what is to come, or unwritten.
            key: (B,) int64 of the dropout, or None.
            write: Puts new keys and values into the cache and returns all; None where x is the whole text.
        """
        update = self.dropout[0](self.attention(self.attention_norm(x), bias, key, write), key)
        x, normed = self.mlp_norm(x, update)
        return x + self.dropout[1](self.mlp(normed), key)


class Bloom(Model):
    """Embedding, blocks and head."""

    is_encoder_decoder = False

    def __init__(self, config: BloomConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = BloomNorm(config)
        self.blocks = nn.ModuleList(BloomBlock(config) for _ in range(config.n_layer))
        self.final_norm = BloomNorm(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.tie_weights()
        number_sites(self)

    def tie_weights(self) -> None:
        """Head and embedding are one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every parameter is drawn anew, from `generator` alone."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)

    def head(self, x: Tensor, labels: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
        """Returns logits (..., V) of states (..., C), or the labels' loss, see `Head`."""
        return self.lm_head(x) if labels is None else self.lm_head(x, labels, label_smoothing)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        logits_at: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        dropout_key: Tensor | None = None,
    ) -> Tensor:
        """Returns logits (B, S, V) for the token after each position, or (N, V) at the places asked for.

        ALiBi tells relative positions alone, so padding before a text does not change it.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), 0 on padding, on any side; where None, padding may only stand at the end.
            logits_at: (B, S) bool with N true; the head runs on those rows alone.
            labels: (N,) int64, of those places: their summed cross-entropy is returned instead.
            label_smoothing: Share of each label spread evenly over the vocabulary.
            dropout_key: (B,) int64, see `ops.dropout`; torch's own generator where None.
        """
        x = self.embed_norm(self.embed(input_ids))  # (B, S, C)
        bias = self.text_bias(x, attention_mask)
        for block in self.blocks:
            x = block(x, bias, dropout_key)
        x = self.final_norm(x)
        return self.head(x if logits_at is None else x[logits_at], labels, label_smoothing)

    def text_bias(self, x: Tensor, mask: Tensor | None) -> Tensor | ops.Distances:
        """Returns ALiBi over a whole text x, (B, S, C), with its mask (B, S), written out only where it must be."""
        heads, length = self.config.n_head, x.shape[1]
        hidden = None if mask is None else mask.bool()
        drops = self.training and self.config.attention_dropout > 0
        if ops.reads_distances(x, x.shape[2] // heads, learns=False, drops=drops):
            return ops.Distances(slopes(heads, x.device), hidden, causal=True)
        bias = alibi(torch.arange(length, device=x.device)[None], length, heads, x.dtype)  # (1, H, S, S)
        if hidden is not None:
            bias = bias.masked_fill(~hidden[:, None, None], torch.finfo(x.dtype).min)  # (B, H, S, S)
        return bias

    def prefill(self, input_ids: Tensor, attention_mask: Tensor, room: int) -> tuple[Cache, Tensor]:
        """Returns a cache with room for `room` new tokens, and the state (B, C) that the first of them comes from."""
        config, (batch, width) = self.config, input_ids.shape
        layers, heads, head_width = config.cache_shape
        cache = Cache.empty(layers, batch, heads, width + room, head_width, self.embed.weight.dtype, input_ids.device)
        states = self.decode(input_ids, cache)
        lengths = attention_mask.sum(1)  # (B,)
        cache.cut(lengths, width)
        return cache, states[torch.arange(batch, device=lengths.device), lengths - 1]

    def decode(self, ids: Tensor, cache: Cache) -> Tensor:
        """Returns states (B, n, C) after each of the new tokens, (B, n) int64, which enter the cache."""
        positions = cache.place(ids.shape[1])  # (B, n)
        x = self.embed_norm(self.embed(ids))  # (B, n, C)
        bias = alibi(positions, cache.reach, self.config.n_head, x.dtype)  # (B, H, n, reach)
        for layer, block in enumerate(self.blocks):
            x = block(x, bias, None, partial(cache.write, layer, positions=positions))
        return self.final_norm(x)


def hf_keys(config: BloomConfig) -> dict[str, str]:
    """Returns the name of each parameter here -> its name in a transformers folder."""
    both = ("weight", "bias")
    keys = {"embed.weight": "transformer.word_embeddings.weight"}
    keys |= {f"embed_norm.{p}": f"transformer.word_embeddings_layernorm.{p}" for p in both}
    keys |= {f"final_norm.{p}": f"transformer.ln_f.{p}" for p in both}
    if not config.tie_word_embeddings:
        keys["lm_head.weight"] = "lm_head.weight"
    parts = {
        "attention_norm": "input_layernorm",
        "attention.qkv": "self_attention.query_key_value",
        "attention.o": "self_attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    for layer in range(config.n_layer):
        for ours, theirs in parts.items():
            keys |= {f"blocks.{layer}.{ours}.{p}": f"transformer.h.{layer}.{theirs}.{p}" for p in both}
    return keys


IGNORED_KEYS = re.compile(r".*\.self_attention\.(masked_)?bias")
