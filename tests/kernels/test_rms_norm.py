import pytest
import torch

from babl import ops

SHAPES = [(3, 7), (1, 1), (0, 16), (2, 5, 96), (4, 3, 1, 300), (9, 768)]


def kernels():
    from babl.kernels.rms_norm import add_rms_norm, rms_norm

    return rms_norm, add_rms_norm


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_residual_equal_the_reference(shape, agree, device):
    alone, added = kernels()
    x, update, weight = (torch.randn(s, device=device) for s in (shape, shape, shape[-1:]))
    agree(lambda x, w: alone(x, w, 1e-6), lambda x, w: ops.rms_norm(x, w, 1e-6), x, weight)
    agree(lambda *a: added(*a, 1e-5), lambda *a: ops.add_rms_norm(*a, 1e-5), x, update, weight)


@pytest.mark.parametrize(
    ("stream", "update", "weight"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),  # weights of 16 bits: LLaMA and T5 round before they scale
        (torch.float32, torch.bfloat16, torch.float32),  # autocast: the stream stays in fp32
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_dtypes_are_those_of_the_reference(stream, update, weight, agree, device):
    alone, added = kernels()
    x, u, w = (torch.randn(s, device=device).to(d) for s, d in (((6, 64), stream), ((6, 64), update), ((64,), weight)))
    agree(lambda *a: added(*a, 1e-6), lambda *a: ops.add_rms_norm(*a, 1e-6), x, u, w, tolerance=2e-2)
    agree(lambda *a: alone(*a, 1e-6), lambda *a: ops.rms_norm(*a, 1e-6), x, w, tolerance=2e-2)


def test_a_result_that_is_not_used_gives_no_gradient(device):
    _, added = kernels()
    x, u, w = (torch.randn(s, device=device, requires_grad=True) for s in ((3, 8), (3, 8), (8,)))
    stream, _ = added(x, u, w, 1e-6)
    stream.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(u.grad, x.grad) and w.grad is None


def test_more_rows_than_programs_are_all_summed(agree, device, monkeypatch):
    from babl.kernels import rms_norm as file

    monkeypatch.setattr(file, "TILE", 16)
    monkeypatch.setattr(file, "WALKERS", 3)
    x, w = torch.randn(41, 8, device=device), torch.randn(8, device=device)
    agree(lambda *a: file.rms_norm(*a, 1e-6), lambda *a: ops.rms_norm(*a, 1e-6), x, w)


def test_rows_with_gaps_between_them_are_read_rightly(agree, device):
    _, added = kernels()
    x, u = torch.randn(4, 6, 32, device=device).transpose(0, 1), torch.randn(6, 4, 64, device=device)[..., ::2]
    w = torch.randn(32, device=device)
    agree(lambda *a: added(*a, 1e-6), lambda *a: ops.add_rms_norm(*a, 1e-6), x, u, w)


def test_it_is_one_node_of_a_compiled_graph(compiles, device):
    alone, added = kernels()
    x, u, w = (torch.randn(s, device=device) for s in ((3, 8), (3, 8), (8,)))
    compiles(lambda x, u, w: (*added(x, u, w, 1e-6), alone(u, w, 1e-6)), x, u, w)


def test_its_registration_is_sound(device):
    from babl.kernels.rms_norm import _rms_norm

    x, w = torch.randn(3, 8, device=device, requires_grad=True), torch.randn(8, device=device, requires_grad=True)
    torch.library.opcheck(_rms_norm, (x, torch.randn(3, 8, device=device), w, 1e-6))
