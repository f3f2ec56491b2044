"""Kernels beside the plain torch of babl.ops: on a GPU where there is one, else by triton's interpreter on the CPU."""

import pytest
import torch

from babl import kernel_choice


@pytest.fixture(autouse=True)
def _kernels():
    """What a test leaves switched on is switched off; without triton, nothing here can run."""
    pytest.importorskip("triton", reason="needs triton, which there is for Linux")
    torch.manual_seed(0)
    yield
    kernel_choice.use_kernels("off")


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(fn, inputs, weights):
    inputs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = fn(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((out * weight.to(out.dtype)).sum() for out, weight in zip(outputs, weights, strict=True))
    learned = [x for x in inputs if x.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)]


@pytest.fixture
def agree():
    """A function: results and gradients of kernel and reference are the same to a tolerance, relative to the largest.

    Two runs of the kernel agree to the last bit.
    """

    def check(kernel, reference, *inputs, tolerance=1e-5):
        with torch.no_grad():
            outputs = reference(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.randn(out.shape, device=out.device) for out in outputs]
        expected, got, again = (_run(fn, inputs, weights) for fn in (reference, kernel, kernel))
        for i, (want, have, twice) in enumerate(zip(expected, got, again, strict=True)):
            assert have.dtype == want.dtype and have.shape == want.shape, i
            assert torch.equal(have, twice), f"{i}: two runs differ"
            if want.numel():
                error = (have.double() - want.double()).abs().max()
                assert error <= tolerance * max(1.0, want.double().abs().max()), f"{i}: {error}"

    return check


@pytest.fixture
def compiles():
    """A function: torch.compile takes the kernel into one graph, which gives the same results and gradients."""

    def check(kernel, *inputs):
        torch._dynamo.reset()
        whole = torch.compile(kernel, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            outputs = kernel(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.randn(out.shape, device=out.device) for out in outputs]
        for want, have in zip(_run(kernel, inputs, weights), _run(whole, inputs, weights), strict=True):
            torch.testing.assert_close(have, want, atol=0, rtol=0)

    return check
