import pytest
import torch

from babl import ops, rng
from babl.models.bloom import slopes


def written_out(q, k, v, table, mask, scale, causal, drop=None):
    """The reference: the bias as a tensor of every pair; a query that sees nothing gets 0, as from the kernel."""
    length = q.shape[2]
    delta = torch.arange(length, device=q.device) - torch.arange(length, device=q.device)[:, None]
    bias = table[:, None, None] * delta if table.ndim == 1 else table[:, delta + length - 1]  # (H, S, S)
    visible = (delta <= 0 if causal else torch.ones_like(delta, dtype=torch.bool))[None, None]  # (1, 1, S, S)
    visible = visible if mask is None else visible & mask[:, None, None]
    bias = bias.to(q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min)
    drop = ops.Drop(0.0, None, 0) if drop is None else drop  # which makes the reference write its scores out
    return ops.attention(q, k, v, bias, scale, drop) * visible.any(-1, keepdim=True)


def inputs(batch, heads, length, width, device, dtype=torch.float32):
    """q, k, v as they come out of linear layers, and a table."""
    qkv = [torch.randn(batch, length, heads, width, device=device, dtype=dtype) * width**-0.25 for _ in range(3)]
    return *(x.transpose(1, 2) for x in qkv), torch.randn(heads, 2 * length - 1, device=device)


def hidden(batch, length, device):
    """Padding on the left, on the right, in between, and a text that is nothing but padding."""
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    mask[0, : length // 3] = False
    mask[1 % batch, length // 2 :] = False
    mask[2 % batch, ::2] = False
    mask[3:] = False
    return mask


def kernel(*arguments):
    from babl.kernels.attention import attention

    *arguments, drop = arguments
    return attention(*arguments, *((drop.key, rng.threshold(drop.p), drop.site) if drop else ()))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "width"),
    [(4, 1, 33, 64), (1, 2, 17, 128), (2, 1, 1, 64), (1, 3, 70, 5), (4, 1, 64, 16)],
)
def test_result_and_every_gradient_equal_the_reference(batch, heads, length, width, causal, masked, agree, device):
    mask = hidden(batch, length, device) if masked else None
    settings = mask, width**-0.5, causal, None
    agree(lambda *a: kernel(*a, *settings), lambda *a: written_out(*a, *settings),
          *inputs(batch, heads, length, width, device))  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_dropout_drops_what_the_reference_drops(seed, causal, agree, device):
    torch.manual_seed(seed)
    drop = ops.Drop((0.1, 0.25, 0.5, 0.9, 1e-5)[seed], torch.randint(-(2**62), 2**62, (2,), device=device), 7 + seed)
    settings = hidden(2, 39, device), 1.0, causal, drop
    agree(lambda *a: kernel(*a, *settings), lambda *a: written_out(*a, *settings), *inputs(2, 2, 39, 8, device))


@pytest.mark.parametrize(("p", "dropping"), [(0.01, 655), (0.1, 6554), (0.5, 32768), (0.9, 58982)])
def test_dropout_drops_what_plain_integers_say(p, dropping, mask_by_hand, device):
    keys, site, heads, length = [-3, 2**62 + 5], 11, 2, 39
    expected = torch.tensor([mask_by_hand(key, site, (heads, length, length), dropping) for key in keys])
    zero = torch.zeros(
        2, heads, length, length, device=device
    )  # all scores are alike, and the values are unit vectors:
    values = torch.eye(length, device=device).expand_as(zero)  # what comes out is the dropped probabilities themselves
    table = torch.zeros(heads, 2 * length - 1, device=device)
    drop = ops.Drop(p, torch.tensor(keys, device=device), site)
    probs = kernel(zero, zero, values, table, None, 1.0, False, drop)
    assert torch.equal((probs != 0).long().cpu(), expected)
    scale = 65536 / (65536 - dropping) / length
    torch.testing.assert_close(probs.cpu(), expected * scale, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("heads", [2, 3])
def test_alibi_is_the_case_of_a_table_that_grows_with_distance(heads, agree, device):
    slope = slopes(heads, torch.device(device))
    drop = ops.Drop(0.2, torch.tensor([5, 6], device=device), 1)
    settings = slope, hidden(2, 45, device), 0.25, True, drop
    agree(
        lambda *a: kernel(*a, *settings), lambda *a: written_out(*a, *settings), *inputs(2, heads, 45, 16, device)[:3]
    )
    q, k, v, _ = inputs(2, heads, 45, 16, device)
    table = slope[:, None] * torch.arange(-44, 45, device=device)
    torch.testing.assert_close(kernel(q, k, v, *settings), kernel(q, k, v, table, *settings[1:]))


def test_fp16_is_as_near_as_the_reference_in_fp16(device):
    *qkv, table = inputs(2, 2, 40, 64, device, torch.float16)
    settings = table, hidden(2, 40, device), 1.0, False, None
    exact = written_out(*(x.float() for x in qkv), *settings)
    rounded = written_out(*qkv, *settings).float()
    got = kernel(*qkv, *settings)
    assert got.dtype == torch.float16
    assert (got - exact).abs().max() <= 2 * (rounded - exact).abs().max() + 1e-5


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_the_gradient_of_a_bias_sums_to_zero_over_buckets(causal, device):
    from babl.models.t5 import relative_bucket

    q, k, v, _ = inputs(3, 2, 90, 16, device)
    weight = torch.randn(32, 2, device=device, requires_grad=True)
    buckets = relative_bucket(torch.arange(-89, 90, device=device), not causal, 32, 128)
    out = kernel(q, k, v, weight[buckets].mT, hidden(3, 90, device), 1.0, causal, None)
    (out * torch.randn_like(out)).sum().backward()
    assert weight.grad.abs().max() > 0.1, "a shift of all scores changes nothing, but each bucket alone does"
    assert weight.grad.sum(0).abs().max() < 1e-4


def test_batches_dealt_to_several_programs_add_up(agree, device, monkeypatch):
    from babl.kernels import attention as file

    monkeypatch.setattr(file, "PROGRAMS", 6)  # of one head and one diagonal: batches in six lots
    settings = hidden(7, 9, device), 1.0, False, None
    agree(lambda *a: kernel(*a, *settings), lambda *a: written_out(*a, *settings), *inputs(7, 1, 9, 16, device))


def test_strides_of_one_fused_layer_are_read_in_place(agree, device):
    fused = torch.randn(2, 20, 3, 3, 16, device=device)  # (B, S, H, qkv, D), as BLOOM has it
    table = torch.randn(3, 39, device=device)
    settings = None, 0.25, True, None

    def over(fn):
        return lambda fused, table: fn(*fused.transpose(1, 2).unbind(-2), table, *settings)

    agree(over(kernel), over(written_out), fused, table)


def test_what_stands_behind_a_hidden_key_changes_nothing(device):
    q, k, v, table = inputs(2, 2, 24, 16, device)
    mask = hidden(2, 24, device)
    out = kernel(q, k, v, table, mask, 1.0, False, None)
    other = [torch.where(mask[:, None, :, None], x, 1e6) for x in (k, v)]
    assert torch.equal(kernel(q, *other, table, mask, 1.0, False, None), out)


def test_no_tensor_of_every_pair_is_kept(device):
    q, k, v, table = (x.requires_grad_() for x in inputs(1, 2, 512, 16, device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        kernel(q, k, v, table, None, 1.0, False, None)
    assert max(saved) <= q.numel()


def test_it_is_one_node_of_a_compiled_graph(compiles, device):
    from babl.kernels.attention import _attention

    q, k, v, table = inputs(2, 2, 20, 16, device)
    key, mask = torch.tensor([3, 4], device=device), hidden(2, 20, device)
    compiles(lambda *a: kernel(*a, mask, 1.0, False, ops.Drop(0.2, key, 1)), q, k, v, table)
    arguments = (q.requires_grad_(), k, v, table.requires_grad_(), mask, key, 1.0, False, rng.threshold(0.2), 1)
    torch.library.opcheck(_attention, arguments)
