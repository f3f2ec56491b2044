"""The cross-entropy of a linear layer's logits, whose logits are never all there.

Over a large vocabulary the logits and their gradients are the largest tensors of a training step. Here rows go through
the layer in chunks, and the kernel turns a chunk's logits into their gradients in place (Hsu et al. 2024, "Liger
Kernel"; the online softmax is Milakov and Gimelshein's, 2018), from which the gradients of x and w are made at once:
logits are read twice and written once, and no more than one chunk of them exists. With l a row's logits, y its label,
e the smoothing, V the vocabulary and lse the log-sum-exp of l:

    loss = lse - (1 - e) · l[y] - e · mean(l) + z · lse²
    dl   = softmax(l) · (1 + 2 z · lse) - e / V - (1 - e) · [y]

The z-loss keeps lse near 0 (Chowdhery et al. 2022, section 5). Softmax, sums and the gradient of w are fp32; logits
have the dtype of x. A row whose label is to be ignored costs its products, and gives 0; callers that know which rows
those are leave them out. Nothing waits for the GPU: how many rows count is nowhere asked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # rows: enough for full-speed products, half a gigabyte of bf16 logits over a vocabulary of 128k
BLOCK = 4096  # logits at a time


@triton.jit
def _to_gradient(logits, labels, losses, V: tl.constexpr, SMOOTHING: tl.constexpr, Z: tl.constexpr,
                 IGNORE: tl.constexpr, LEARNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    label = tl.load(labels + row)
    top = tl.full((), float("-inf"), tl.float32)  # the largest logit so far
    total = tl.full((), 0.0, tl.float32)
    right = tl.full((), 0.0, tl.float32)  # the label's logit
    plain = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = tl.load(logits + col, col < V, float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(value, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(value - higher), 0)
        top = higher
        right += tl.sum(tl.where(col == label, value, 0.0), 0)
        plain += tl.sum(tl.where(col < V, value, 0.0), 0)
    lse = top + tl.log(total)
    loss = lse - (1.0 - SMOOTHING) * right - SMOOTHING / V * plain + Z * lse * lse
    tl.store(losses + row, tl.where(label == IGNORE, 0.0, loss))
    if LEARNS:
        pull = 1.0 + 2.0 * Z * lse
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            value = tl.load(logits + col, col < V, float("-inf")).to(tl.float32)
            grad = tl.exp(value - lse) * pull - SMOOTHING / V - tl.where(col == label, 1.0 - SMOOTHING, 0.0)
            tl.store(logits + col, tl.where(label == IGNORE, 0.0, grad), col < V)


@torch.library.custom_op("babl::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, w: Tensor, labels: Tensor, smoothing: float, z_loss: float, ignore: int, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the summed loss and, if anything learns (else empty), its gradients by x and w."""
    _, dx, dw = _empty(x, w, labels, smoothing, z_loss, ignore, learns)
    cast, vocabulary = w.to(x.dtype), w.shape[0]
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    total = torch.zeros(dw.shape, dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], CHUNK):
        part = x[start : start + CHUNK].contiguous()
        rows = slice(start, start + len(part))
        logits = part @ cast.mT  # (rows, V), from the kernel on their gradient
        constants = vocabulary, smoothing, z_loss, ignore, learns, BLOCK
        _to_gradient[(len(part),)](logits, labels[rows].contiguous(), losses[rows], *constants, num_warps=8)
        if learns:
            dx[rows] = logits @ cast
            _add_product(total, logits.mT, part)
    return losses.sum(), dx, total.to(w.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """The total, fp32, has a b more, nowhere rounded to less than fp32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        total.addmm_(a.float(), b.float())


@_linear_cross_entropy.register_fake
def _empty(x, w, labels, smoothing, z_loss, ignore, learns):
    loss = x.new_empty((), dtype=torch.float32)
    return loss, x.new_empty(x.shape if learns else 0), w.new_empty(w.shape if learns else 0)


def _keep(ctx, inputs, output) -> None:
    _, dx, dw = output
    ctx.save_for_backward(dx, dw)
    ctx.mark_non_differentiable(dx, dw)


def _differentiate(ctx, dloss, *_):
    dx, dw = ctx.saved_tensors
    needs_x, needs_w = ctx.needs_input_grad[:2]
    grads = dx * dloss.to(dx.dtype) if needs_x else None, dw * dloss.to(dw.dtype) if needs_w else None
    return *grads, None, None, None, None, None


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_keep)


def linear_cross_entropy(
    x: Tensor, w: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0, ignore: int = -100
) -> Tensor:
    """Returns the summed cross-entropy of x wᵀ, fp32; 0 with a gradient of 0 for no rows.

    Args:
        x: (N, C), fp32, fp16 or bf16.
        w: (V, C); it is multiplied in the dtype of x.
        labels: (N,) int64.
        label_smoothing: Share of the target spread evenly over the vocabulary.
        z_loss: Weight of the squared log-sum-exp.
        ignore: The label of a row that gives nothing.
    """
    learns = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    return _linear_cross_entropy(x, w, labels, label_smoothing, z_loss, ignore, learns)[0]
