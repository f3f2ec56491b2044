"""The references are right, and kernels are chosen as was asked."""

import importlib.util
import os

import pytest
import torch
from torch.autograd import gradcheck

from babl import kernel_choice, ops
from babl.errors import UserError


@pytest.fixture(autouse=True)
def _mode(monkeypatch):
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)
    torch.manual_seed(0)
    yield
    kernel_choice.use_kernels("off")


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def attention(causal, masked):
    delta = torch.arange(5) - torch.arange(5)[:, None]
    hidden = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    hidden |= (delta > 0) if causal else False
    if masked:
        hidden[0, :, :, :2] = True
    drop = ops.Drop(0.3, torch.tensor([1, 2]), 4)

    def run(q, k, v, table):
        bias = table[:, delta + 4].masked_fill(hidden, torch.finfo(torch.float64).min)
        return ops.attention(q, k, v, bias, 0.7, drop)

    return run, [numbers(2, 2, 5, 3) for _ in range(3)] + [numbers(2, 9)]


TURN = torch.randn(1, 1, 4, 3, dtype=torch.float64).repeat(1, 1, 1, 2)
REFERENCES = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5), [numbers(3, 7), numbers(7)]),
    "add_rms_norm": (lambda *a: ops.add_rms_norm(*a, 1e-5), [numbers(3, 7), numbers(3, 7), numbers(7)]),
    "layer_norm": (lambda *a: ops.layer_norm(*a, 1e-5), [numbers(3, 7), numbers(7), numbers(7)]),
    "add_layer_norm": (lambda *a: ops.add_layer_norm(*a, 1e-5), [numbers(3, 7), numbers(3, 7), numbers(7), numbers(7)]),
    "rope": (
        lambda q, k: ops.rope(q, k, TURN.cos(), TURN.sin()),
        [numbers(2, 3, 4, 6), numbers(2, 1, 4, 6)],
    ),
    "swiglu": (ops.swiglu, [numbers(3, 5), numbers(3, 5)]),
    "geglu": (ops.geglu, [numbers(3, 5), numbers(3, 5)]),
    "attention": attention(causal=False, masked=True),
    "causal attention": attention(causal=True, masked=False),
    "linear_cross_entropy": (
        lambda x, w: ops.linear_cross_entropy_sum(x, w, torch.tensor([1, 0, 4]), 0.1),
        [numbers(3, 2), numbers(5, 2)],
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_gradients_of_the_references_are_those_of_differences(name):
    reference, inputs = REFERENCES[name]
    assert gradcheck(reference, inputs)


def test_fp64_is_never_a_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        kernel_choice.use_kernels("on")
    assert not kernel_choice.kernel_chosen("rms_norm", torch.zeros(2, 3, dtype=torch.float64), 6, 3)


def test_a_mode_that_is_none_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--kernels is 'fast', expected one of auto, on, off"):
        kernel_choice.use_kernels("fast")
    monkeypatch.setenv(kernel_choice.VARIABLE, "yes")
    with pytest.raises(UserError, match="BABL_KERNELS is 'yes', expected one of auto, on, off"):
        kernel_choice.use_kernels()


def test_on_is_refused_where_kernels_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--kernels is 'on', but triton is not installed"):
        kernel_choice.use_kernels("on")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="--kernels is 'on', but there is no GPU"):
        kernel_choice.use_kernels("on")


def test_without_triton_auto_is_plain_torch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernel_choice.use_kernels("auto")
    x, w = torch.randn(2, 3), torch.randn(3)
    assert not kernel_choice.kernel_chosen("rms_norm", x, 6, 3)
    torch.testing.assert_close(ops.rms_norm(x, w, 0.0), w * x / x.square().mean(-1, keepdim=True).sqrt())


def test_the_environment_says_what_the_processes_started_from_here_do(monkeypatch):
    monkeypatch.setenv(kernel_choice.VARIABLE, "off")
    kernel_choice.use_kernels()
    assert os.environ[kernel_choice.VARIABLE] == "off"
    kernel_choice.use_kernels("auto")
    assert os.environ[kernel_choice.VARIABLE] == "auto"


def test_auto_takes_a_kernel_only_where_it_was_measured_to_be_faster(monkeypatch):
    class OnGPU:
        device, dtype, is_cuda = torch.device("cuda", 0), torch.bfloat16, True

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernel_choice, "_gpu", lambda index: "H9")
    monkeypatch.setattr(kernel_choice, "product_dtype", lambda x: x.dtype)
    kernel_choice.use_kernels("auto")

    def chosen(size, width=64, operation="attention"):
        return kernel_choice.kernel_chosen(operation, OnGPU(), size, width)

    monkeypatch.setattr(kernel_choice, "MEASURED", {})
    assert not chosen(512)
    monkeypatch.setattr(kernel_choice, "MEASURED", {"H9": {"attention": {"bfloat16": {"64": 256}}}})
    assert chosen(256) and chosen(4096)
    assert not chosen(255) and not chosen(512, width=128) and not chosen(512, operation="alibi")
    monkeypatch.setattr(kernel_choice, "_gpu", lambda index: "another")
    assert not chosen(512)


def test_wider_than_a_program_holds_is_left_to_torch(monkeypatch):
    pytest.importorskip("triton", reason="needs triton, which there is for Linux")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel_choice.use_kernels("on")
    x = torch.zeros(1, 1)
    assert kernel_choice.kernel_chosen("attention", x, 512, 128) and not kernel_choice.kernel_chosen(
        "attention", x, 512, 129
    )
    assert kernel_choice.kernel_chosen("glu", x, 1, 10**6)
