"""T5: an encoder-decoder that reads a text and writes a text.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", and
Shazeer 2020 for the gated form (v1.1, FLAN). What differs from the transformer of 2017: positions enter as a learned
bias on the attention scores, one table per stack, shared by its blocks (UMT5: one per block); scores are not divided by
sqrt(D); norms have no mean and no bias and stand before each sub-layer; linear layers have no bias; v1.0 ties the head
to the embedding and scales its input by C**-0.5.

Shapes: B batch, S source, T target, C model width, H heads, D head width, F feed-forward, V vocabulary. H * D need
not be C.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from babl import ops
from babl.errors import UserError
from babl.models.cache import Cache
from babl.models.layers import Dropout, Head, Model, number_sites, stated_fields

GATED_KEYS = {"gate": "wi_0", "wi": "wi_1", "wo": "wo"}
# Of each feed-forward, the names of its layers here -> in a transformers folder.
MLP_KEYS = {"relu": {"wi": "wi", "wo": "wo"}, "gated-gelu": GATED_KEYS, "gated-silu": GATED_KEYS}


@dataclass
class T5Config:
    """Sizes and variants, by the names of transformers' T5Config."""

    model_type: ClassVar[str] = "t5"
    architecture: ClassVar[str] = "T5ForConditionalGeneration"
    bias_in_every_block: ClassVar[bool] = False
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    pad_token_id: int = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in MLP_KEYS:
            expected = ", ".join(map(repr, MLP_KEYS))
            raise UserError(f"feed_forward_proj is {self.feed_forward_proj!r}, expected one of {expected}")

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, heads and width of the keys, and of the values, remembered of each token, read or written."""
        return self.num_decoder_layers, self.num_heads, self.d_kv

    @classmethod
    def from_hf(cls, config: dict[str, Any], tied: bool) -> "T5Config":
        """Returns the config of a folder written by transformers 4 or 5.

        Args:
            config: The parsed config.json.
            tied: Whether the file holds one tensor for embedding and head; the config does not tell, because
                version 5 writes `tie_word_embeddings: true` for every T5.
        """
        known = stated_fields(cls, config)
        known["num_decoder_layers"] = config.get("num_decoder_layers") or config["num_layers"]
        known["scale_decoder_outputs"] = cls.scales(config, tied)
        known["tie_word_embeddings"] = tied
        return cls(**known)

    @classmethod
    def scales(cls, config: dict[str, Any], tied: bool) -> bool:
        """Returns whether the head's input is scaled; arguments as for `from_hf`."""
        return config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)

    def to_hf(self) -> dict[str, Any]:
        """Returns what config.json says of this model."""
        named = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "is_encoder_decoder": True,
        }
        # transformers 4 scales where it ties, and only there; 5 goes by `scale_decoder_outputs`, and by the file.
        return named | asdict(self) | {"tie_word_embeddings": self.tie_word_embeddings and self.scale_decoder_outputs}


class MT5Config(T5Config):
    """Of mT5 (Xue et al. 2021): T5 v1.1 on a multilingual corpus; the head's input is never scaled."""

    model_type: ClassVar[str] = "mt5"
    architecture: ClassVar[str] = "MT5ForConditionalGeneration"

    @classmethod
    def scales(cls, config: dict[str, Any], tied: bool) -> bool:
        """Returns false."""
        return False


class UMT5Config(T5Config):
    """Of UMT5 (Chung et al. 2023): mT5 with a table of position biases in every block.

    The head's input is scaled where head and embedding are tied, as T5X and transformers 4 do; transformers 5 scales it
    for a head of its own, too.
    """

    model_type: ClassVar[str] = "umt5"
    architecture: ClassVar[str] = "UMT5ForConditionalGeneration"
    bias_in_every_block: ClassVar[bool] = True

    @classmethod
    def scales(cls, config: dict[str, Any], tied: bool) -> bool:
        """Returns whether head and embedding are tied."""
        return tied


class T5Attention(nn.Module):
    """Multi-head attention without 1/sqrt(D); the bias comes from outside."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads, self.d_kv = config.num_heads, config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)

    def heads(self, x: Tensor) -> Tensor:
        """Returns (B, S, H * D) as (B, H, S, D)."""
        return x.unflatten(-1, (self.num_heads, self.d_kv)).transpose(1, 2)

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | ops.Distances | None, key: Tensor | None
    ) -> Tensor:
        """Returns what the positions of x, (B, T, C), gather from keys and values, (B, H, S, D)."""
        out = ops.attention(self.heads(self.q(x)), k, v, bias, 1.0, self.dropout.of(key))  # (B, H, T, D)
        return self.o(out.transpose(1, 2).flatten(2))  # (B, T, C)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values, each (B, H, S, D), of the source, (B, S, C)."""
        return self.heads(self.k(source)), self.heads(self.v(source))


class T5MLP(nn.Module):
    """ReLU (v1.0), or GELU (v1.1) or SiLU of one branch times the other."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gate_with = {"gated-gelu": ops.geglu, "gated-silu": ops.swiglu}.get(config.feed_forward_proj)
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        if self.gate_with is not None:
            self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:  # noqa: D102
        hidden = self.wi(x)  # (B, S, F)
        hidden = F.relu(hidden) if self.gate_with is None else self.gate_with(self.gate(x), hidden)
        return self.wo(self.dropout(hidden, key))


class T5Norm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the norm of x, (..., C); or, where there is an update like x, their sum and its norm."""
        if update is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.add_rms_norm(x, update, self.weight, self.eps)


class T5Block(nn.Module):
    """Self-attention, cross-attention in the decoder, MLP: each on its norm, each added to the stream."""

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        self.attention_norm, self.attention = T5Norm(config), T5Attention(config)
        if is_decoder:
            self.cross_norm, self.cross = T5Norm(config), T5Attention(config)
        self.mlp_norm, self.mlp = T5Norm(config), T5MLP(config)
        self.dropout = nn.ModuleList(Dropout(config.dropout_rate) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        bias: Tensor | ops.Distances,
        key: Tensor | None,
        memory: Tensor | tuple[Tensor, Tensor] | None = None,
        memory_bias: Tensor | None = None,
        write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Returns the stream after this block, (B, T, C).

        Args:
            x: (B, T, C).
            bias: Relative positions, mask and causality of the self-attention, broadcastable to (B, H, T, S), or
                unwritten.
            key: (B,) int64 of the dropout, or None.
            memory: The encoder's states (B, S, C), or its keys and values already made; None in the encoder.
            memory_bias: (B, 1, 1, S), hides the source's padding.
            write: Puts new keys and values into the cache and returns all; None where x is the whole sequence.
        """
        normed = self.attention_norm(x)
        k, v = self.attention.keys_values(normed)
        if write is not None:
            k, v = write(k, v)
        update = self.dropout[0](self.attention.attend(normed, k, v, bias, key), key)
        if memory is not None:
            k, v = self.cross.keys_values(memory) if isinstance(memory, Tensor) else memory
            x, normed = self.cross_norm(x, update)
            update = self.dropout[1](self.cross.attend(normed, k, v, memory_bias, key), key)
        x, normed = self.mlp_norm(x, update)
        return x + self.dropout[2](self.mlp(normed, key), key)


def relative_bucket(delta: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Returns the bucket of each distance key - query: exact when near, logarithmic when far, one beyond the maximum.

    Args:
        delta: Any shape, int64.
        bidirectional: Half of the buckets are for keys to the right; otherwise those share bucket 0.
        num_buckets: Rows of the table.
        max_distance: In tokens; all beyond share the last bucket.

    Ref: transformers' T5Attention._relative_position_bucket; the logarithm is taken in fp32, as there.
    """
    offset = torch.zeros_like(delta)
    if bidirectional:
        num_buckets //= 2
        offset = (delta > 0) * num_buckets
        distance = delta.abs()
    else:
        distance = -delta.clamp(max=0)
    exact = num_buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = (exact + far.long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class T5Stack(nn.Module):
    """The encoder or the decoder: blocks that share one table of position biases."""

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        self.is_decoder, self.head_width, self.drops = is_decoder, config.d_kv, config.dropout_rate > 0
        self.buckets = config.relative_attention_num_buckets, config.relative_attention_max_distance
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        tables = layers if config.bias_in_every_block else 1
        table = partial(nn.Embedding, config.relative_attention_num_buckets, config.num_heads)
        self.relative_bias = table()
        self.later_relative_bias = nn.ModuleList(table() for _ in range(tables - 1))
        self.blocks = nn.ModuleList(T5Block(config, is_decoder) for _ in range(layers))
        self.final_norm = T5Norm(config)
        self.dropout = nn.ModuleList(Dropout(config.dropout_rate) for _ in range(2))

    def _looked_up(self, delta: Tensor) -> list[Tensor]:
        """Returns each table's biases (..., H) of distances key - query, (...)."""
        buckets = relative_bucket(delta, not self.is_decoder, *self.buckets)
        return [table(buckets) for table in (self.relative_bias, *self.later_relative_bias)]

    def position_bias(self, queries: Tensor, num_keys: int) -> list[Tensor]:
        """Returns each table's bias (B, H, T, S) between query positions, (B, T) int64, and keys 0 .. S-1.

        In the decoder it also hides the keys after each query.
        """
        delta = torch.arange(num_keys, device=queries.device) - queries.unsqueeze(-1)  # (B, T, S)
        biases = [bias.permute(0, 3, 1, 2) for bias in self._looked_up(delta)]
        if self.is_decoder:
            biases = [bias.masked_fill((delta > 0).unsqueeze(1), torch.finfo(bias.dtype).min) for bias in biases]
        return biases  # (B, H, T, S) each

    def text_bias(self, x: Tensor, mask: Tensor | None = None) -> Sequence[Tensor | ops.Distances]:
        """Returns each table's bias of the self-attention over a whole text, written out only where it must be.

        Args:
            x: Embedded tokens, (B, S, C).
            mask: (B, S), 0 on padding; None where there is none.
        """
        length = x.shape[1]
        hidden = None if mask is None else mask.bool()
        if ops.reads_distances(x, self.head_width, learns=True, drops=self.training and self.drops):
            tables = self._looked_up(torch.arange(1 - length, length, device=x.device))  # (2S - 1, H) each
            return [ops.Distances(table.mT.float(), hidden, self.is_decoder) for table in tables]
        biases = self.position_bias(torch.arange(length, device=x.device)[None], length)  # (1, H, S, S) each
        if hidden is None:
            return biases
        hide = ops.mask_bias(hidden[:, None, None], x.dtype)  # (B, 1, 1, S)
        return [bias + hide for bias in biases]  # (B, H, S, S) each

    def forward(
        self,
        x: Tensor,
        biases: Sequence[Tensor | ops.Distances],
        key: Tensor | None = None,
        memory: Tensor | None = None,
        memory_bias: Tensor | None = None,
        write: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        cross: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Returns the last states, (B, T, C), of embedded tokens x, (B, T, C); blocks share one bias, or have one each.

        Decoding with a cache, `write` puts a layer's new keys and values into it, and `cross` has the source's.
        """
        x = self.dropout[0](x, key)
        for layer, block in enumerate(self.blocks):
            source = memory if cross is None else cross[layer]
            bias = biases[layer if len(biases) > 1 else 0]
            x = block(x, bias, key, source, memory_bias, None if write is None else partial(write, layer))
        return self.dropout[1](self.final_norm(x), key)


class T5(Model):
    """Encoder, decoder and head."""

    is_encoder_decoder = True

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, is_decoder=False)
        self.decoder = T5Stack(config, is_decoder=True)
        self.lm_head = Head(config.d_model, config.vocab_size)
        self.tie_weights()
        number_sites(self)

    def tie_weights(self) -> None:
        """Head and embedding are one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every parameter is drawn anew, from `generator` alone, so that matching and copying text is quick to learn.

        Queries and keys begin equal, so a token attends to its like. In cross-attention and in the encoder, outputs
        begin as the transpose of values, so what is attended to arrives as what it is; in the encoder it arrives
        softly, so a token's own embedding stays louder than its neighbours'. Of the encoder's heads, one looks at the
        token before, one at the token after, one at the seven before, one at the seven after, the rest anywhere but at
        themselves. Without this, a small model from scratch does not learn in any time worth waiting for which of two
        people a question is about.

        Ref: Trockman and Kolter 2023, mimetic initialization.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = 0.5 if name == "shared.weight" else parameter.shape[-1] ** -0.5
                std = 0.1 if "relative_bias" in name else std
                parameter.normal_(0.0, std, generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, T5Attention):
                module.q.weight.mul_((2.0 * module.d_kv**-0.5) ** 0.5)  # a token's score with its like: 2 sqrt(D)
                module.k.weight.copy_(module.q.weight)
                gain = {"encoder": 0.2, "cross": 1.0}.get("cross" if name.endswith("cross") else name.split(".")[0])
                if gain is not None:
                    nn.init.orthogonal_(module.v.weight, generator=generator).mul_(gain**0.5)
                    module.o.weight.copy_(module.v.weight.mT)
        heads, before, after = self.config.num_heads, 1, self.config.relative_attention_num_buckets // 2 + 1  # buckets
        views = ((before, 1, 3.0), (after, 1, 3.0), (before, 7, 1.5), (after, 7, 1.5))
        table = self.encoder.relative_bias.weight  # (buckets, H); bucket 0 is the token itself
        for head, (first, width, bias) in enumerate(views):
            table[first : first + width, head % heads] += bias
        table[0, len(views) :] -= 3.0
        for distance in (0, 1):
            self.decoder.relative_bias.weight[distance, distance % heads] += 3.0

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the encoder's states, (B, S, C), and the bias that hides padding, (B, 1, 1, S)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.shared(input_ids)  # (B, S, C)
        hide = ops.mask_bias(attention_mask.bool()[:, None, None, :], x.dtype)  # (B, 1, 1, S)
        return self.encoder(x, self.encoder.text_bias(x, attention_mask), key), hide

    def head(self, x: Tensor, labels: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
        """Returns logits (..., V) of decoder states (..., C), or the labels' loss, see `Head`."""
        x = x * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else x
        return self.lm_head(x) if labels is None else self.lm_head(x, labels, label_smoothing)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor,
        logits_at: Tensor | None = None,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        dropout_key: Tensor | None = None,
    ) -> Tensor:
        """Returns logits (B, T, V) for the token after each decoder input, or (N, V) at the places asked for.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), 0 on padding, on any side; all ones where None.
            decoder_input_ids: (B, T) int64, beginning with the decoder's start token.
            logits_at: (B, T) bool with N true; the head runs on those rows alone.
            labels: (N,) int64, of those places: their summed cross-entropy is returned instead.
            label_smoothing: Share of each label spread evenly over the vocabulary.
            dropout_key: (B,) int64, see `ops.dropout`; torch's own generator where None.
        """
        memory, hide = self.encode(input_ids, attention_mask, dropout_key)
        x = self.shared(decoder_input_ids)  # (B, T, C)
        x = self.decoder(x, self.decoder.text_bias(x), dropout_key, memory, hide)
        return self.head(x if logits_at is None else x[logits_at], labels, label_smoothing)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor, room: int) -> tuple[Cache, Tensor]:
        """Returns a cache with room for `room` new tokens, and the state (B, C) that the first of them comes from.

        The source, padded on any side, is read once: the cross-attention's keys and values of every layer are made
        here.
        """
        memory, hide = self.encode(input_ids, attention_mask)
        config, batch = self.config, input_ids.shape[0]
        layers, heads, width = config.cache_shape
        cache = Cache.empty(layers, batch, heads, room + 1, width, memory.dtype, memory.device)
        cache.cross = [cast(T5Block, block).cross.keys_values(memory) for block in self.decoder.blocks]
        cache.cross_bias = hide
        start = torch.full((batch, 1), config.decoder_start_token_id, device=input_ids.device)
        return cache, self.decode(start, cache)[:, -1]

    def decode(self, ids: Tensor, cache: Cache) -> Tensor:
        """Returns states (B, n, C) after each of the new tokens, (B, n) int64, which enter the cache."""
        positions = cache.place(ids.shape[1])  # (B, n)
        bias = self.decoder.position_bias(positions, cache.reach)  # (B, H, n, reach)
        write = partial(cache.write, positions=positions)
        return self.decoder(self.shared(ids), bias, None, None, cache.cross_bias, write, cache.cross)


def hf_keys(config: T5Config) -> dict[str, str]:
    """Returns the name of each parameter here -> its name in a transformers folder."""
    keys = {"shared.weight": "shared.weight"}
    if not config.tie_word_embeddings:
        keys["lm_head.weight"] = "lm_head.weight"
    for stack, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        table = "layer.0.SelfAttention.relative_attention_bias.weight"
        keys[f"{stack}.relative_bias.weight"] = f"{stack}.block.0.{table}"
        for i in range(1, layers if config.bias_in_every_block else 1):
            keys[f"{stack}.later_relative_bias.{i - 1}.weight"] = f"{stack}.block.{i}.{table}"
        keys[f"{stack}.final_norm.weight"] = f"{stack}.final_layer_norm.weight"
        sublayers = [
            ("attention", "SelfAttention", "qkvo"),
            ("cross", "EncDecAttention", "qkvo"),
            ("mlp", "DenseReluDense", ""),
        ]
        if stack == "encoder":
            del sublayers[1]
        for i in range(layers):
            for j, (ours, theirs, parts) in enumerate(sublayers):
                keys[f"{stack}.blocks.{i}.{ours}_norm.weight"] = f"{stack}.block.{i}.layer.{j}.layer_norm.weight"
                names = {part: part for part in parts} or MLP_KEYS[config.feed_forward_proj]
                for name, hf in names.items():
                    keys[f"{stack}.blocks.{i}.{ours}.{name}.weight"] = (
                        f"{stack}.block.{i}.layer.{j}.{theirs}.{hf}.weight"
                    )
    return keys


EMBEDDING_KEYS = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
IGNORED_KEYS = re.compile(r".*\.EncDecAttention\.relative_attention_bias\.weight")
