"""Attention with a bias that depends on the distance alone: T5's learned one, and BLOOM's ALiBi.

Raffel et al. 2020, section 2.1 (one scalar for each head and bucket of distances); Press et al. 2022 (a slope for each
head); Dao et al. 2022 and 2023 (FlashAttention: the online softmax, and the backward from q, k, v and the row's
log-sum-exp). With m a query, n a key and h a head:

    out[m] = sum over n of dropped(softmax over n of (scale · q[m] · k[n] + table[h, n - m])) v[n]

The bias is read from a table of 2S - 1 numbers for each head (ALiBi: computed as slope[h] · (n - m)), so no tensor of
B · H · S · S elements exists in either direction, and memory is linear in S.

The gradient of table[h, d] is the sum of the scores' gradient over all batches and all pairs with n - m = d. Tiles on
one diagonal of tiles hold the same distances at the same places, so a program of the third backward kernel walks such
a diagonal, for one head and every `splits`-th batch, and adds tile to tile in registers; torch then sums along the
diagonals within the tile. No atomics: two runs agree to the last bit.

Dropout is `babl.ops.dropout`'s, decided by (key, site, h, m, n) alone: each kernel draws the same mask anew, by the
formulas at the top of `babl/rng.py`.

A query that sees no key gets 0 and gives no gradient.

Layout: q, k, v are (B, H, S, D), all three with the same strides, the last of them 1; what is returned lies as
(B, S, H, D), as the linear layers around it want it. Scores, sums and gradients are fp32; products of fp32 are put
together from three products of TF32, which lose nothing of fp32 that matters; softmax is taken to the base 2, whose
factor is folded into scale and table.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 8192  # of the keys of a tile: what keeps the backward's products in registers, on sm_80 and on sm_90
PROGRAMS = 1024  # of the table's gradient, about; where there are fewer diagonals, batches are split
LOG2E = math.log2(math.e)
_LOG2E = tl.constexpr(LOG2E)
_GAMMA, _FIRST, _SECOND = (tl.constexpr(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@triton.jit
def _draw(state, index):
    """Returns splitmix64's output of number `index`, from 0, when seeded with `state`; both uint64."""
    x = state + (index + 1) * _GAMMA
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)


@triton.jit
def _row_state(key, site, b, h, m):
    """Returns the generator's state at each query m, (rows,) uint64."""
    state = _draw(tl.load(key + b).to(tl.uint64, bitcast=True), tl.cast(site, tl.uint64))
    return _draw(_draw(state, h.to(tl.uint64)), m.to(tl.uint64))


@triton.jit
def _kept(row_state, first, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Returns whether each score of a tile is kept, (ROWS, COLS); first, a multiple of 4, is its first key."""
    lane = first // 4 + tl.arange(0, COLS // 4)
    bits = _draw(row_state[:, None], lane.to(tl.uint64)[None, :])  # four neighbours, 16 bits each
    a = (bits.to(tl.int16) >= THRESHOLD - 32768).to(tl.int8)
    b = ((bits >> 16).to(tl.int16) >= THRESHOLD - 32768).to(tl.int8)
    c = ((bits >> 32).to(tl.int16) >= THRESHOLD - 32768).to(tl.int8)
    d = ((bits >> 48).to(tl.int16) >= THRESHOLD - 32768).to(tl.int8)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(ROWS, COLS) != 0


@triton.jit
def _load(x, at, stride, length, D: tl.constexpr, COLS: tl.constexpr):
    """Returns rows `at` of a head, (rows, COLS), 0 beyond its length and width."""
    col = tl.arange(0, COLS)
    return tl.load(x + at[:, None] * stride + col, (at < length)[:, None] & (col < D), 0.0)


@triton.jit
def _store(x, value, at, stride, length, D: tl.constexpr, COLS: tl.constexpr):
    col = tl.arange(0, COLS)
    tl.store(x + at[:, None] * stride + col, value, (at < length)[:, None] & (col < D))


@triton.jit
def _scores(q, k, m, n, table, mask, length, SCALE: tl.constexpr, LINEAR: tl.constexpr, MASKED: tl.constexpr,
            CAUSAL: tl.constexpr):  # fmt: skip
    """Returns the tile's scores to the base 2, -inf where a key is hidden; table and mask are the head's, the row's."""
    delta = n[None, :] - m[:, None]
    visible = (n < length)[None, :] & (m < length)[:, None]
    if CAUSAL:
        visible &= delta <= 0
    if MASKED:
        visible &= (tl.load(mask + n, n < length, 0) != 0)[None, :]
    bias = tl.load(table) * delta.to(tl.float32) if LINEAR else tl.load(table + delta + (length - 1), visible, 0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * (SCALE * _LOG2E)
    return tl.where(visible, scores + bias, float("-inf"))


@triton.jit(do_not_specialize=["site", "length"])
def _forward(q, k, v, table, mask, key, out, lse, in_b, in_h, in_t, site, length, H: tl.constexpr, D: tl.constexpr,
             SCALE: tl.constexpr, LINEAR: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
             THRESHOLD: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    first, h, b = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * in_b + h * in_h
    table += h * (1 if LINEAR else 2 * length - 1)
    mask += b * length
    m = first + tl.arange(0, BLOCK)
    queries = _load(q + head, m, in_t, length, D, COLS)
    if THRESHOLD:
        row_state = _row_state(key, site, b, h, m)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)  # the largest score so far
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, COLS), tl.float32)
    for start in range(0, tl.minimum(first + BLOCK, length) if CAUSAL else length, BLOCK):
        n = start + tl.arange(0, BLOCK)
        keys = _load(k + head, n, in_t, length, D, COLS)
        scores = _scores(queries, keys, m, n, table, mask, length, SCALE, LINEAR, MASKED, CAUSAL)
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - 0, and not -inf - -inf
        probs = tl.exp2(scores - finite[:, None])
        fade = tl.exp2(top - finite)
        total = total * fade + tl.sum(probs, 1)
        if THRESHOLD:
            probs = tl.where(_kept(row_state, start, THRESHOLD, BLOCK, BLOCK), probs, 0.0)
        values = _load(v + head, n, in_t, length, D, COLS)
        acc = acc * fade[:, None] + tl.dot(probs.to(values.dtype), values, input_precision="tf32x3")
        top = higher
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    acc *= 65536 / (65536 - THRESHOLD) / total[:, None]
    _store(out + (b * length * H + h) * D, acc, m, H * D, length, D, COLS)
    tl.store(lse + (b * H + h) * length + m, tl.where(seen, top + tl.log2(total), float("inf")), m < length)


@triton.jit
def _gradients(q, k, v, dout, lse, delta, row_state, m, n, first_key, table, mask, length, SCALE: tl.constexpr,
               LINEAR: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, THRESHOLD: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Returns the tile's dropped probabilities and the gradient of its scores, (BLOCK, BLOCK) each."""
    probs = tl.exp2(_scores(q, k, m, n, table, mask, length, SCALE, LINEAR, MASKED, CAUSAL) - lse[:, None])
    dprobs = tl.dot(dout, tl.trans(v), input_precision="tf32x3")
    dropped = probs
    if THRESHOLD:
        kept = _kept(row_state, first_key, THRESHOLD, BLOCK, BLOCK)
        dropped = tl.where(kept, probs * (65536 / (65536 - THRESHOLD)), 0.0)
        dprobs = tl.where(kept, dprobs * (65536 / (65536 - THRESHOLD)), 0.0)
    return dropped, probs * (dprobs - delta[:, None])


@triton.jit(do_not_specialize=["site", "length"])
def _backward_q(q, k, v, table, mask, key, out, dout, lse, delta, dq, in_b, in_h, in_t, site, length, H: tl.constexpr,
                D: tl.constexpr, SCALE: tl.constexpr, LINEAR: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
                THRESHOLD: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    first, h, b = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, out_head, row = b * in_b + h * in_h, (b * length * H + h) * D, (b * H + h) * length
    table += h * (1 if LINEAR else 2 * length - 1)
    mask += b * length
    m = first + tl.arange(0, BLOCK)
    queries = _load(q + head, m, in_t, length, D, COLS)
    grads = _load(dout + out_head, m, H * D, length, D, COLS)
    outs = _load(out + out_head, m, H * D, length, D, COLS)
    # sum over n of p[n] · dp[n], which softmax's gradient takes off; the next kernels read it.
    shared = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + row + m, shared, m < length)
    log_sum = tl.load(lse + row + m, m < length, float("inf"))
    row_state = m
    if THRESHOLD:
        row_state = _row_state(key, site, b, h, m)
    acc = tl.zeros((BLOCK, COLS), tl.float32)
    for start in range(0, tl.minimum(first + BLOCK, length) if CAUSAL else length, BLOCK):
        n = start + tl.arange(0, BLOCK)
        keys, values = _load(k + head, n, in_t, length, D, COLS), _load(v + head, n, in_t, length, D, COLS)
        _, dscores = _gradients(queries, keys, values, grads, log_sum, shared, row_state, m, n, start, table, mask,
                                length, SCALE, LINEAR, MASKED, CAUSAL, THRESHOLD, BLOCK)  # fmt: skip
        acc += tl.dot(dscores.to(keys.dtype), keys, input_precision="tf32x3")
    _store(dq + out_head, acc * SCALE, m, H * D, length, D, COLS)


@triton.jit(do_not_specialize=["site", "length"])
def _backward_kv(q, k, v, table, mask, key, dout, lse, delta, dk, dv, in_b, in_h, in_t, site, length, H: tl.constexpr,
                 D: tl.constexpr, SCALE: tl.constexpr, LINEAR: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
                 THRESHOLD: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    first, h, b = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, out_head, row = b * in_b + h * in_h, (b * length * H + h) * D, (b * H + h) * length
    table += h * (1 if LINEAR else 2 * length - 1)
    mask += b * length
    n = first + tl.arange(0, BLOCK)
    keys, values = _load(k + head, n, in_t, length, D, COLS), _load(v + head, n, in_t, length, D, COLS)
    dkeys = tl.zeros((BLOCK, COLS), tl.float32)
    dvalues = tl.zeros((BLOCK, COLS), tl.float32)
    for start in range(first if CAUSAL else 0, length, BLOCK):
        m = start + tl.arange(0, BLOCK)
        queries = _load(q + head, m, in_t, length, D, COLS)
        grads = _load(dout + out_head, m, H * D, length, D, COLS)
        log_sum = tl.load(lse + row + m, m < length, float("inf"))
        shared = tl.load(delta + row + m, m < length, 0.0)
        row_state = m
        if THRESHOLD:
            row_state = _row_state(key, site, b, h, m)
        dropped, dscores = _gradients(queries, keys, values, grads, log_sum, shared, row_state, m, n, first, table,
                                      mask, length, SCALE, LINEAR, MASKED, CAUSAL, THRESHOLD, BLOCK)  # fmt: skip
        dvalues += tl.dot(tl.trans(dropped).to(grads.dtype), grads, input_precision="tf32x3")
        dkeys += tl.dot(tl.trans(dscores).to(queries.dtype), queries, input_precision="tf32x3")
    _store(dk + out_head, dkeys * SCALE, n, H * D, length, D, COLS)
    _store(dv + out_head, dvalues, n, H * D, length, D, COLS)


@triton.jit(do_not_specialize=["site", "length"])
def _backward_table(q, k, v, table, mask, key, dout, lse, delta, dtiles, in_b, in_h, in_t, site, length, batch,
                    H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, LINEAR: tl.constexpr, MASKED: tl.constexpr,
                    CAUSAL: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr,
                    COLS: tl.constexpr):  # fmt: skip
    h, split = tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(length, BLOCK)
    away = tl.program_id(0) - (tiles - 1)  # of the diagonal: a tile's place among keys less its place among queries
    table += h * (2 * length - 1)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for b in range(split, batch, tl.num_programs(2)):
        wide = tl.cast(b, tl.int64)
        head, out_head, row = wide * in_b + h * in_h, (wide * length * H + h) * D, (wide * H + h) * length
        for tile in range(tl.maximum(-away, 0), tiles - tl.maximum(away, 0)):
            m = tile * BLOCK + tl.arange(0, BLOCK)
            n = m + away * BLOCK
            queries = _load(q + head, m, in_t, length, D, COLS)
            keys, values = _load(k + head, n, in_t, length, D, COLS), _load(v + head, n, in_t, length, D, COLS)
            grads = _load(dout + out_head, m, H * D, length, D, COLS)
            log_sum = tl.load(lse + row + m, m < length, float("inf"))
            shared = tl.load(delta + row + m, m < length, 0.0)
            row_state = m
            if THRESHOLD:
                row_state = _row_state(key, site, wide, h, m)
            _, dscores = _gradients(queries, keys, values, grads, log_sum, shared, row_state, m, n,
                                    (tile + away) * BLOCK, table, mask + wide * length, length, SCALE, LINEAR, MASKED,
                                    CAUSAL, THRESHOLD, BLOCK)  # fmt: skip
            acc += dscores
    at = tl.arange(0, BLOCK)
    dtiles += ((split * H + h).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * BLOCK * BLOCK
    tl.store(dtiles + at[:, None] * BLOCK + at, acc)


def _sum_diagonals(dtiles: Tensor, length: int) -> Tensor:
    """Returns the gradient of the table, (H, 2S - 1), of sums over tiles, (splits, H, diagonals, BLOCK, BLOCK).

    Diagonal t of the T from the one farthest to the left has distances up to BLOCK - 1 around (t - T + 1) · BLOCK.
    """
    tiles = dtiles.sum(0)  # (H, diagonals, BLOCK, BLOCK)
    size, ranks = tiles.shape[-1], -(-length // tiles.shape[-1])
    # Row r, read upwards, is moved r to the right, so that a distance is a column; the last column stays empty.
    skewed = torch.nn.functional.pad(tiles.flip(-2), (0, size)).flatten(-2)[..., : size * (2 * size - 1)]
    sums = torch.nn.functional.pad(skewed.unflatten(-1, (size, 2 * size - 1)).sum(-2), (0, 1))  # (H, diagonals, 2 size)
    left, right = sums.unflatten(-1, (2, size)).unbind(-2)  # each distance but 0 of the tile occurs on two diagonals
    summed = torch.nn.functional.pad(left, (0, 0, 0, 1)) + torch.nn.functional.pad(right, (0, 0, 1, 0))
    # What is here begins at distance 1 - ranks · size, the table at 1 - length; a causal one ends at about 0.
    summed = summed.flatten(-2)[..., ranks * size - length :][..., : 2 * length - 1]
    return torch.nn.functional.pad(summed, (0, 2 * length - 1 - summed.shape[-1]))


def _aligned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k, v with the same strides, the last of them 1."""
    if q.stride(-1) == 1 and q.stride() == k.stride() == v.stride():
        return q, k, v
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))  # type: ignore[return-value]


def _block(q: Tensor) -> int:
    """Returns queries and keys of a tile: 64 of 64 dimensions in 16 bits, fewer where one is larger."""
    return max(16, min(64, TILE_BYTES // (_columns(q) * q.element_size())))


def _columns(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[-1]))


def _settings(q: Tensor, table: Tensor, mask: Tensor | None, key: Tensor | None, scale: float, causal: bool,
              threshold: int):  # fmt: skip
    """Returns the launch's constants and what stands in for tensors that are not there."""
    constants = {
        "H": q.shape[1],
        "D": q.shape[-1],
        "SCALE": scale,
        "LINEAR": table.ndim == 1,
        "MASKED": mask is not None,
        "CAUSAL": causal,
        "THRESHOLD": threshold,
        "BLOCK": _block(q),
        "COLS": _columns(q),
        "num_warps": 8,
        "num_stages": 2,
    }
    pointers = (table * LOG2E).contiguous(), q if mask is None else mask.contiguous(), q if key is None else key
    return constants, pointers


@torch.library.custom_op("babl::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor | None, key: Tensor | None, scale: float, causal: bool,
    threshold: int, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the result and its rows' log2-sum-exp2, (B, H, S) fp32."""
    out, lse = _empty(q, k, v, table, mask, key, scale, causal, threshold, site)
    q, k, v = _aligned(q, k, v)
    constants, pointers = _settings(q, table, mask, key, scale, causal, threshold)
    batch, heads, length, _ = q.shape
    grid = triton.cdiv(length, _block(q)), heads, batch
    if q.numel():
        _forward[grid](q, k, v, *pointers, out, lse, *q.stride()[:3], site, length, **constants)
    return out, lse


def _like_layers(x: Tensor) -> Tensor:
    """Returns an empty (B, H, S, D) that lies as (B, S, H, D)."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


@_attention.register_fake
def _empty(q, k, v, table, mask, key, scale, causal, threshold, site):
    return _like_layers(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("babl::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, table: Tensor, mask: Tensor | None,
    key: Tensor | None, scale: float, causal: bool, threshold: int, site: int, learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of q, k, v and, if it learns, of the table."""
    dq, dk, dv = (_like_layers(q) for _ in range(3))
    q, k, v = _aligned(q, k, v)
    constants, pointers = _settings(q, table, mask, key, scale, causal, threshold)
    batch, heads, length, _ = q.shape
    if not q.numel():
        return dq, dk, dv, torch.zeros_like(table)
    dout = dout.transpose(1, 2).contiguous()  # (B, S, H, D), as out lies
    block = _block(q)
    tiles = triton.cdiv(length, block)
    shared = *q.stride()[:3], site, length
    delta = torch.empty_like(lse)
    grid = tiles, heads, batch
    _backward_q[grid](q, k, v, *pointers, out, dout, lse, delta, dq, *shared, **constants)
    _backward_kv[grid](q, k, v, *pointers, dout, lse, delta, dk, dv, *shared, **constants)
    if not learns:
        return dq, dk, dv, table.new_empty(0)
    diagonals = tiles if causal else 2 * tiles - 1
    splits = max(1, min(batch, PROGRAMS // (diagonals * heads)))
    dtiles = table.new_empty((splits, heads, diagonals, block, block), dtype=torch.float32)
    grid = diagonals, heads, splits
    _backward_table[grid](q, k, v, *pointers, dout, lse, delta, dtiles, *shared, batch, **constants)
    return dq, dk, dv, _sum_diagonals(dtiles, length)


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, table, mask, key, scale, causal, threshold, site, learns):
    return *(_like_layers(q) for _ in range(3)), torch.empty_like(table) if learns else table.new_empty(0)


def _keep(ctx, inputs, output) -> None:
    q, k, v, table, mask, key, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, *output, table, mask, key)


def _differentiate(ctx, dout, _):
    learns = ctx.needs_input_grad[3]
    grads = torch.ops.babl.attention_backward(dout, *ctx.saved_tensors, *ctx.constants, learns)
    return *grads[:3], grads[3] if learns else None, None, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    key: Tensor | None = None,
    threshold: int = 0,
    site: int = 0,
) -> Tensor:
    """Returns softmax(scale · q kᵀ + bias) v, where the bias depends on a key's distance from the query.

    Args:
        q: (B, H, S, D), fp32, fp16 or bf16.
        k: Like q.
        v: Like q.
        table: (H, 2S - 1) fp32, the bias of distance n - m at n - m + S - 1; or (H,) fp32, slopes by which it grows
            with n - m, which do not learn.
        mask: (B, S) bool, false where a key is hidden; None where none is.
        scale: Of the products.
        causal: Whether a query sees no key after itself.
        key: (B,) int64, of the dropout of probabilities; None where there is none.
        threshold: How many of 65,536 draws drop a probability, as `babl.rng.threshold` has it; 0 where there is no key.
        site: Which dropout of the model this is.

    Returns:
        (B, H, S, D), in the dtype of q; 0 for a query that sees no key.
    """
    return _attention(q, k, v, table.float(), mask, key, scale, causal, threshold, site)[0]
