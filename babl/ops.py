"""The arithmetic every model shares: plain torch, one function per operation, or a kernel where one is chosen.

`babl.kernel_choice` says when one is.

Shapes: B batch, H heads, S/T positions, D head width, N last axis of any tensor, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from babl import rng
from babl.kernel_choice import kernel_chosen, product_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x over its root mean square, scaled by weight; the variance is taken in fp32 or wider.

    Args:
        x: (..., N), any float dtype.
        weight: (N,).
        eps: Added to the variance.

    Returns:
        (..., N), in the dtype of the weight where that is narrower than fp32, else in the wider of the two.

    Ref: Zhang and Sennrich 2019, eq. 4; transformers' T5LayerNorm and LlamaRMSNorm.
    """
    if kernel_chosen("rms_norm", x, x.numel(), x.shape[-1]):
        from babl.kernels.rms_norm import rms_norm as kernel

        return kernel(x, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dtype in (torch.float16, torch.bfloat16):
        normed = normed.to(weight.dtype)
    return weight * normed


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x + update, (..., N), and the `rms_norm` of it."""
    if kernel_chosen("rms_norm", x, x.numel(), x.shape[-1]):
        from babl.kernels.rms_norm import add_rms_norm as kernel

        return kernel(x, update, weight, eps)
    x = x + update
    return x, rms_norm(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns x, (..., N), with mean 0 and variance 1, scaled by weight and moved by bias, (N,) each.

    Ref: Ba et al. 2016.
    """
    if kernel_chosen("layer_norm", x, x.numel(), x.shape[-1]):
        from babl.kernels.layer_norm import layer_norm as kernel

        return kernel(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x + update, (..., N), and the `layer_norm` of it."""
    if kernel_chosen("layer_norm", x, x.numel(), x.shape[-1]):
        from babl.kernels.layer_norm import add_layer_norm as kernel

        return kernel(x, update, weight, bias, eps)
    x = x + update
    return x, layer_norm(x, weight, bias, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns queries and keys with dimension i and i + D/2 turned as a pair.

    This is the layout of transformers' folders; Meta's own files pair neighbours.

    Args:
        q: (B, H, T, D).
        k: (B, K, T, D).
        cos: (B or 1, 1, T, D), of the angle at each position; the halves of the last axis are the same.
        sin: Like cos.

    Ref: Su et al. 2021, section 3.4.2.
    """
    if kernel_chosen("rope", q, q.numel(), q.shape[-1]):
        from babl.kernels.rope import rope as kernel

        return kernel(q, k, cos, sin)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) · up, (..., F) as both are. Ref: Shazeer 2020, eq. 5."""
    if kernel_chosen("glu", gate, gate.numel(), gate.shape[-1]):
        from babl.kernels.glu import swiglu as kernel

        return kernel(gate, up)
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns gelu(gate) · up, (..., F) as both are, by the tanh form of GELU. Ref: Shazeer 2020, eq. 5."""
    if kernel_chosen("glu", gate, gate.numel(), gate.shape[-1]):
        from babl.kernels.glu import geglu as kernel

        return kernel(gate, up)
    return F.gelu(gate, approximate="tanh") * up


class Drop(NamedTuple):
    """One dropout of one forward.

    Attributes:
        p: Share to zero, 0 <= p < 1.
        key: (B,) int64, one per example and step; None: torch's own generator draws.
        site: Which dropout of the model this is.
    """

    p: float
    key: Tensor | None
    site: int


class Distances(NamedTuple):
    """A bias on attention scores that depends on the distance alone, not written out: as the kernel reads it.

    Attributes:
        table: (H, 2S - 1) fp32, of distances key - query from 1 - S to S - 1; or (H,), by how much it grows with them.
        mask: (B, S) bool, false where a key is hidden; None where none is.
        causal: Whether a query sees no key after itself.
    """

    table: Tensor
    mask: Tensor | None
    causal: bool


def reads_distances(x: Tensor, width: int, learns: bool, drops: bool) -> bool:
    """Returns whether `attention` over a text wants its bias unwritten.

    Args:
        x: Like the text, (B, S, C).
        width: Of a head.
        learns: Whether the bias is a table that learns (T5), or grows evenly (ALiBi).
        drops: Whether probabilities are dropped.
    """
    operation = ("attention" if learns else "alibi") + (", dropout" if drops else "")
    return kernel_chosen(operation, x, x.shape[1], width)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | Distances | None,
    scale: float,
    drop: Drop | None = None,
    causal: bool = False,
) -> Tensor:
    """Returns softmax(scale · q kᵀ + bias) v.

    Args:
        q: (B, H, T, D).
        k: (B, K, S, D); each of the K heads serves H / K neighbouring heads of q.
        v: Like k.
        bias: Additive, broadcastable to (B, H, T, S); masked positions hold the dtype's most negative number, so
            that a row with every key masked stays finite. None where nothing is added. Or unwritten, where
            `reads_distances` says so and K = H and T = S; a row with every key masked is 0 then.
        scale: 1.0 for T5, D**-0.5 elsewhere.
        drop: Of the probabilities (B, H, T, S); None where there is none.
        causal: Whether the T = S queries see no key after them; there is no bias then.

    Returns:
        (B, H, T, D).
    """
    if isinstance(bias, Distances):
        from babl.kernels.attention import attention as kernel

        key, threshold, site = None, 0, 0
        if drop is not None:
            key, threshold, site = drop.key, rng.threshold(drop.p), drop.site
            key = torch.randint(-(2**63), 2**63 - 1, q.shape[:1], device=q.device) if key is None else key
        return kernel(q, k, v, bias.table, bias.mask, scale, bias.causal, key, threshold, site)
    # A bias that learns sends torch's fused kernels on a CPU to a path slower than the two products written out.
    explicit = drop is not None or (bias is not None and bias.requires_grad)
    if not explicit:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale, enable_gqa=grouped)
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if causal:
        bias = mask_bias(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(), q.dtype)
    scores = (q * scale if scale != 1.0 else q) @ k.mT  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return (probs if drop is None else dropped(probs, drop)) @ v  # (B, H, T, D)


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an additive bias: 0 where the mask is true, the dtype's most negative number where it is false."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def linear_cross_entropy_sum(x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns the summed cross-entropy of x weightᵀ, in fp32 or wider; 0 with a gradient of 0 for no rows.

    Args:
        x: (N, C), any float dtype.
        weight: (V, C).
        labels: (N,) int64, every one a target.
        label_smoothing: Share of the target spread evenly over the vocabulary.
    """
    if kernel_chosen("linear_cross_entropy", x, x.shape[0], weight.shape[0]):
        from babl.kernels.linear_cross_entropy import linear_cross_entropy as kernel

        return kernel(x.to(product_dtype(x)), weight, labels, label_smoothing)
    logits = F.linear(x, weight)  # (N, V)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, reduction="sum", label_smoothing=label_smoothing)


def dropout(x: Tensor, p: float, key: Tensor, site: int) -> Tensor:
    """Returns x with a share p of its elements zeroed and the rest scaled up, decided by (key, site, position) alone.

    An example keeps its mask in any batch, micro-batch, padding or rank. The share is p rounded to a multiple of 2**-16
    (below 2**-17 nothing is dropped), and the scale is that of the rounded share, so the expected value stays x.

    Args:
        x: (B, ..., N), any float dtype; the scaling is rounded once to it.
        p: Share to zero, 0 <= p < 1.
        key: (B,) int64, one per example and step; `rng.dropout_keys` makes them.
        site: Which dropout of the model this is.

    Raises:
        UserError: p is not a share below 1.

    Ref: Srivastava et al. 2014, scaled in training; the bits are those of `babl.rng`.
    """
    return (x * rng.kept(x.shape, p, key, site)).mul_(65536 / (65536 - rng.threshold(p)))


def dropped(x: Tensor, drop: Drop) -> Tensor:
    """Returns x, (B, ..., N), with elements zeroed and the rest scaled up as `drop` says."""
    return F.dropout(x, drop.p) if drop.key is None else dropout(x, drop.p, drop.key, drop.site)
