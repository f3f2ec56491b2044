import pytest
import torch

from babl import ops


@pytest.fixture(params=["swiglu", "geglu"])
def gate_of(request):
    from babl.kernels import glu

    return getattr(glu, request.param), getattr(ops, request.param)


@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (3, 7), (2, 5, 1100)], ids=str)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_gates_equal_the_reference(gate_of, shape, spread, agree, device):
    agree(*gate_of, spread * torch.randn(shape, device=device), torch.randn(shape, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_reference(gate_of, dtype, agree, device):
    agree(*gate_of, *(torch.randn(4, 50, device=device).to(dtype) for _ in range(2)), tolerance=2e-2)


def test_numbers_far_out_stay_finite(gate_of, device):
    kernel, _ = gate_of
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4], device=device, requires_grad=True)
    out = kernel(gate, torch.ones(4, device=device))
    out.sum().backward()
    torch.testing.assert_close(out, gate.clamp(min=0.0).detach())
    torch.testing.assert_close(gate.grad, torch.tensor([0.0, 0.0, 1.0, 1.0], device=device))


def test_it_is_one_node_of_a_compiled_graph(gate_of, compiles, device):
    from babl.kernels.glu import _glu

    gate, up = torch.randn(3, 8, device=device), torch.randn(3, 8, device=device)
    compiles(gate_of[0], gate, up)
    torch.library.opcheck(_glu, (gate.requires_grad_(), up, 1))
