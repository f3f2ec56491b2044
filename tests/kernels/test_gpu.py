"""Kernels as a GPU runs them, in 16 bits: as near to fp32 as the reference in the same 16 bits, and no larger."""

import pytest
import torch

from babl import kernel_choice, ops, rng

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALVES = [torch.bfloat16, torch.float16]


def gradients(fn, inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = fn(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(out.shape, device="cuda", generator=generator).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


def assert_as_near_as(kernel, reference, inputs):
    """The error is at most twice the reference's in the same dtype. Ref: Dao et al. 2022, FlashAttention's tests."""
    exact = gradients(reference, [x.float() for x in inputs])
    rounded, got = gradients(reference, inputs), gradients(kernel, inputs)
    for i, (want, near, have) in enumerate(zip(exact, rounded, got, strict=True)):
        assert (have.float() - want).abs().max() <= 2 * (near.float() - want).abs().max() + 1e-5, i


def written_out(causal, mask, drop):
    def run(q, k, v, table):
        length = q.shape[2]
        delta = torch.arange(length, device="cuda") - torch.arange(length, device="cuda")[:, None]
        visible = mask[:, None, None] & ((delta <= 0) if causal else torch.ones_like(delta, dtype=torch.bool))
        bias = table[:, delta + length - 1].masked_fill(~visible, torch.finfo(torch.float32).min)
        return ops.attention(q, k, v, bias, 1.0, drop) * visible.any(-1, keepdim=True)

    return run


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "width", "p"),
    [
        (4, 6, 384, 64, 0.0),
        (4, 6, 384, 64, 0.1),
        (1, 12, 1, 64, 0.0),
        (2, 8, 129, 128, 0.1),
        (3, 16, 200, 64, 0.0),
        (1, 32, 65, 128, 0.1),
    ],
)
def test_attention(batch, heads, length, width, p, causal, dtype):
    from babl.kernels.attention import attention

    torch.manual_seed(0)
    qkv = [torch.randn(batch, heads, length, width, device="cuda", dtype=dtype) * width**-0.25 for _ in range(3)]
    table = torch.randn(heads, 2 * length - 1, device="cuda")
    mask = torch.arange(length, device="cuda") < torch.randint(1, length + 1, (batch, 1), device="cuda")
    mask[-1] = batch == 1  # of several texts, one is nothing but padding
    key = torch.arange(batch, device="cuda")
    reference = written_out(causal, mask, ops.Drop(p, key, 3))
    fused = lambda q, k, v, t: attention(q, k, v, t, mask, 1.0, causal, key, rng.threshold(p), 3)  # noqa: E731
    assert_as_near_as(lambda *a: fused(*a, table), lambda *a: reference(*a, table), qkv)
    first, again = (gradients(fused, [*qkv, table]) for _ in range(2))
    assert all(map(torch.equal, first, again))
    got, want = first[-1], gradients(reference, [*(x.float() for x in qkv), table])[-1]
    assert (got - want).norm() <= 5e-3 * want.norm() + 1e-5
    assert got.sum(-1).abs().max() <= 1e-2 * want.abs().max() + 1e-5  # a shift of all scores changes nothing


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_and_elements(dtype):
    from babl.kernels import glu, layer_norm, rms_norm, rope

    torch.manual_seed(0)
    x, update = (torch.randn(1000, 768, device="cuda", dtype=dtype) for _ in range(2))
    w, b = (torch.randn(768, device="cuda", dtype=dtype) for _ in range(2))
    kernel_choice.use_kernels("off")
    assert_as_near_as(lambda *a: rms_norm.rms_norm(*a, 1e-6), lambda *a: ops.rms_norm(*a, 1e-6), [x, w])
    assert_as_near_as(lambda *a: layer_norm.layer_norm(*a, 1e-5), lambda *a: ops.layer_norm(*a, 1e-5), [x, w, b])
    assert_as_near_as(glu.swiglu, ops.swiglu, [x, update])
    assert_as_near_as(glu.geglu, ops.geglu, [x, update])
    angles = torch.randn(1, 1, 50, 32, device="cuda").repeat(1, 1, 1, 2)
    q, k = (torch.randn(2, heads, 50, 64, device="cuda", dtype=dtype) for heads in (8, 2))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    assert_as_near_as(lambda q, k: rope.rope(q, k, cos, sin), lambda q, k: ops.rope(q, k, cos, sin), [q, k])


@pytest.mark.parametrize("dtype", HALVES)
def test_linear_cross_entropy(dtype):
    from babl.kernels.linear_cross_entropy import linear_cross_entropy

    torch.manual_seed(0)
    x, w = (torch.randn(n, 64, device="cuda", dtype=dtype) for n in (3000, 5000))
    labels = torch.randint(5000, (3000,), device="cuda")
    kernel_choice.use_kernels("off")
    exact, got = (
        gradients(fn, inputs)
        for fn, inputs in (
            (lambda x, w: ops.linear_cross_entropy_sum(x, w, labels, 0.1), [x.float(), w.float()]),
            (lambda x, w: linear_cross_entropy(x, w, labels, 0.1), [x, w]),
        )
    )
    for want, have in zip(exact, got, strict=True):
        assert (have.float() - want).norm() <= 2e-2 * want.norm()


def peak_bytes(run):
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def test_memory_of_attention_is_linear_in_the_length():
    from babl.kernels.attention import attention

    def step(length):
        inputs = [torch.randn(1, 8, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        table = torch.randn(8, 2 * length - 1, device="cuda")
        return lambda: gradients(lambda q, k, v, t: attention(q, k, v, t, None, 1.0, False), [*inputs, table])

    assert peak_bytes(step(8192)) <= 2.3 * peak_bytes(step(4096))


def test_nothing_waits_for_the_gpu():
    from babl.kernels.attention import attention
    from babl.kernels.linear_cross_entropy import linear_cross_entropy

    x, w = (torch.randn(n, 64, device="cuda", requires_grad=True) for n in (100, 300))
    labels = torch.randint(300, (100,), device="cuda")
    q = torch.randn(2, 2, 70, 64, device="cuda", requires_grad=True)
    table = torch.randn(2, 139, device="cuda", requires_grad=True)

    def step():
        linear_cross_entropy(x, w, labels, 0.1, 1e-4).backward()
        attention(q, q, q, table, None, 1.0, False).sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
