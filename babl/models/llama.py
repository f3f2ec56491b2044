"""LLaMA 1, 2, 3, 3.1 and 3.2: a decoder that continues a text.

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models" and "Llama 2"; Grattafiori et al. 2024, "The
Llama 3 Herd of Models". What differs from the transformer of 2017: positions enter by rotating queries and keys (Su et
al. 2021), norms have no mean and no bias and stand before each sub-layer, the feed-forward layer is gated by SiLU, no
linear layer has a bias, and several query heads may share one head of keys and values (Ainslie et al. 2023). From 3.1
on, the slow rotations are slowed further, so that a longer context turns no further than the old one did.

Shapes: B batch, S positions of a whole text, T of its new part, C model width, H heads, K heads of keys and values, D
head width, F feed-forward, V vocabulary. H * D need not be C.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from babl import ops
from babl.errors import UserError
from babl.models.cache import Cache
from babl.models.layers import Dropout, Head, Model, number_sites, stated_fields, visible_bias

# Of each way to scale rotations, the numbers it goes by.
SCALING = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass
class LlamaConfig:
    """Sizes and variants, by the names of transformers' LlamaConfig; 0 heads or width means: derived."""

    model_type: ClassVar[str] = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads is {self.num_attention_heads}, expected a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.rope_type not in SCALING:
            raise UserError(f"rope_type is {self.rope_type!r}, expected one of {', '.join(map(repr, SCALING))}")
        for name in SCALING[self.rope_type]:
            value = self.rope_scaling.get(name)
            if not isinstance(value, int | float) or value <= 0:
                raise UserError(
                    f"rope_scaling has {name} {value!r}, expected a number above 0, which rope_type "
                    f"{self.rope_type!r} needs"
                )

    @property
    def rope_type(self) -> str:
        """How rotations are scaled."""
        return self.rope_scaling.get("rope_type") or self.rope_scaling.get("type") or "default"

    @property
    def context_length(self) -> int:
        """Most positions: beyond those it was trained on where rotations are slowed down evenly.

        A `dynamic` scaling changes nothing within the original context, and moves every key beyond it, those in a cache
        as well; it is computed within the original context alone.
        """
        if self.rope_type == "linear":
            return int(self.max_position_embeddings * self.rope_scaling["factor"])
        if self.rope_type == "dynamic":
            return self.rope_scaling.get("original_max_position_embeddings") or self.max_position_embeddings
        return self.max_position_embeddings

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and width of the keys, and of the values, that decoding remembers of each token."""
        return self.num_hidden_layers, self.num_key_value_heads, self.head_dim

    @classmethod
    def from_hf(cls, config: dict[str, Any], tied: bool) -> "LlamaConfig":
        """Returns the config of a folder written by transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

        Args:
            config: The parsed config.json.
            tied: Whether the file holds no head of its own.

        Raises:
            UserError: The model is a variant of LLaMA that Babl does not compute.
        """
        if config.get("hidden_act") not in (None, "silu"):
            raise UserError(f"hidden_act is {config['hidden_act']!r}, expected 'silu'")
        known = stated_fields(cls, config)
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        inside = scaling.pop("rope_theta", None)
        if inside is not None:
            known["rope_theta"] = inside
        known["rope_scaling"] = {} if set(scaling.values()) <= {"default", None} else scaling
        known["tie_word_embeddings"] = tied and bool(config.get("tie_word_embeddings", False))
        return cls(**known)

    def to_hf(self) -> dict[str, Any]:
        """Returns what config.json says of this model, in words both dialects understand."""
        named = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
        }
        return named | asdict(self) | {"rope_scaling": self.rope_scaling or None}


@lru_cache
def inverse_frequencies(width: int, theta: float, scaling: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns radians per position, (D / 2,) fp32, of each pair of a head's dimensions.

    Args:
        width: D.
        theta: The slowest pair turns once in about 2 pi theta positions.
        scaling: Empty; or the one factor by which every pair is slowed; or the numbers of llama3 in `SCALING`: a pair
            that turns at least `high_freq_factor` times within the original context is kept, one that turns less than
            `low_freq_factor` times is slowed by `factor`, and between the two the slowing grows smoothly.
        device: Where it is needed.

    Ref: Su et al. 2021, eq. 15; transformers' _compute_llama3_parameters.
    """
    with torch.inference_mode(False):  # made once, for training too
        frequencies = 1.0 / theta ** (torch.arange(0, width, 2, device=device).float() / width)
        if not scaling:
            return frequencies
        if len(scaling) == 1:
            return frequencies / scaling[0]
        factor, low, high, context = scaling
        turns = context * frequencies / (2 * math.pi)  # within the original context
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - kept) * frequencies / factor + kept * frequencies


class LlamaAttention(nn.Module):
    """Causal attention over rotated queries and keys; H / K query heads share each head of keys and values."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=bias)
        self.dropout = Dropout(config.attention_dropout)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        bias: Tensor | None,
        key: Tensor | None,
        write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        """Returns what the positions of x gather, (B, T, C); arguments as for `LlamaBlock`."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = ops.rope(q, k, *rotation)  # (B, H, T, D), (B, K, T, D)
        if write is not None:
            k, v = write(k, v)  # (B, K, S, D)
        out = ops.attention(
            q, k, v, bias, self.head_dim**-0.5, self.dropout.of(key), causal=bias is None
        )  # (B, H, T, D)
        return self.o(out.transpose(1, 2).flatten(2))  # (B, T, C)


class LlamaMLP(nn.Module):
    """SiLU of one branch times the other (SwiGLU)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.down(ops.swiglu(self.gate(x), self.up(x)))  # (B, T, F) inside


class LlamaNorm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the norm of x, (..., C); or, where there is an update like x, their sum and its norm."""
        if update is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.add_rms_norm(x, update, self.weight, self.eps)


class LlamaBlock(nn.Module):
    """Attention and feed-forward, each normed before and added to the stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = LlamaNorm(config)
        self.attention = LlamaAttention(config)
        self.mlp_norm = LlamaNorm(config)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        bias: Tensor | None,
        key: Tensor | None,
        write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Returns the stream after this block, (B, T, C).

        Args:
            x: (B, T, C).
            rotation: Cosine and sine, (B, 1, T, D), of each position's angles.
            bias: (B, 1, T, S), hides padding and what is to come; None where x is the whole text, without padding.
            key: (B,) int64 of the dropout, or None.
            write: Puts new keys and values into the cache and returns all; None where x is the whole text.
        """
        x, normed = self.mlp_norm(x, self.attention(self.attention_norm(x), rotation, bias, key, write))
        return x + self.mlp(normed)


class Llama(Model):
    """Embedding, blocks and head."""

    is_encoder_decoder = False

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.context_length = config.context_length
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers))
        self.final_norm = LlamaNorm(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.tie_weights()
        number_sites(self)

    def tie_weights(self) -> None:
        """Head and embedding are one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every parameter is drawn anew, from `generator` alone, so that copying text is quick to learn.

        Queries and keys begin equal, so a token attends to its like, and outputs begin as the transpose of values, so
        what is attended to arrives as what it is, softly. Without this a small model from scratch learns to copy a
        name it has never seen many times later.

        Ref: Trockman and Kolter 2023, mimetic initialization.
        """
        config = self.config
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                std = 0.5 if name == "embed.weight" else parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, std, generator=generator)
        groups = config.num_attention_heads // config.num_key_value_heads
        for block in self.blocks:
            q, k, v, o = (getattr(block.attention, name).weight for name in "qkvo")
            q.mul_((2.0 * config.head_dim**-0.5) ** 0.5)  # a token's score with its like: 2 sqrt(D)
            k.copy_(q.unflatten(0, (-1, groups, config.head_dim))[:, 0].flatten(0, 1))  # of the first head of a group
            nn.init.orthogonal_(v, generator=generator).mul_(0.3**0.5)
            o.copy_(v.unflatten(0, (-1, config.head_dim)).repeat_interleave(groups, 0).flatten(0, 1).mT)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine, (B, 1, T, D), of the angles at positions, (B, T); the angles are taken in fp32."""
        config = self.config
        names = () if config.rope_type == "dynamic" else SCALING[config.rope_type]
        scaling = tuple(config.rope_scaling[name] for name in names)
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, scaling, positions.device)
        angles = (positions[:, None, :, None].float() * frequencies).repeat(1, 1, 1, 2)  # (B, 1, T, D)
        dtype = self.embed.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

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

        Rotation tells relative positions alone, so padding before a text does not change it.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), 0 on padding, on any side; where None, padding may only stand at the end.
            logits_at: (B, S) bool with N true; the head runs on those rows alone.
            labels: (N,) int64, of those places: their summed cross-entropy is returned instead.
            label_smoothing: Share of each label spread evenly over the vocabulary.
            dropout_key: (B,) int64, see `ops.dropout`; torch's own generator where None.
        """
        x = self.embed(input_ids)  # (B, S, C)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, S)
        bias = None
        if attention_mask is not None:
            bias = visible_bias(positions, input_ids.shape[1], x.dtype)
            bias = bias.masked_fill(~attention_mask.bool()[:, None, None], torch.finfo(x.dtype).min)  # (B, 1, S, S)
        rotation = self.rotation(positions)
        for block in self.blocks:
            x = block(x, rotation, bias, dropout_key)
        x = self.final_norm(x)
        return self.head(x if logits_at is None else x[logits_at], labels, label_smoothing)

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
        x = self.embed(ids)  # (B, n, C)
        bias = visible_bias(positions, cache.reach, x.dtype)  # (B, 1, n, reach)
        rotation = self.rotation(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, bias, None, partial(cache.write, layer, positions=positions))
        return self.final_norm(x)


def hf_keys(config: LlamaConfig) -> dict[str, str]:
    """Returns the name of each parameter here -> its name in a transformers folder."""
    keys = {"embed.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    if not config.tie_word_embeddings:
        keys["lm_head.weight"] = "lm_head.weight"
    parts = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    parts |= {f"attention.{name}": f"self_attn.{name}_proj" for name in "qkvo"}
    parts |= {f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    biased = {"attention": config.attention_bias, "mlp": config.mlp_bias}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            for part in ("weight", "bias") if biased.get(ours.partition(".")[0]) else ("weight",):
                keys[f"blocks.{layer}.{ours}.{part}"] = f"model.layers.{layer}.{theirs}.{part}"
    return keys


IGNORED_KEYS = re.compile(r".*\.rotary_emb\.inv_freq")
