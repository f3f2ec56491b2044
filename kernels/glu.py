"""Gated linear unit: the activation of one branch times the other.

Shazeer 2020, "GLU Variants Improve Transformer": SwiGLU, silu(gate) · up, as LLaMA has it, and GEGLU with the tanh
form of GELU, as T5 v1.1 has it. Arithmetic is fp32.

Layout: flat elements. The backward computes the activation anew from gate, so that gate and up are all that is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
SILU, GELU = 0, 1  # the activations


@triton.jit
def _activate(x, KIND: tl.constexpr):
    """Returns the activation of x and its derivative."""
    if KIND:  # GELU
        # x · (1 + tanh(z)) / 2 = x · sigmoid(2 z), which needs one exp and does not overflow.
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        dz = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
    else:
        z, dz = x, 1.0
    share = tl.sigmoid(z)
    return x * share, share + x * share * (1.0 - share) * dz


@triton.jit
def _forward(gate, up, out, total, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active, _ = _activate(tl.load(gate + at, at < total, 0.0).to(tl.float32), KIND)
    tl.store(out + at, active * tl.load(up + at, at < total, 0.0).to(tl.float32), at < total)


@triton.jit
def _backward(dout, gate, up, dgate, dup, total, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active, slope = _activate(tl.load(gate + at, at < total, 0.0).to(tl.float32), KIND)
    grad = tl.load(dout + at, at < total, 0.0).to(tl.float32)
    tl.store(dgate + at, grad * slope * tl.load(up + at, at < total, 0.0).to(tl.float32), at < total)
    tl.store(dup + at, grad * active, at < total)


@torch.library.custom_op("babl::glu", mutates_args=())
def _glu(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    out = _empty(gate, up, kind)
    if total := out.numel():
        _forward[(triton.cdiv(total, BLOCK),)](gate.contiguous(), up.contiguous(), out, total, kind, BLOCK)
    return out


@_glu.register_fake
def _empty(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@torch.library.custom_op("babl::glu_backward", mutates_args=())
def _glu_backward(dout: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    dgate, dup = _empty_gradients(dout, gate, up, kind)
    if total := dout.numel():
        inputs = dout.contiguous(), gate.contiguous(), up.contiguous()
        _backward[(triton.cdiv(total, BLOCK),)](*inputs, dgate, dup, total, kind, BLOCK)
    return dgate, dup


@_glu_backward.register_fake
def _empty_gradients(dout: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _keep(ctx, inputs, output) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx, dout):
    return *torch.ops.babl.glu_backward(dout, *ctx.saved_tensors, ctx.kind), None


_glu.register_autograd(_differentiate, setup_context=_keep)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) · up, (..., F) as both are, in the wider of their dtypes: fp32, fp16 or bf16."""
    return _glu(gate, up, SILU)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns gelu(gate) · up by the tanh form, (..., F) as both are, in the wider of their dtypes."""
    return _glu(gate, up, GELU)
