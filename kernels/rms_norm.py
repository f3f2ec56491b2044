"""RMS norm, alone or after the residual add before it.

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization":

    s = x + update                              (the residual add, where there is an update)
    y = w · s / sqrt(mean(s²) + eps)

Plain torch reads and writes a row about ten times for this and its backward; here the forward reads x and update and
writes s and y, the backward reads dy, ds and s and writes dx. Arithmetic is fp32. Where w is narrower, the normed row
is rounded to w's dtype before it is multiplied, as T5 and LLaMA do; the result has the dtype of w then, and fp32
otherwise.

Layout: rows of N elements, one after the other. A program holds whole rows, `ROWS` of them where they are short. The
gradient of w is a sum over rows: each backward program walks rows that are a fixed stride apart and keeps its own sum,
(programs, N) fp32 in all, which torch adds up; so the order of additions depends on the shape alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of short rows a program holds at once
WALKERS = 512  # most backward programs, a few for each processor of today's GPUs


@triton.jit
def _forward(x, update, w, s, y, rstd, rows, N: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
             ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    at = row[:, None] * N + col
    inside = (row < rows)[:, None] & (col < N)
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(update + at, inside, 0.0).to(tl.float32)
        value = value.to(s.dtype.element_ty)  # the stream goes on rounded, so it is normed rounded
        tl.store(s + at, value, inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / N + EPS)
    tl.store(rstd + row, scale, row < rows)
    weight = tl.load(w + col, col < N, 0.0)
    normed = (value * scale[:, None]).to(weight.dtype).to(tl.float32)
    tl.store(y + at, normed * weight.to(tl.float32), inside)


@triton.jit
def _backward(dy, ds, s, w, rstd, dx, dw, rows, N: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
              COLS: tl.constexpr):  # fmt: skip
    col = tl.arange(0, COLS)
    weight = tl.load(w + col, col < N, 0.0).to(tl.float32)
    dw_sum = tl.zeros((COLS,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for start in range(first, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None] * N + col
        inside = (row < rows)[:, None] & (col < N)
        scale = tl.load(rstd + row, row < rows, 0.0)[:, None]
        normed = tl.load(s + at, inside, 0.0).to(tl.float32) * scale
        grad = tl.load(dy + at, inside, 0.0).to(tl.float32)
        dw_sum += tl.sum(grad * normed, 0)
        grad *= weight
        grad = scale * (grad - normed * (tl.sum(grad * normed, 1) / N)[:, None])
        if ADD:
            grad += tl.load(ds + at, inside, 0.0).to(tl.float32)
        tl.store(dx + at, grad, inside)
    tl.store(dw + tl.program_id(0) * N + col, dw_sum, col < N)


def _tile(n: int) -> dict[str, int]:
    cols = triton.next_power_of_2(n)
    return {"ROWS": max(1, TILE // cols), "COLS": cols, "num_warps": max(4, cols // 1024)}  # 32 elements a thread


def _out_dtype(w: Tensor) -> torch.dtype:
    return w.dtype if w.dtype in (torch.float16, torch.bfloat16) else torch.float32


@torch.library.custom_op("babl::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, update: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns s (empty where there is no update), y and 1 / rms (rows,)."""
    s, y, rstd = _empty(x, update, w, eps)
    n = x.shape[-1]
    rows, tile = x.numel() // n, _tile(n)
    if rows:
        x, update = x.contiguous(), x if update is None else update.contiguous()
        grid = (triton.cdiv(rows, tile["ROWS"]),)
        _forward[grid](x, update, w.contiguous(), s, y, rstd, rows, n, eps, s.numel() > 0, **tile)
    return s, y, rstd


@_rms_norm.register_fake
def _empty(x: Tensor, update: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stream = x.dtype if update is None else torch.promote_types(x.dtype, update.dtype)
    s = x.new_empty(0 if update is None else x.shape, dtype=stream)
    rows = x.numel() // x.shape[-1]
    return s, x.new_empty(x.shape, dtype=_out_dtype(w)), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("babl::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, ds: Tensor | None, s: Tensor, w: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of s, in its dtype, and of w."""
    n = s.shape[-1]
    rows, tile = s.numel() // n, _tile(n)
    programs = min(WALKERS, triton.cdiv(rows, tile["ROWS"]))
    dx = s.new_empty(s.shape)
    dw = s.new_empty((programs, n), dtype=torch.float32)
    if rows:
        add = ds is not None
        _backward[(programs,)](
            dy.contiguous(), ds.contiguous() if ds is not None else dy, s, w.contiguous(), rstd, dx, dw, rows, n, add,
            **tile,
        )  # fmt: skip
    return dx, dw.sum(0).to(w.dtype)


@_rms_norm_backward.register_fake
def _(dy: Tensor, ds: Tensor | None, s: Tensor, w: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(s, memory_format=torch.contiguous_format), torch.empty_like(w)


def _keep(ctx, inputs, output) -> None:
    x, update, w, _ = inputs
    s, _, rstd = output
    ctx.save_for_backward(x.contiguous() if update is None else s, w, rstd)
    ctx.dtypes = x.dtype, None if update is None else update.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, ds, dy, _):
    s, w, rstd = ctx.saved_tensors
    x_dtype, update_dtype = ctx.dtypes
    if dy is None:
        dx, dw = ds, None
    else:
        dx, dw = torch.ops.babl.rms_norm_backward(dy, None if update_dtype is None else ds, s, w, rstd)
    if dx is None:
        return None, None, None, None
    return dx.to(x_dtype), None if update_dtype is None else dx.to(update_dtype), dw, None


_rms_norm.register_autograd(_differentiate, setup_context=_keep)


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Returns x over its root mean square, scaled by w.

    Args:
        x: (..., N), fp32, fp16 or bf16.
        w: (N,).
        eps: Added to the mean square.

    Returns:
        (..., N), in the dtype of w where that is narrower than fp32, else in fp32.
    """
    return _rms_norm(x, None, w, eps)[1]


def add_rms_norm(x: Tensor, update: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x + update, in the wider of their dtypes, and its RMS norm as `rms_norm` gives it.

    Args:
        x: (..., N), fp32, fp16 or bf16.
        update: Like x.
        w: (N,).
        eps: Added to the mean square.
    """
    s, y, _ = _rms_norm(x, update, w, eps)
    return s, y
