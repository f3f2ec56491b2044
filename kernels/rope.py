"""Rotary position embedding of queries and keys in one launch.

Su et al. 2021, "RoFormer", section 3.4.2, in the layout of transformers' folders: dimension i and i + D/2 of a head
turn as a pair,

    (l, r) -> (l · cos - r · sin, r · cos + l · sin),

and the backward is the turn back, the same kernel with -sin. Arithmetic is fp32.

Layout: q is (B, H, T, D) and k (B, K, T, D) with any strides whose last is 1, as they come out of a linear layer;
cos and sin are (B or 1, 1, T, D), whose halves are the same. A program turns all heads of q and k at one position.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn_heads(x, y, stride, out_stride, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
                COLS: tl.constexpr):  # fmt: skip
    head = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)
    inside = (head < HEADS) & (col < HALF)
    left = tl.load(x + head * stride + col, inside, 0.0).to(tl.float32)
    right = tl.load(x + head * stride + col + HALF, inside, 0.0).to(tl.float32)
    tl.store(y + head * out_stride + col, left * cos - right * sin, inside)
    tl.store(y + head * out_stride + col + HALF, right * cos + left * sin, inside)


@triton.jit
def _turn(q, k, cos, sin, q_out, k_out, q_b, q_h, q_t, k_b, k_h, k_t, cos_b, length, BACK: tl.constexpr,
          H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, H_ROWS: tl.constexpr, K_ROWS: tl.constexpr,
          COLS: tl.constexpr):  # fmt: skip
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    col = tl.arange(0, COLS)
    angle = b * cos_b + t * 2 * HALF + col
    c = tl.load(cos + angle, col < HALF, 0.0).to(tl.float32)
    s = tl.load(sin + angle, col < HALF, 0.0).to(tl.float32)
    if BACK:
        s = -s
    row = t * 2 * HALF  # what is written is contiguous
    _turn_heads(q + b * q_b + t * q_t, q_out + b * H * length * 2 * HALF + row, q_h, length * 2 * HALF, c, s, H, HALF,
                H_ROWS, COLS)  # fmt: skip
    _turn_heads(k + b * k_b + t * k_t, k_out + b * K * length * 2 * HALF + row, k_h, length * 2 * HALF, c, s, K, HALF,
                K_ROWS, COLS)  # fmt: skip


@torch.library.custom_op("babl::rope", mutates_args=())
def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_dtype: torch.dtype, k_dtype: torch.dtype, back: bool
) -> tuple[Tensor, Tensor]:
    """Returns q and k turned, or turned back, in these dtypes."""
    q_out, k_out = _empty(q, k, cos, sin, q_dtype, k_dtype, back)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, length, width = q.shape
    if q.numel():
        cos, sin = cos.contiguous(), sin.contiguous()
        cos_b = cos.stride(0) if cos.shape[0] > 1 else 0
        sizes = heads, k.shape[1], width // 2
        _turn[(length, batch)](
            q, k, cos, sin, q_out, k_out, *q.stride()[:3], *k.stride()[:3], cos_b, length, back, *sizes,
            *map(triton.next_power_of_2, sizes),
        )  # fmt: skip
    return q_out, k_out


@_rope.register_fake
def _empty(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_dtype: torch.dtype, k_dtype: torch.dtype, back: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=q_dtype), k.new_empty(k.shape, dtype=k_dtype)


def _keep(ctx, inputs, output) -> None:
    q, k, cos, sin, *_, back = inputs
    ctx.save_for_backward(cos, sin)
    ctx.back, ctx.dtypes = not back, (q.dtype, k.dtype)


def _differentiate(ctx, dq, dk):
    turned = torch.ops.babl.rope(dq, dk, *ctx.saved_tensors, *ctx.dtypes, ctx.back)
    return *turned, None, None, None, None, None


_rope.register_autograd(_differentiate, setup_context=_keep)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns queries and keys turned to their positions, each in the wider of its dtype and that of cos.

    Args:
        q: (B, H, T, D), fp32, fp16 or bf16, D even.
        k: (B, K, T, D).
        cos: (B or 1, 1, T, D), of each position's angles; the halves of the last axis are the same.
        sin: Like cos.
    """
    return _rope(q, k, cos, sin, *(torch.promote_types(x.dtype, cos.dtype) for x in (q, k)), False)
