"""Layer norm, alone or after the residual add before it.

Ba et al. 2016, "Layer Normalization":

    s = x + update                              (the residual add, where there is an update)
    y = w · (s - mean(s)) / sqrt(var(s) + eps) + b

Arithmetic is fp32; the result has the wider of the dtypes of s and w, as torch's own has under autocast.

Layout: as in `rms_norm.py`: whole rows of N elements, several a program where they are short; each backward program
keeps its own sums of the gradients of w and b, which torch adds up, so the order of additions depends on the shape
alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of short rows a program holds at once
WALKERS = 512  # most backward programs, a few for each processor of today's GPUs


@triton.jit
def _forward(x, update, w, b, s, y, mean, rstd, rows, N: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
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
    middle = tl.sum(value, 1) / N
    value = tl.where(inside, value - middle[:, None], 0.0)  # two passes over registers: no difference of large squares
    scale = tl.rsqrt(tl.sum(value * value, 1) / N + EPS)
    tl.store(mean + row, middle, row < rows)
    tl.store(rstd + row, scale, row < rows)
    weight = tl.load(w + col, col < N, 0.0).to(tl.float32)
    bias = tl.load(b + col, col < N, 0.0).to(tl.float32)
    tl.store(y + at, value * scale[:, None] * weight + bias, inside)


@triton.jit
def _backward(dy, ds, s, w, mean, rstd, dx, dw, db, rows, N: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
              COLS: tl.constexpr):  # fmt: skip
    col = tl.arange(0, COLS)
    weight = tl.load(w + col, col < N, 0.0).to(tl.float32)
    dw_sum = tl.zeros((COLS,), tl.float32)
    db_sum = tl.zeros((COLS,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for start in range(first, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None] * N + col
        inside = (row < rows)[:, None] & (col < N)
        scale = tl.load(rstd + row, row < rows, 0.0)[:, None]
        normed = (tl.load(s + at, inside, 0.0).to(tl.float32) - tl.load(mean + row, row < rows, 0.0)[:, None]) * scale
        grad = tl.load(dy + at, inside, 0.0).to(tl.float32)
        dw_sum += tl.sum(grad * normed, 0)
        db_sum += tl.sum(grad, 0)
        grad *= weight
        shared = tl.sum(grad, 1)[:, None] / N + normed * (tl.sum(grad * normed, 1)[:, None] / N)
        grad = scale * (grad - shared)
        if ADD:
            grad += tl.load(ds + at, inside, 0.0).to(tl.float32)
        tl.store(dx + at, grad, inside)
    tl.store(dw + tl.program_id(0) * N + col, dw_sum, col < N)
    tl.store(db + tl.program_id(0) * N + col, db_sum, col < N)


def _tile(n: int) -> dict[str, int]:
    cols = triton.next_power_of_2(n)
    return {"ROWS": max(1, TILE // cols), "COLS": cols, "num_warps": max(4, cols // 1024)}  # 32 elements a thread


@torch.library.custom_op("babl::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, update: Tensor | None, w: Tensor, b: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns s (empty where there is no update), y, and mean and 1 / deviation, (rows,) each."""
    s, y, mean, rstd = _empty(x, update, w, b, eps)
    n = x.shape[-1]
    rows, tile = x.numel() // n, _tile(n)
    if rows:
        x, update = x.contiguous(), x if update is None else update.contiguous()
        _forward[(triton.cdiv(rows, tile["ROWS"]),)](
            x, update, w.contiguous(), b.contiguous(), s, y, mean, rstd, rows, n, eps, s.numel() > 0, **tile
        )
    return s, y, mean, rstd


@_layer_norm.register_fake
def _empty(x: Tensor, update: Tensor | None, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream = x.dtype if update is None else torch.promote_types(x.dtype, update.dtype)
    s = x.new_empty(0 if update is None else x.shape, dtype=stream)
    y = x.new_empty(x.shape, dtype=torch.promote_types(stream, w.dtype))
    mean, rstd = (x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2))
    return s, y, mean, rstd


@torch.library.custom_op("babl::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, w: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of s, in its dtype, of w and of b."""
    n = s.shape[-1]
    rows, tile = s.numel() // n, _tile(n)
    programs = min(WALKERS, triton.cdiv(rows, tile["ROWS"]))
    dx = s.new_empty(s.shape)
    dw, db = (s.new_empty((programs, n), dtype=torch.float32) for _ in range(2))
    if rows:
        add = ds is not None
        _backward[(programs,)](
            dy.contiguous(), ds.contiguous() if ds is not None else dy, s, w.contiguous(), mean, rstd, dx, dw, db, rows,
            n, add, **tile,
        )  # fmt: skip
    return dx, dw.sum(0).to(w.dtype), db.sum(0).to(w.dtype)


@_layer_norm_backward.register_fake
def _(dy: Tensor, ds: Tensor | None, s: Tensor, w: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(s, memory_format=torch.contiguous_format), torch.empty_like(w), torch.empty_like(w)


def _keep(ctx, inputs, output) -> None:
    x, update, w, _, _ = inputs
    s, _, mean, rstd = output
    ctx.save_for_backward(x.contiguous() if update is None else s, w, mean, rstd)
    ctx.dtypes = x.dtype, None if update is None else update.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, ds, dy, *_):
    s, w, mean, rstd = ctx.saved_tensors
    x_dtype, update_dtype = ctx.dtypes
    if dy is None:
        dx, dw, db = ds, None, None
    else:
        dx, dw, db = torch.ops.babl.layer_norm_backward(dy, None if update_dtype is None else ds, s, w, mean, rstd)
    if dx is None:
        return None, None, None, None, None
    return dx.to(x_dtype), None if update_dtype is None else dx.to(update_dtype), dw, db, None


_layer_norm.register_autograd(_differentiate, setup_context=_keep)


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    """Returns x with mean 0 and variance 1, scaled by w and moved by b.

    Args:
        x: (..., N), fp32, fp16 or bf16.
        w: (N,).
        b: Like w.
        eps: Added to the variance.

    Returns:
        (..., N), in the wider of the dtypes of x and w.
    """
    return _layer_norm(x, None, w, b, eps)[1]


def add_layer_norm(x: Tensor, update: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x + update, in the wider of their dtypes, and its layer norm as `layer_norm` gives it.

    Args:
        x: (..., N), fp32, fp16 or bf16.
        update: Like x.
        w: (N,).
        b: Like w.
        eps: Added to the variance.
    """
    s, y, _, _ = _layer_norm(x, update, w, b, eps)
    return s, y
