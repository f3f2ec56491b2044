"""The arithmetic every model shares: plain torch, one function per operation.

Shapes: B batch, H heads, S/T positions, D head width, N last axis of any tensor, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


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
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dtype in (torch.float16, torch.bfloat16):
        normed = normed.to(weight.dtype)
    return weight * normed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    drop_probs: Callable[[Tensor], Tensor] | None = None,
    causal: bool = False,
) -> Tensor:
    """Returns softmax(scale · q kᵀ + bias) v.

    Args:
        q: (B, H, T, D).
        k: (B, K, S, D); each of the K heads serves H / K neighbouring heads of q.
        v: Like k.
        bias: Additive, broadcastable to (B, H, T, S); masked positions hold the dtype's most negative number, so
            that a row with every key masked stays finite. None where nothing is added.
        scale: 1.0 for T5, D**-0.5 elsewhere.
        drop_probs: A function on the probabilities (B, H, T, S), for dropout; None where there is none.
        causal: Whether the T = S queries see no key behind them; there is no bias then.

    Returns:
        (B, H, T, D).
    """
    # A bias that learns sends torch's fused kernels on a CPU to a path slower than the two products written out.
    explicit = drop_probs is not None or (bias is not None and bias.requires_grad)
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
    return (probs if drop_probs is None else drop_probs(probs)) @ v  # (B, H, T, D)


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an additive bias: 0 where the mask is true, the dtype's most negative number where it is false."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def cross_entropy_sum(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns the summed cross-entropy of the rows, in fp32 or wider; 0 with a gradient of 0 for no rows.

    Args:
        logits: (N, V), any float dtype.
        labels: (N,) int64, every one a target.
        label_smoothing: Share of the target spread evenly over the vocabulary.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, reduction="sum", label_smoothing=label_smoothing)


_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as int64: consecutive counters land far apart


def _mix(x: Tensor) -> Tensor:
    """Returns x with its 64 bits stirred; x may be overwritten. Ref: Steele et al. 2014 (splitmix64's finaliser)."""
    x = x.bitwise_xor_(x >> 30).mul_(-4658895280553007687)
    x = x.bitwise_xor_(x >> 27).mul_(-7723592293110705685)
    return x.bitwise_xor_(x >> 31)


def dropout(x: Tensor, p: float, key: Tensor, site: int) -> Tensor:
    """Returns x with a share p of its elements zeroed and the rest scaled up, decided by (key, site, position) alone.

    A counter-based generator: an example keeps its mask in any batch, micro-batch, padding or rank. One 64-bit draw
    decides four neighbours, 16 bits each, so p is rounded to a multiple of 2**-16.

    Args:
        x: (B, ..., N).
        p: Share to zero, 0 <= p < 1.
        key: (B,) int64, one per example and step.
        site: Which dropout of the model this is.
    """
    state = _mix(key + site)  # (B,)
    lanes = -(-x.shape[-1] // 4)
    for size in (*x.shape[1:-1], lanes):
        state = _mix(state.unsqueeze(-1) + torch.arange(size, device=x.device) * _GOLDEN)  # one more axis
    threshold = round(p * 65536)
    keep = state.view(torch.int16)[..., : x.shape[-1]] >= threshold - 32768  # (B, ..., N)
    return x * keep.to(x.dtype).mul_(65536 / (65536 - threshold))
