import pytest
import torch

from babl import ops

SHAPES = [(3, 7), (0, 16), (2, 5, 96), (4, 3, 1, 300), (9, 768)]


def kernels():
    from babl.kernels.layer_norm import add_layer_norm, layer_norm

    return layer_norm, add_layer_norm


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_residual_equal_the_reference(shape, agree, device):
    alone, added = kernels()
    x, update, weight, bias = (torch.randn(s, device=device) for s in (shape, shape, shape[-1:], shape[-1:]))
    agree(lambda *a: alone(*a, 1e-5), lambda *a: ops.layer_norm(*a, 1e-5), x + 3, weight, bias)
    agree(lambda *a: added(*a, 1e-5), lambda *a: ops.add_layer_norm(*a, 1e-5), x, update, weight, bias)


def test_a_row_of_one_number_is_the_bias(device):
    alone, _ = kernels()
    bias = torch.tensor([0.7], device=device)
    assert torch.equal(alone(torch.randn(4, 1, device=device), torch.ones(1, device=device), bias, 1e-5)[:, 0],
                       bias.expand(4))  # fmt: skip


def test_a_mean_far_from_zero_costs_no_digits(agree, device):
    alone, _ = kernels()
    x, w = 1e4 + torch.randn(5, 200, device=device), torch.randn(200, device=device)
    agree(lambda *a: alone(*a, 1e-5), lambda *a: ops.layer_norm(*a, 1e-5), x, w, w, tolerance=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_the_reference(dtype, agree, device):
    alone, added = kernels()
    x, u, w, b = (torch.randn(s, device=device).to(dtype) for s in ((6, 64), (6, 64), (64,), (64,)))
    agree(lambda *a: alone(*a, 1e-5), lambda *a: ops.layer_norm(*a, 1e-5), x, w, b, tolerance=2e-2)
    agree(lambda *a: added(*a, 1e-5), lambda *a: ops.add_layer_norm(*a, 1e-5), x, u, w, b, tolerance=2e-2)


def test_under_autocast_the_norm_is_fp32_as_torchs_is(device):
    _, added = kernels()
    x, u, w = (torch.randn(s, device=device) for s in ((6, 64), (6, 64), (64,)))
    with torch.autocast(device, torch.bfloat16):
        want, got = (add(x, u.bfloat16(), w, w, 1e-5) for add in (ops.add_layer_norm, added))
    assert [y.dtype for y in got] == [y.dtype for y in want] == [torch.float32, torch.float32]
    torch.testing.assert_close(got, want)


def test_more_rows_than_programs_are_all_summed(agree, device, monkeypatch):
    from babl.kernels import layer_norm as file

    monkeypatch.setattr(file, "TILE", 16)
    monkeypatch.setattr(file, "WALKERS", 3)
    x, w, b = torch.randn(41, 8, device=device), torch.randn(8, device=device), torch.randn(8, device=device)
    agree(lambda *a: file.layer_norm(*a, 1e-6), lambda *a: ops.layer_norm(*a, 1e-6), x, w, b)


def test_it_is_one_node_of_a_compiled_graph(compiles, device):
    alone, added = kernels()
    x, u, w, b = (torch.randn(s, device=device) for s in ((3, 8), (3, 8), (8,), (8,)))
    compiles(lambda x, u, w, b: (*added(x, u, w, b, 1e-6), alone(u, w, b, 1e-6)), x, u, w, b)


def test_its_registration_is_sound(device):
    from babl.kernels.layer_norm import _layer_norm

    x, w, b = (torch.randn(s, device=device, requires_grad=True) for s in ((3, 8), (8,), (8,)))
    torch.library.opcheck(_layer_norm, (x, None, w, b, 1e-6))
